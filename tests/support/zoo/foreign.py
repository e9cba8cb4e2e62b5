"""Networks that nobody here wrote: the `transformers` package's, tiny and at random, nothing downloaded.

Every factory takes a width multiplier and the number of classes. The wider network has more heads of the same size.
"""

import transformers
from torch import Tensor, nn

from tests.support.zoo.attention import LENGTH, TOKENS


class Logits(nn.Module):
    """Pixels or tokens in, nothing but the logits out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def resnet(width: int, classes: int) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4 * width,
        hidden_sizes=[4 * width, 6 * width, 8 * width],
        depths=[1, 2, 1],
        layer_type="basic",
        num_labels=classes,
    )
    return Logits(transformers.ResNetForImageClassification(config))


def resnet_bottleneck(width: int, classes: int) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4 * width,
        hidden_sizes=[8 * width, 12 * width],
        depths=[2, 1],
        layer_type="bottleneck",
        num_labels=classes,
    )
    return Logits(transformers.ResNetForImageClassification(config))


def regnet(width: int, classes: int) -> nn.Module:
    """With channel attention (type y)."""
    config = transformers.RegNetConfig(
        embedding_size=12 * width,
        hidden_sizes=[16 * width, 24 * width],
        depths=[1, 2],
        groups_width=8 * width,
        layer_type="y",
        num_labels=classes,
    )
    return Logits(transformers.RegNetForImageClassification(config))


def mobilenetv2(width: int, classes: int) -> nn.Module:
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.125 * width,
        depth_divisible_by=2,
        min_depth=4,
        expand_ratio=2,
        output_stride=8,
        finegrained_output=False,
        num_labels=classes,
    )
    return Logits(transformers.MobileNetV2ForImageClassification(config))


def convnext(width: int, classes: int) -> nn.Module:
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[4 * width, 6 * width], depths=[1, 2], num_labels=classes
    )
    return Logits(transformers.ConvNextForImageClassification(config))


def vit(width: int, classes: int, attention: str = "sdpa") -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8 * width,
        num_hidden_layers=2,
        num_attention_heads=2 * width,
        intermediate_size=12 * width,
        image_size=16,
        patch_size=8,
        num_labels=classes,
        attn_implementation=attention,
    )
    return Logits(transformers.ViTForImageClassification(config))


def swin(width: int, classes: int) -> nn.Module:
    """Two stages: windows of 2 × 2 patches, shifted in every other block, and patch merging between the stages."""
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8 * width,
        depths=[2, 1],
        num_heads=[2 * width, 4 * width],
        window_size=2,
        mlp_ratio=2.0,
        num_labels=classes,
    )
    return Logits(transformers.SwinForImageClassification(config))


def bert(width: int, classes: int, attention: str = "sdpa") -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=8 * width,
        num_hidden_layers=2,
        num_attention_heads=2 * width,
        intermediate_size=12 * width,
        max_position_embeddings=LENGTH,
        num_labels=classes,
        attn_implementation=attention,
    )
    return Logits(transformers.BertForSequenceClassification(config))


def distilbert(width: int, classes: int) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=TOKENS,
        dim=8 * width,
        n_layers=2,
        n_heads=2 * width,
        hidden_dim=12 * width,
        max_position_embeddings=LENGTH,
        num_labels=classes,
    )
    return Logits(transformers.DistilBertForSequenceClassification(config))


def gpt2(width: int, classes: int, attention: str = "sdpa") -> nn.Module:
    """A language model with tied embeddings: `classes` tokens are added to the common ones."""
    config = transformers.GPT2Config(
        vocab_size=TOKENS + classes,
        n_positions=LENGTH,
        n_embd=8 * width,
        n_layer=2,
        n_head=2 * width,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return Logits(transformers.GPT2LMHeadModel(config))


def llama(width: int, classes: int, attention: str = "sdpa") -> nn.Module:
    """A language model with grouped queries and a head of its own: `classes` tokens are added to the common ones."""
    config = transformers.LlamaConfig(
        vocab_size=TOKENS + classes,
        hidden_size=16 * width,
        num_hidden_layers=2,
        num_attention_heads=4 * width,
        num_key_value_heads=2 * width,
        intermediate_size=20 * width,
        max_position_embeddings=LENGTH,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return Logits(transformers.LlamaForCausalLM(config))


def qwen2(width: int, classes: int) -> nn.Module:
    """A language model with tied embeddings and biases in its attention."""
    config = transformers.Qwen2Config(
        vocab_size=TOKENS + classes,
        hidden_size=16 * width,
        num_hidden_layers=2,
        num_attention_heads=4 * width,
        num_key_value_heads=2 * width,
        intermediate_size=20 * width,
        max_position_embeddings=LENGTH,
        use_cache=False,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Logits(transformers.Qwen2ForCausalLM(config))


def t5_encoder(width: int, classes: int) -> nn.Module:
    """An encoder with relative positions, which labels every token."""
    config = transformers.T5Config(
        vocab_size=TOKENS,
        d_model=8 * width,
        d_kv=4,
        d_ff=12 * width,
        num_layers=2,
        num_heads=2 * width,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
        feed_forward_proj="gated-gelu",
        num_labels=classes,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Logits(transformers.T5ForTokenClassification(config))

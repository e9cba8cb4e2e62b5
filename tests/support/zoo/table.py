"""The table of network families: as small as possible, with the true structure of each.

`OWN` is written here, layer by layer; `FOREIGN` comes from the `transformers` package. A new family is one more row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.support.zoo import attention, foreign, vision
from tests.support.zoo.attention import LENGTH, TOKENS

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def settle(module: nn.Module, seed: int) -> None:
    """Give a freshly built network values as after training, in place: none is trivial, and the signal survives depth.

    Weights of layers are drawn as He et al. do, embeddings as torch does. To every other parameter that hardly varies
    (gains, biases, layer scales, class tokens, positions) noise is added, and running statistics are drawn, so that
    whoever permutes or forgets one of them changes the output.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: set[Tensor] = set()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, WEIGHTED):
                nn.init.kaiming_normal_(part.weight, generator=generator)
                drawn.add(part.weight)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, generator=generator)
                drawn.add(part.weight)
            elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                assert part.running_var is not None
                nn.init.normal_(part.running_mean, std=0.3, generator=generator)
                nn.init.uniform_(part.running_var, 0.5, 2.0, generator=generator)
        for parameter in module.parameters():
            if parameter not in drawn and parameter.std(correction=0) < 0.1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def normal(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Noise around a mean for each example and channel: of noise alone, pooling makes all examples alike."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, shape[0], *(1 for _ in shape[1:]), generator=generator)
    return means + torch.randn(count, *shape, generator=generator)


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(1, TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class ZooCase:
    """A family: `make(width multiplier, classes)` builds a network of it, `example(count, seed)` draws inputs.

    `network` and `examples` give the same values for the same arguments, and leave torch's global generator alone.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    example: Callable[[int, int], Tensor]

    def network(self, seed: int, width: int = 1, classes: int = 3) -> nn.Module:
        """A settled network in eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.make(width, classes)
        settle(network, seed)
        return network.eval()

    def examples(self, count: int, seed: int = 0) -> Tensor:
        return self.example(count, seed)


images = partial(normal, (3, 16, 16))
larger_images = partial(normal, (3, 32, 32))

OWN = (
    ZooCase("mlp", vision.mlp, partial(normal, (1, 12, 12))),
    ZooCase("lenet-5", vision.lenet5, partial(normal, (1, 20, 20))),
    ZooCase("vgg-16", vision.vgg16, larger_images),
    ZooCase("vgg-16, normalised", partial(vision.vgg16, normalised=True), larger_images),
    ZooCase("resnet-18", vision.resnet18, larger_images),
    ZooCase("resnet-28, decathlon", vision.resnet28, images),
    ZooCase("resnext", vision.resnext, images),
    ZooCase("mobilenet-v2", vision.mobilenetv2, images),
    ZooCase("squeeze-excite", vision.squeeze_excite, images),
    ZooCase("efficient channel attention", vision.efficient_channel_attention, images),
    ZooCase("densenet", vision.densenet, images),
    ZooCase("convnext", vision.ConvNeXt, images),
    ZooCase("u-net", vision.UNet, images),
    ZooCase("groupnorm", vision.groupnorm, images),
    ZooCase("temporal", vision.Temporal, partial(normal, (2, 24))),
    ZooCase("vit", attention.vit, images),
    ZooCase("vit, attention module", attention.vit_attention_module, images),
    ZooCase("vit, torch encoder", attention.torch_encoder_vit, images),
    ZooCase("perceiver", attention.Perceiver, images),
    ZooCase("bert", attention.Bert, tokens),
    ZooCase("decoder", attention.decoder, tokens),
    ZooCase("language model", attention.LanguageModel, tokens),
)

FOREIGN = (
    ZooCase("transformers resnet", foreign.resnet, images),
    ZooCase("transformers resnet, bottlenecks", foreign.resnet_bottleneck, images),
    ZooCase("transformers regnet", foreign.regnet, images),
    ZooCase("transformers mobilenet-v2", foreign.mobilenetv2, larger_images),
    ZooCase("transformers convnext", foreign.convnext, images),
    ZooCase("transformers vit", foreign.vit, images),
    ZooCase("transformers vit, eager", partial(foreign.vit, attention="eager"), images),
    ZooCase("transformers swin", foreign.swin, images),
    ZooCase("transformers bert", foreign.bert, tokens),
    ZooCase("transformers bert, eager", partial(foreign.bert, attention="eager"), tokens),
    ZooCase("transformers distilbert", foreign.distilbert, tokens),
    ZooCase("transformers gpt-2", foreign.gpt2, tokens),
    ZooCase("transformers gpt-2, eager", partial(foreign.gpt2, attention="eager"), tokens),
    ZooCase("transformers llama", foreign.llama, tokens),
    ZooCase("transformers llama, eager", partial(foreign.llama, attention="eager"), tokens),
    ZooCase("transformers qwen-2", foreign.qwen2, tokens),
    ZooCase("transformers t5 encoder", foreign.t5_encoder, tokens),
)

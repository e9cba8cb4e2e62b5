"""Small transformers, on images and on tokens, each with another way of writing attention.

Every factory takes a width multiplier and the number of classes. The wider network has more heads of the same size.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 4
LENGTH = 6
TOKENS = 11


class PackedAttention(nn.Module):
    """Queries, keys and values of all heads from one linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        packed = self.qkv(x).reshape(batch, length, 3, size // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        queries, keys, values = packed.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, size))
        return out


class ModuleAttention(nn.Module):
    """torch's own module, asked for the attention weights too, which nobody reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, size // HEAD, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class SeparateAttention(nn.Module):
    """A linear layer each for queries, keys and values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class CausalAttention(nn.Module):
    """Attention to the past, spelt out: scores, mask, softmax, weighted sum."""

    visible: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.register_buffer("visible", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        queries, keys, values = (
            part.view(batch, length, size // HEAD, HEAD).transpose(1, 2) for part in self.qkv(x).split(size, dim=2)
        )
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(HEAD)
        scores = scores.masked_fill(~self.visible[:length, :length], -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ values
        out: Tensor = self.out(mixed.transpose(1, 2).contiguous().view(batch, length, size))
        return out


class CrossAttention(nn.Module):
    """Written with einsum: positions of one value attend to those of another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        queries = self.query(x).unflatten(-1, (-1, HEAD))
        keys, values = (layer(read).unflatten(-1, (-1, HEAD)) for layer in (self.key, self.value))
        weights = torch.einsum("bqhd,bkhd->bhqk", queries, keys).div(math.sqrt(HEAD)).softmax(-1)
        out: Tensor = self.out(torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2))
        return out


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, length, HEAD]."""
    frequencies = 100.0 ** -(torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angles = torch.outer(torch.arange(x.shape[2], device=x.device), frequencies)
    cosines, sines = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class GroupedQueryAttention(nn.Module):
    """Rotary positions; two heads of queries read one head of keys and values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size // 2, bias=False)
        self.value = nn.Linear(size, size // 2, bias=False)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        keys, values = (part.repeat_interleave(2, dim=1) for part in (rotated(keys), values))
        mixed = F.scaled_dot_product_attention(rotated(queries), keys, values, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class GatedMlp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, 2 * size, bias=False)
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def gelu_mlp(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))


class PreNorm(nn.Module):
    """Each branch reads the normalised stream and is added to it."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, size: int, norm: type[nn.LayerNorm | nn.RMSNorm] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(size), attention
        self.norm2, self.mlp = norm(size), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PostNorm(nn.Module):
    """The sum of stream and branch is normalised."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, size: int) -> None:
        super().__init__()
        self.attention, self.norm1 = attention, nn.LayerNorm(size)
        self.mlp, self.norm2 = mlp, nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class VisionTransformer(nn.Module):
    """Dosovitskiy et al.: patches, class token, learned positions; [batch, 3, 16, 16] → [batch, classes]."""

    def __init__(self, encoder: nn.Module, size: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size, 8, stride=8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = nn.Parameter(torch.zeros(1, 5, size))
        self.encoder = encoder
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1) + self.positions
        out: Tensor = self.head(self.norm(self.encoder(tokens))[:, 0])
        return out


def vit(width: int, classes: int, attention: type[nn.Module] = PackedAttention) -> nn.Module:
    size = 2 * HEAD * width
    blocks = (PreNorm(attention(size), gelu_mlp(size), size) for _ in range(2))
    return VisionTransformer(nn.Sequential(*blocks), size, classes)


def torch_encoder_vit(width: int, classes: int) -> nn.Module:
    size = 2 * HEAD * width
    layer = nn.TransformerEncoderLayer(size, size // HEAD, 2 * size, activation="gelu", batch_first=True)
    return VisionTransformer(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), size, classes)


class Bert(nn.Module):
    """Devlin et al.: token, position and segment embeddings; [batch, LENGTH] integers → [batch, classes]."""

    segments: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        size = 2 * HEAD * width
        self.tokens = nn.Embedding(TOKENS, size, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, size)
        self.segment = nn.Embedding(2, size)
        self.register_buffer("segments", torch.arange(LENGTH) // (LENGTH // 2), persistent=False)
        self.norm = nn.LayerNorm(size)
        self.encoder = nn.Sequential(
            *(PostNorm(SeparateAttention(size), gelu_mlp(size), size) for _ in range(2)),
        )
        self.pooler = nn.Linear(size, size)
        self.classifier = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        where = self.positions(torch.arange(length, device=x.device)) + self.segment(self.segments[:length])
        stream = self.encoder(self.norm(self.tokens(x) + where))
        out: Tensor = self.classifier(torch.tanh(self.pooler(stream[:, 0])))
        return out


def decoder(width: int, classes: int) -> nn.Module:
    """RMSNorm, rotary positions, grouped queries, gated MLP; [batch, LENGTH] integers → [batch, LENGTH, classes]."""
    size = 4 * HEAD * width
    return nn.Sequential(
        nn.Embedding(TOKENS, size),
        *(PreNorm(GroupedQueryAttention(size), GatedMlp(size), size, nn.RMSNorm) for _ in range(2)),
        nn.RMSNorm(size),
        nn.Linear(size, classes, bias=False),
    )


class LanguageModel(nn.Module):
    """Predicts the next token with the embedding's own weights; [batch, LENGTH] integers → [batch, LENGTH, tokens].

    `classes` tokens are added to the common ones.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        size = 2 * HEAD * width
        self.tokens = nn.Embedding(TOKENS + classes, size)
        self.positions = nn.Parameter(torch.zeros(LENGTH, size))
        self.blocks = nn.Sequential(*(PreNorm(CausalAttention(size), gelu_mlp(size), size) for _ in range(2)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, TOKENS + classes, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        stream = self.tokens(x) + self.positions[: x.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(stream)))
        return out


class Perceiver(nn.Module):
    """Jaegle et al.: learned queries attend to patches; [batch, 3, 16, 16] → [batch, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        size = 2 * HEAD * width
        self.patches = nn.Conv2d(3, size, 8, stride=8)
        self.queries = nn.Parameter(torch.zeros(1, 3, size))
        self.attention = CrossAttention(size)
        self.norm, self.mlp = nn.LayerNorm(size), gelu_mlp(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2).contiguous()
        queries = self.queries.expand(len(x), -1, -1)
        stream = queries + self.attention(queries, patches)
        out: Tensor = self.head((stream + self.mlp(self.norm(stream))).mean(1))
        return out


vit_attention_module = partial(vit, attention=ModuleAttention)

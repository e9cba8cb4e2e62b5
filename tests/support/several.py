"""Small networks with several inputs and several outputs, and data for them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtz_core as mtz

TOKENS, LENGTH, FEATURES, EXTRA = 20, 6, 7, 3


class MaskedEncoder(nn.Module):
    """Reads tokens and an attention mask, as BERT does; weights of tokens may be left out."""

    def __init__(self, hidden: int = 12, classes: int = 3, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(TOKENS, width)
        self.positions = nn.Parameter(0.3 * torch.randn(LENGTH, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, weights: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids) + self.positions
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.bool()[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        counted = attention_mask.to(x.dtype)[..., None] * (1.0 if weights is None else weights[..., None])
        logits: Tensor = self.head((x * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1e-3))
        return logits


class HeldEncoder(MaskedEncoder):
    """Returns its logits in a dict."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(input_ids, attention_mask)}


def masked(count: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Tokens of texts of different lengths, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, TOKENS, (count, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).to(dtype)
    return {"input_ids": ids, "attention_mask": mask}


class TwoHeads(nn.Module):
    """Reads numbers and a little more, and returns logits, boxes in a list, and nothing."""

    def __init__(self, hidden: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.more = nn.Linear(EXTRA, hidden)
        self.second = nn.Linear(2 * hidden, hidden)
        self.classes = nn.Linear(hidden, classes)
        self.boxes = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, more: Tensor) -> dict[str, object]:
        y = torch.cat([self.first(x).relu(), self.more(more).relu()], dim=1)
        y = self.second(y).relu()
        return {"logits": self.classes(y), "found": [self.boxes(y), None]}


def numbers(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, FEATURES, generator=generator),
        torch.randn(count, EXTRA, generator=generator),
    )


def encoder(seed: int, hidden: int = 12, classes: int = 3) -> MaskedEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedEncoder(hidden, classes).eval()


def two_heads(seed: int, hidden: int = 16, scale: float = 20.0) -> TwoHeads:
    """With logits that tell inputs apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TwoHeads(hidden).eval()
    with torch.no_grad():
        network.classes.weight.mul_(scale)
    return network


def read_again(zipped: mtz.ZippedNetwork, folder: Path) -> mtz.ZippedNetwork:
    """What is read after storing; stored again, it has the same bytes."""
    zipped.save(folder / "first")
    again = mtz.load(folder / "first")
    again.save(folder / "second")
    for path in (folder / "first").iterdir():
        assert path.read_bytes() == (folder / "second" / path.name).read_bytes()
    assert again.report == zipped.report
    return again

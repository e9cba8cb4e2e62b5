"""Architectures of timm: ``python -m tests.benchmarks.architectures`` (`make bench-architectures`).

Every network of `NETWORKS` is traced, and zipped with itself. What is shared is stored once, so about half is left, or
notes say which layers stay separate. Those of `THROUGH` are zipped with one of other weights to three quarters of the
bytes, too, and extracted again as plain modules. Weights are random: time, sizes and what is followed do not depend on
what networks know. Every measurement is kept, so a run that is stopped goes on where it was. At the end it writes
`docs/benchmarks/architectures.md`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mtz_core import Budget, Progress, ZipConfig, trace, zip_networks
from mtz_core.errors import MtzError, ZipWarning
from tasks.files import whole_file
from tests.benchmarks.records import DOCS, Records
from tests.support.networks import zip_traced
from tests.support.zoo.table import settle

PAGE = DOCS / "architectures.md"
EXAMPLES, PATCHES, SIZE = 15, 8, 0.75
HALF = 0.56
"""The most of the bytes that a network zipped with itself is to store: head and normalisations are each task's."""


@dataclass(frozen=True)
class Architecture:
    """A network by its name in timm, for images of so many pixels."""

    name: str
    pixels: int = 64
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def network(self, seed: int, classes: int) -> nn.Module:
        """A network with random weights, none of them trivial."""
        torch.manual_seed(seed)
        network: nn.Module = library().create_model(self.name, num_classes=classes, **self.arguments)
        settle(network, seed)
        return network.eval()

    def images(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        colours = torch.randn(EXAMPLES, 3, 1, 1, generator=generator)
        return colours + torch.randn(EXAMPLES, 3, self.pixels, self.pixels, generator=generator)


def sized(name: str, pixels: int = 64, **arguments: Any) -> Architecture:
    """An architecture that is built for a size of images."""
    return Architecture(name, pixels, {"img_size": pixels, **arguments})


THROUGH: tuple[Architecture, ...] = (
    Architecture("test_resnet"),
    Architecture("mobilenetv2_035"),
    Architecture("mobilenetv3_small_050"),
    Architecture("test_efficientnet"),
    Architecture("test_byobnet"),
    Architecture("test_convnext"),
    Architecture("test_mambaout"),
    Architecture("test_nfnet"),
    sized("test_vit"),
    sized("test_coatnet"),
    Architecture("lcnet_035"),
    Architecture("ese_vovnet19b_slim_dw"),
)
"""Those that go through budget and extraction, too: small ones, so that each takes about a minute at most."""

NETWORKS: tuple[Architecture, ...] = (
    *THROUGH,
    Architecture("resnet10t"),
    Architecture("regnety_002"),
    Architecture("ghostnet_050"),
    Architecture("mobilevit_xxs"),
    Architecture("edgenext_xx_small"),
    sized("vit_tiny_patch16_224", depth=4),
    Architecture("resnetv2_18"),
    Architecture("regnetx_002"),
    Architecture("repvgg_a0"),
    Architecture("densenet121"),
    Architecture("dla46_c"),
    Architecture("cs3darknet_focus_s"),
    Architecture("hgnetv2_b0"),
    Architecture("rexnet_100"),
    Architecture("repghostnet_050"),
    Architecture("tinynet_e"),
    Architecture("mobilenetv4_conv_small_035"),
    Architecture("inception_next_atto"),
    Architecture("fasternet_t0"),
    Architecture("fastvit_t8"),
    Architecture("efficientvit_b0"),
    sized("efficientvit_m0"),
    sized("levit_128s"),
    sized("efficientformerv2_s0"),
    Architecture("iformer_t"),
    Architecture("pvt_v2_b0"),
    sized("deit_tiny_distilled_patch16_224", depth=4),
    sized("convit_tiny", depth=4, local_up_to_layer=2),
    sized("xcit_nano_12_p16_224", depth=4),
    sized("pit_ti_224"),
    sized("gmlp_ti16_224"),
    sized("eva02_tiny_patch14_224", 56, depth=4),
    sized("swin_tiny_patch4_window7_224", window_size=4, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
)


@cache
def library() -> Any:
    """The module `timm`. It imports torchvision, whose operators a build of torch may not be able to load."""
    try:
        import timm  # type: ignore[import-not-found]
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    return timm


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of outputs, relative to the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


def with_itself(own: Architecture) -> Iterator[dict[str, Any]]:
    """Trace a network, and zip it with itself; yields what is known, step by step."""
    network, images = own.network(1, 10), own.images(0)
    yield {"parameters": sum(parameter.numel() for parameter in network.parameters())}
    started = time.process_time()
    traced = trace(network, images)
    yield {"layers": len(traced.graph.layers), "trace": time.process_time() - started}
    started = time.process_time()
    config = ZipConfig(patches=PATCHES, refit_rounds=0)
    zipped = zip_traced({"a": traced, "b": traced}, {"a": images, "b": images}, config)
    report = zipped.report
    yield {
        "zip": time.process_time() - started,
        "stored": report.stored_bytes / report.original_bytes,
        "separate": {
            note: sum(layer.parameters for layer in report.layers if layer.note == note) / report.original_parameters
            for note in dict.fromkeys(layer.note for layer in report.layers if layer.note)
        },
    }
    with torch.no_grad():
        expected = network(images)
        yield {"difference": max(largest_difference(zipped(images, task), expected) for task in zipped.tasks)}


def through(own: Architecture) -> Iterator[dict[str, Any]]:
    """Zip a network with one of other weights and classes to a budget, and extract both."""
    networks = {"a": own.network(1, 10), "b": own.network(2, 5)}
    images = {task: own.images(i) for i, task in enumerate(networks)}
    seconds: dict[str, float] = {}
    started = time.process_time()

    def progress(step: Progress) -> None:
        seconds[step.stage] = time.process_time() - started

    config = ZipConfig(patches=PATCHES, refit_rounds=0, budget=Budget(size=SIZE, moves=("share", "drop")))
    zipped = zip_networks(networks, images, config, on_progress=progress)
    report = zipped.report
    yield {"trace": seconds["trace"], "budget": time.process_time() - started - seconds["trace"]}
    yield {"stored": report.stored_bytes / report.original_bytes}
    started = time.process_time()
    extracted = {task: zipped.network(task) for task in zipped.tasks}
    yield {"extract": time.process_time() - started}
    with torch.no_grad():
        yield {
            "difference": max(
                largest_difference(module(images[task]), zipped(images[task], task))
                for task, module in extracted.items()
            )
        }


PARTS: Mapping[str, tuple[Callable[[Architecture], Iterator[dict[str, Any]]], Sequence[Architecture]]] = {
    "with itself": (with_itself, NETWORKS),
    "through": (through, THROUGH),
}


def measure(own: Architecture, part: str) -> dict[str, Any]:
    """Measure an architecture, as far as it gets."""
    row: dict[str, Any] = {"name": own.name, "part": part, "error": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZipWarning)  # random networks have little in common
        try:
            for found in PARTS[part][0](own):
                row |= found
        except MtzError as error:
            row["error"] = f"{type(error).__name__}: {error}"
    return row


def line(row: Mapping[str, Any]) -> str:
    """One measurement in a line."""
    told = {name: f"{value:.3g}" for name, value in row.items() if isinstance(value, int | float)}
    return f"{row['name']} {row['part']}: {', '.join(f'{name} {value}' for name, value in told.items())} {row['error']}"


def page(rows: Sequence[Mapping[str, Any]], gone: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown: of networks zipped with themselves, and of those that went through everything."""
    went = [row for row in gone if "extract" in row]
    halved = [row for row in rows if row.get("stored", 1.0) <= HALF]
    noted = [row for row in rows if row.get("stored", 0.0) > HALF and row["separate"]]
    versions = f"timm {library().__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "# Architectures that nobody here wrote",
        "",
        f"Networks of [timm](https://github.com/huggingface/pytorch-image-models) by name ({versions}), with random "
        f"weights and {EXAMPLES} images of 64 × 64 pixels (one of 56 × 56), so that each takes about a minute at most. "
        "They are small variants. Some "
        "transformers are shortened to four blocks, and `swin_tiny` is narrower, too: `NETWORKS` in "
        "`tests/benchmarks/architectures.py`. CPU seconds of one thread.",
        "",
        "Made by `make bench-architectures`.",
        "",
    ]
    if gone:
        lines += [
            f"## Through trace, budget and extraction: {len(went)} of {len(gone)}",
            "",
            f"Two networks of other weights and classes, zipped to {100 * SIZE:.0f} % of their bytes, then extracted "
            "as plain modules; *difference*: of their outputs from the zipped network's, relative to the largest.",
            "",
            "| | trace of both, s | budget, s | stored | extraction, s | difference |",
            "|---|---|---|---|---|---|",
        ]
    for row in gone:
        if "extract" not in row:
            lines.append(f"| {row['name']} | | | | | {row['error']} |")
            continue
        lines.append(
            f"| {row['name']} | {row['trace']:.1f} | {row['budget']:.1f} | {100 * row['stored']:.1f} % "
            f"| {row['extract']:.1f} | {row['difference']:.0e} |"
        )
    lines += [
        "",
        f"## Zipped with themselves: {len(halved)} of {len(rows)} store about half",
        "",
        f"Of those that do not, {len(noted)} have notes that say which layers stay separate. *Separate*: layers with a "
        "note, by the part of all parameters that they have. Heads and normalisations are each task's in any network.",
        "",
        "| | parameters | layers | trace, s | zip, s | stored | difference | separate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        separate = "; ".join(f"{100 * part:.0f} %: {note}" for note, part in row.get("separate", {}).items())
        if "stored" not in row:
            lines.append(f"| {row['name']} | {row.get('parameters', 0):,} | | | | | | {row['error']} |")
            continue
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['layers']} | {row['trace']:.1f} | {row['zip']:.1f} "
            f"| {100 * row['stored']:.1f} % | {row['difference']:.0e} | {separate} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", choices=[own.name for own in NETWORKS], metavar="NAME", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = Records("architectures", "full", options.fresh)
    for part, (_, networks) in PARTS.items():
        for own in networks:
            if not records.has(name=own.name, part=part) and own.name in (options.names or [own.name]):
                row = measure(own, part)
                records.add(row)
                print(line(row), flush=True)
    found = [
        [row for own in networks for row in records.where(name=own.name, part=part)]
        for part, (_, networks) in PARTS.items()
    ]
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(*found))
    print(f"tables: {PAGE}")


if __name__ == "__main__":
    main()

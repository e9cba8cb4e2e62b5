"""Zip two VGG-16 of full size (138 million parameters each, 224×224 images) with every hidden neuron shared.

Run by `make bench-vgg16`. Weights are random, and so are the images: time and memory do not depend on what the networks
know. Prints time and memory of every step and fails above the limits. `--size 0.1` tries it in seconds, with a tenth of
every layer's width.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.merging.compatibility import check_compatible
from mtz_core.merging.matching import match
from mtz_core.merging.walk import merge
from mtz_core.network.tracing import trace
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.zipped.module import ZippedNetwork
from tests.support.networks import joined

MOST_MEMORY = 12 * 2**30
MOST_SECONDS = 3600
PIXELS = 224
BATCH = 8
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TASKS = ("first", "second")


class VGG16(nn.Module):
    """Simonyan and Zisserman 2015, configuration D, for images ``[batch, 3, 224, 224]``; widths times `size`."""

    def __init__(self, size: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        features: list[nn.Module] = []
        inputs = 3
        for stage in STAGES:
            for channels in stage:
                width = max(1, round(size * channels))
                features += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            features.append(nn.MaxPool2d(2))
        hidden = max(1, round(size * 4096))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            *(nn.Linear(inputs * (PIXELS // 2 ** len(STAGES)) ** 2, hidden), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
            nn.Linear(hidden, classes),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # signals keep their size through 16 layers

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def images(count: int, seed: int) -> Tensor:
    """Noise with structure at every scale, as in photographs: ``[count, 3, 224, 224]``, mean 0, variance 1."""
    draw = torch.Generator().manual_seed(seed)
    picture = torch.zeros(count, 3, PIXELS, PIXELS)
    for pixels in (7, 14, 28, 56, 112, 224):
        noise = torch.randn(count, 3, pixels, pixels, generator=draw) / pixels
        picture += F.interpolate(noise, size=(PIXELS, PIXELS), mode="bilinear")
    return (picture - picture.mean()) / picture.std()


def resident() -> int:
    """Bytes that this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Steps:
    """Prints a line for every step: its time, memory after it, the peak so far."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        print(f"{'step':<28}{'seconds':>9}{'GiB now':>9}{'peak':>7}  what", flush=True)

    def done(self, step: str, what: str = "") -> None:
        now = time.perf_counter()
        memory = f"{resident() / 2**30:>9.2f}{peak() / 2**30:>7.2f}"
        print(f"{step:<28}{now - self.last:>9.1f}{memory}  {what}".rstrip(), flush=True)
        self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun


def run(size: float, count: int, config: ZipConfig, steps: Steps) -> ZippedNetwork:
    """What `mtz_core.zip_networks` does, with a line for every step."""
    modules = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        modules[task] = VGG16(size)
        parameters = sum(p.numel() for p in modules[task].parameters())
        steps.done(f"build {task}", f"{parameters:,} parameters")
    batches = {task: as_batches(torch.split(images(count, i), BATCH), task) for i, task in enumerate(TASKS)}
    steps.done("images", f"{count} for each network")
    networks = {}
    for task, module in modules.items():
        networks[task] = trace(module, batches[task][0])
        steps.done(f"trace {task}", f"{len(networks[task].graph.nodes)} nodes")
    check_compatible(networks)
    moments = {}
    for task, network in networks.items():
        moments[task] = original_moments(network, batches[task], config)
        steps.done(f"collect {task}")
    pairings = {}
    for found in match(joined(networks, moments), config):
        pairings[found.group] = found.pairing
        steps.done(f"match {found.group}", f"{found.pairing.shared} shared, cost {found.cost:.4g}")
    del moments
    for step in merge(joined(networks, batches=batches), pairings, config):
        if isinstance(step, ZippedNetwork):
            steps.done("zipped network")
            return step
        neurons = " and ".join(str(width) for width in step.neurons.values())
        errors = " and ".join(f"{error:.3g}" for error in step.error.values())
        steps.done(f"merge {step.layer}", f"{neurons} neurons, {step.shared} shared, output error {errors}")
    raise AssertionError("merge ends with the zipped network")


def failures(zipped: ZippedNetwork, seconds: float) -> Iterator[str]:
    """What this run should have achieved and has not."""
    *hidden, _ = zipped.report.layers
    separate = sum(max(layer.neurons.values()) - layer.shared for layer in hidden)
    if separate:
        yield f"{separate} hidden neurons are not shared"
    if peak() > MOST_MEMORY:
        yield f"peak resident memory is above {MOST_MEMORY / 2**30:.0f} GiB"
    if seconds > MOST_SECONDS:
        yield f"it took more than {MOST_SECONDS} seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="every layer's width, as a fraction of VGG-16's")
    parser.add_argument("--images", type=int, default=32, help="calibration images for each network")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = Steps()
    zipped = run(options.size, options.images, ZipConfig(method="refit", share=1.0), steps)
    report, seconds = zipped.report, steps.seconds
    stored = f"stored {report.stored_parameters:,} of {report.original_parameters:,} parameters"
    print(
        f"{seconds:.0f} s with {torch.get_num_threads()} threads, peak resident memory {peak() / 2**30:.2f} GiB, "
        f"{stored} ({report.stored_fraction:.2%})"
    )
    if failed := list(failures(zipped, seconds)):
        sys.exit(f"error: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

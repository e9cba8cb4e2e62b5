"""A fleet of LeNet-300-100 for many small tasks, in groups of related pairs, made from the project's example data.

    python -m tests.benchmarks.fleet_of_models --out FOLDER --models 100 --name hundred

writes into the folder

    fleet/networks/NAME.safetensors    a network's state_dict
    fleet/data/NAME/SPLIT.parquet      its own images and labels
    fleet.yaml                         all models, and the groups

Two ancestors learn the ten classes of MNIST and of Fashion-MNIST. A group's two networks start from the hidden layers
of one of them, each with a new output layer, and are fine-tuned on a thousand images: on the same images with other
labels, on images of other classes, or on differently distorted images. Networks are trained side by side, a layer of
all of them being one batched product. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int64
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.build import encode_png
from tasks.data.examples import read_examples
from tasks.files import whole_file
from tasks.models.example_networks import lenet_300_100
from tests.benchmarks.fleets import DISTORTIONS, LABELLINGS

DATA = Path(__file__).parents[2] / "data"
SETS = ("mnist", "fashion-mnist")
CLASSES = 10
GROUP_SIZE = 2
USED = {"train": 6000, "validation": 1500, "test": 2000}
"""How many images of each set's splits are used; they are in random order there."""
COUNTS = {"train": 1000, "validation": 300, "test": 500}
"""How many of these each network has."""
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "collect": {"images": COUNTS["train"]},
    "match": {"share": 1.0},
    "retrain": {"images": COUNTS["train"], "iterations": 20},
}
"""What all groups have in place of the values of params.yaml."""

_NETWORK = "tasks.models.example_networks:lenet_300_100"
_TENSORS = tuple(lenet_300_100().state_dict())
_SIDE_BY_SIDE = 20
_THREADS = 2
_LEAST_CLASSES, _MOST_CLASSES = 4, 8

Kind = Literal["labels", "classes", "images"]
KINDS: tuple[Kind, ...] = ("labels", "classes", "images")


@dataclass(frozen=True)
class Member:
    """One network of the fleet.

    `label_of` has the label of every class of the set, -1 where images of that class are not used.
    """

    name: str
    group: str
    set: str
    kind: Kind
    task: str
    label_of: tuple[int, ...]
    distortion: str

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return max(self.label_of) + 1


@dataclass(frozen=True)
class Fleet:
    """What was made: the networks by name, and their errors on their test images, in percent."""

    name: str
    members: Mapping[str, Member]
    errors: Mapping[str, float]

    def groups(self) -> dict[str, list[str]]:
        """The names of each group's networks."""
        groups: dict[str, list[str]] = {}
        for member in self.members.values():
            groups.setdefault(member.group, []).append(member.name)
        return groups


@dataclass(frozen=True)
class _Source:
    """A split of one of the sets: its table, and its images as pixels ``[n, 1, 28, 28]``."""

    table: pa.Table
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Examples:
    """Images of several networks as rows ``[networks, n, 784]`` and their labels ``[networks, n]``."""

    images: Tensor
    labels: Tensor


def make_fleet(folder: Path, models: int = 100, seed: int = 0, name: str = "hundred", auto: bool = False) -> Fleet:
    """Write a fleet into `folder`: the networks, their data, and fleet.yaml.

    Args:
        models: how many networks; an even number.
        name: the fleet's.
        auto: leave the groups to the planner.
    """
    if models < GROUP_SIZE or models % GROUP_SIZE:
        raise ValueError(f"a fleet has groups of {GROUP_SIZE}, so {models} networks cannot be made")
    torch.set_num_threads(_THREADS)
    members = _members(models, seed)
    sources = {name: {split: _source(name, split) for split in COUNTS} for name in SETS}
    ancestors = _ancestors({name: splits["train"] for name, splits in sources.items()}, seed)
    errors: dict[str, float] = {}
    for start in range(0, models, _SIDE_BY_SIDE):
        some = members[start : start + _SIDE_BY_SIDE]
        splits = {split: _own_data(folder, some, sources, split, seed) for split in COUNTS}
        state = _descendants(some, ancestors, seed)
        classes = [member.classes for member in some]
        _train(state, splits["train"], classes, epochs=10, batch=100, peak=2e-3, seed=seed)
        for member, network in zip(some, _unstacked(state, classes), strict=True):
            _save(folder, member.name, network)
        wrong = _logits(state, splits["test"].images, classes).argmax(2) != splits["test"].labels
        errors |= zip((member.name for member in some), (100 * wrong.double().mean(1)).tolist(), strict=True)
    fleet = Fleet(name, {member.name: member for member in members}, errors)
    write_fleet_file(folder, fleet, auto)
    return fleet


def fine_tune(folder: Path, names: Sequence[str], seed: int = 1) -> None:
    """Train some networks of a fleet in `folder` for one more epoch each: their files change, nothing else does."""
    torch.set_num_threads(_THREADS)
    for name in names:
        network = load_file(_weights(folder, name))
        classes = len(network[_TENSORS[-1]])
        images, labels = read_examples(folder / _data(name), "train")
        state = [network[tensor][None].clone() for tensor in _TENSORS]
        _train(state, _Examples(images.flatten(1)[None], labels[None]), [classes], 1, batch=100, peak=1e-3, seed=seed)
        _save(folder, name, _unstacked(state, [classes])[0])


def write_fleet_file(folder: Path, fleet: Fleet, auto: bool = False) -> None:
    """Write fleet.yaml: every model and where it comes from, and which are zipped together, unless that is planned."""
    content = {
        "version": 2,
        "name": fleet.name,
        "models": {member.name: _declared(member) for member in fleet.members.values()},
        "defaults": {block: dict(values) for block, values in SETTINGS.items()},
        "groups": "auto" if auto else {group: {"models": names} for group, names in fleet.groups().items()},
    }
    with whole_file(folder / "fleet.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))


def _declared(member: Member) -> dict[str, Any]:
    return {
        "source": _weights(Path(), member.name).as_posix(),
        "network": _NETWORK,
        "arguments": {"classes": member.classes},
        "data": _data(member.name).as_posix(),
        "tags": [member.set, member.kind],
    }


def _weights(folder: Path, name: str) -> Path:
    return folder / "fleet" / "networks" / f"{name}.safetensors"


def _data(name: str) -> Path:
    return Path("fleet", "data", name)


def _members(models: int, seed: int) -> list[Member]:
    members = []
    for number in range(models // GROUP_SIZE):
        kind = KINDS[number % len(KINDS)]
        of = SETS[number // len(KINDS) % len(SETS)]
        drawing = np.random.default_rng([seed, number])
        for place, (task, label_of, distortion) in enumerate(_tasks(kind, drawing)):
            name = f"m{GROUP_SIZE * number + place:03d}"
            members.append(Member(name, f"g{number:02d}", of, kind, task, label_of, distortion))
    return members


def _tasks(kind: Kind, drawing: np.random.Generator) -> list[tuple[str, tuple[int, ...], str]]:
    """A name, the label of every class, and a distortion, for each network of one group."""
    if kind == "labels":
        names = drawing.choice(list(LABELLINGS), GROUP_SIZE, replace=False).tolist()
        return [(name, LABELLINGS[name], "plain") for name in names]
    if kind == "images":
        names = drawing.choice(list(DISTORTIONS), GROUP_SIZE, replace=False).tolist()
        return [(name, tuple(range(CLASSES)), name) for name in names]
    tasks = []
    for _ in range(GROUP_SIZE):
        count = drawing.integers(_LEAST_CLASSES, _MOST_CLASSES + 1)
        used = np.sort(drawing.choice(CLASSES, count, replace=False)).tolist()
        label_of = tuple(used.index(c) if c in used else -1 for c in range(CLASSES))
        tasks.append(("classes-" + "".join(map(str, used)), label_of, "plain"))
    return tasks


def _source(name: str, split: str) -> _Source:
    table = pq.read_table(DATA / name / f"{split}.parquet").slice(0, USED[split])
    encoded = table.column("image").combine_chunks().field("bytes").to_pylist()
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in encoded]))
    labels = torch.from_numpy(table.column("label").to_numpy().copy())
    return _Source(table, pixels[:, None].to(torch.float32).div_(255), labels)


def _own_data(
    folder: Path, members: Sequence[Member], sources: Mapping[str, Mapping[str, _Source]], split: str, seed: int
) -> _Examples:
    """Write the networks' files of one split; return the same examples."""
    images, labels = [], []
    for member in members:
        source = sources[member.set][split]
        label_of = torch.tensor(member.label_of)[source.labels]
        usable = torch.nonzero(label_of >= 0).flatten().numpy()
        # Networks of one group with the same usable images get the same ones.
        drawing = np.random.default_rng([seed, int(member.group[1:]), list(COUNTS).index(split)])
        rows = np.sort(drawing.choice(usable, COUNTS[split], replace=False))
        own, encoded = _distorted(source, rows, member.distortion)
        images.append(own.flatten(1))
        labels.append(label_of[rows])
        table = pa.table({"image": encoded, "label": pa.array(label_of[rows].numpy())})
        with whole_file(folder / _data(member.name) / f"{split}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
    return _Examples(torch.stack(images), torch.stack(labels))


def _distorted(source: _Source, rows: np.ndarray, distortion: str) -> tuple[Tensor, pa.ChunkedArray]:
    """Pixels ``[n, 1, 28, 28]`` as they are read back, and the images encoded; undistorted ones keep their bytes."""
    encoded = source.table.column("image").take(rows)
    if distortion == "plain":
        return source.images[rows], encoded
    pixels = DISTORTIONS[distortion](source.images[rows]).mul(255).round().to(torch.uint8)
    structs = [
        {"bytes": encode_png(picture[0]), "path": original["path"]}
        for picture, original in zip(pixels.numpy(), encoded.to_pylist(), strict=True)
    ]
    return pixels.to(torch.float32).div_(255), pa.chunked_array([pa.array(structs, encoded.type)])


def _ancestors(training: Mapping[str, _Source], seed: int) -> dict[str, list[Tensor]]:
    """A network for the ten classes of each set."""
    networks = []
    for number in range(len(training)):
        torch.manual_seed(1000 * seed + number)
        networks.append(list(lenet_300_100().state_dict().values()))
    state = [torch.stack(tensors) for tensors in zip(*networks, strict=True)]
    examples = _Examples(
        torch.stack([source.images.flatten(1) for source in training.values()]),
        torch.stack([source.labels for source in training.values()]),
    )
    _train(state, examples, [CLASSES] * len(training), epochs=5, batch=300, peak=3e-3, seed=seed)
    return {name: [tensor[number] for tensor in state] for number, name in enumerate(training)}


def _descendants(members: Sequence[Member], ancestors: Mapping[str, Sequence[Tensor]], seed: int) -> list[Tensor]:
    """The hidden layers of the ancestors, with new output layers, whose rows beyond a network's classes are 0."""
    networks = []
    for member in members:
        torch.manual_seed(1000 * seed + 10 + int(member.name[1:]))
        head = [F.pad(t, (0, 0) * (t.ndim - 1) + (0, CLASSES - len(t))) for t in _new_head(member.classes)]
        networks.append([*ancestors[member.set][:-2], *head])
    return [torch.stack(tensors) for tensors in zip(*networks, strict=True)]


def _new_head(classes: int) -> list[Tensor]:
    return list(lenet_300_100(classes).state_dict().values())[-2:]


def _train(
    state: Sequence[Tensor],
    examples: _Examples,
    classes: Sequence[int],
    epochs: int,
    batch: int,
    peak: float,
    seed: int,
) -> None:
    """Train networks side by side, in place: Adam on cross-entropy, with a one-cycle schedule that rises to `peak`."""
    for tensor in state:
        tensor.requires_grad_()
    count = examples.labels.shape[1]
    optimiser = torch.optim.Adam(state)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=epochs * (count // batch))
    shuffling = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(count, generator=shuffling), batch)[: count // batch]:
            optimiser.zero_grad(set_to_none=True)
            logits = _logits(state, examples.images[:, index], classes)
            # A sum over networks, so that none feels how many others there are.
            loss = F.cross_entropy(logits.flatten(0, 1), examples.labels[:, index].flatten(), reduction="sum") / batch
            loss.backward()
            optimiser.step()
            schedule.step()
    for tensor in state:
        tensor.requires_grad_(False)


def _logits(
    state: Sequence[Tensor], x: Float[Tensor, "networks n pixels"], classes: Sequence[int]
) -> Float[Tensor, "networks n classes"]:
    """The outputs of all networks for their own images; minus infinity beyond a network's classes."""
    *hidden, (weight, bias) = zip(state[::2], state[1::2], strict=True)
    for w, b in hidden:
        x = torch.baddbmm(b[:, None], x, w.mT).relu()
    logits = torch.baddbmm(bias[:, None], x, weight.mT)
    beyond: Int64[Tensor, "networks classes"] = torch.arange(logits.shape[2])[None] >= torch.tensor(classes)[:, None]
    return logits.masked_fill(beyond[:, None], -torch.inf)


def _unstacked(state: Sequence[Tensor], classes: Sequence[int]) -> list[dict[str, Tensor]]:
    """Each network's own state_dict, its output layer cut to its classes."""
    networks = []
    for number, count in enumerate(classes):
        network = dict(zip(_TENSORS, (tensor[number] for tensor in state), strict=True))
        for name in _TENSORS[-2:]:
            network[name] = network[name][:count]
        networks.append(network)
    return networks


def _save(folder: Path, name: str, network: Mapping[str, Tensor]) -> None:
    with whole_file(_weights(folder, name)) as temporary:
        save_file({tensor: value.contiguous() for tensor, value in network.items()}, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--models", type=int, default=100, help="networks, two in each group")
    parser.add_argument("--name", default="hundred", help="the fleet's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--auto", action="store_true", help="leave the groups to the planner")
    options = parser.parse_args()
    start = time.perf_counter()
    fleet = make_fleet(options.out, options.models, options.seed, options.name, options.auto)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (options.out / "fleet").rglob("*") if path.is_file())
    errors = sorted(fleet.errors.values())
    print(
        f"{len(fleet.members)} networks in {len(fleet.groups())} groups, {size / 1e6:.0f} MB, {seconds:.0f} s; "
        f"test error {errors[len(errors) // 2]:.1f} % in the middle, {errors[-1]:.1f} % at most"
    )


if __name__ == "__main__":
    main()

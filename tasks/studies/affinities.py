"""What every two models of a fleet have in common, from their statistics files; known pairs are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from mtz_core.grouping.affinity import Affinities, Affinity, Comparer, Profile
from mtz_core.network.graph import Network
from tasks.artifacts.statistics import read_moments, read_sensitivities
from tasks.code import code_digest
from tasks.files import InvalidArtifact, read_json, write_json
from tasks.progress import show_progress

MEMORY = 4 * 2**30
"""Bytes of models that are held at once."""

_REPORTS = 10
"""So often a long comparison tells how far it is, and keeps what it has."""


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """A model as comparisons need it: its traced network, or what loads it, and the file that `hessians` wrote.

    `digest` stands for the content of both: whatever changes the weights or the statistics must change it.
    """

    name: str
    network: Network | Callable[[], Network]
    hessians: Path
    digest: str
    tags: frozenset[str] = field(default_factory=frozenset)

    def profile(self) -> Profile:
        """Everything loaded. Raises `MtzError` in its kinds."""
        network = self.network if isinstance(self.network, Network) else self.network()
        moments, sensitivity = read_moments(self.hessians), read_sensitivities(self.hessians)
        for node in network.graph.layers:
            found = moments[node.name].inputs if node.name in moments and node.name in sensitivity else None
            inputs = network.columns(node)
            if found != inputs:
                raise InvalidArtifact(
                    f"{self.hessians} does not fit {self.name}: layer {node.name!r} has {inputs} inputs, but {found} "
                    "in the file (None: not there). Run collect and hessians again."
                )
        return Profile.of(network, moments, sensitivity)


_Pair = tuple[str, str]


def compare(
    models: Mapping[str, ModelStatistics],
    cache: Path,
    on_progress: Callable[[str], None] = show_progress,
    memory: int = MEMORY,
) -> Affinities:
    """Compare every two models; `cache` keeps what was found, by digests, for as long as a model is there.

    At most `memory` bytes of models are held at once, but at least two models: what does not fit is read again for
    every block of models that does. Raises `MtzError` in its kinds.
    """
    work = _Work({name: models[name] for name in sorted(models)}, cache, on_progress)
    for pair, found in _compared(work.missing(), work.load, memory):
        work.add(pair, found)
    return work.result()


class _Work:
    """What is known already, and what becomes known: by the models' digests."""

    def __init__(self, models: Mapping[str, ModelStatistics], cache: Path, on_progress: Callable[[str], None]) -> None:
        self._models, self._cache, self._on_progress = models, cache, on_progress
        known = self._known()
        present = {model.digest for model in models.values()}
        self._pairs = {pair: found for pair, found in known.pairs.items() if present.issuperset(pair)}
        self._bytes = {digest: size for digest, size in known.bytes.items() if digest in present}
        self._wanted = self._done = 0

    def _known(self) -> Affinities:
        if self._cache.exists():
            try:
                return read_affinities(self._cache, _method())
            except InvalidArtifact as error:
                self._on_progress(f"all models are compared anew: {error}")
        return Affinities({}, {}, {})

    def _key(self, pair: _Pair) -> _Pair:
        first, second = sorted(self._models[name].digest for name in pair)
        return first, second

    def _turned(self, pair: _Pair, found: Affinity) -> Affinity:
        """An affinity of models by name as one by digest, and the other way round."""
        return found if self._models[pair[0]].digest == self._key(pair)[0] else found.reversed

    def missing(self) -> list[_Pair]:
        """The pairs that are not known, one of each two contents."""
        wanted = {self._key(pair): pair for pair in combinations(self._models, 2) if self._key(pair) not in self._pairs}
        self._wanted = len(wanted)
        if wanted:
            total = len(self._models) * (len(self._models) - 1) // 2
            self._on_progress(f"{len(wanted):,} of {total:,} pairs of models to compare")
        return list(wanted.values())

    def load(self, name: str) -> Profile:
        """A model's profile; its size is noted."""
        profile = self._models[name].profile()
        self._bytes[self._models[name].digest] = profile.network.bytes
        return profile

    def add(self, pair: _Pair, found: Affinity) -> None:
        """Note a pair; from time to time tell how far it is, and keep all."""
        self._pairs[self._key(pair)] = self._turned(pair, found)
        self._done += 1
        if self._done * _REPORTS // self._wanted > (self._done - 1) * _REPORTS // self._wanted:
            self._on_progress(f"{self._done:,} of {self._wanted:,} pairs compared")
            write_affinities(self._cache, Affinities(self._bytes, {}, self._pairs), _method())

    def result(self) -> Affinities:
        """All pairs by the models' names."""
        for name, model in self._models.items():
            if model.digest not in self._bytes:  # there is nothing to compare it with
                self.load(name)
        return Affinities(
            {name: self._bytes[model.digest] for name, model in self._models.items()},
            {name: model.tags for name, model in self._models.items()},
            {pair: self._turned(pair, self._pairs[self._key(pair)]) for pair in combinations(self._models, 2)},
        )


def _compared(pairs: Sequence[_Pair], load: Callable[[str], Profile], memory: int) -> Iterator[tuple[_Pair, Affinity]]:
    """Every pair. As many models as memory allows are held, and the others pass by them one at a time."""
    comparer = Comparer()
    left: dict[str, set[str]] = {name: set() for name in sorted({name for pair in pairs for name in pair})}
    for one, other in pairs:
        left[one].add(other)
        left[other].add(one)
    while any(left.values()):
        block: dict[str, Profile] = {}
        held, full = 0, False
        for name, partners in left.items():
            if not partners or (full and partners.isdisjoint(block)):
                continue
            profile = load(name)
            for other in [other for other in block if other in partners]:
                yield (other, name), comparer.compare(block[other], profile)
                partners.remove(other)
                left[other].remove(name)
            if not full:
                block[name] = profile
                held += profile.bytes
                largest = max(one.bytes for one in block.values())
                full = held + 2 * largest > memory  # room for one more, and for one that passes by


def _method() -> str:
    """What comparisons depend on beside the models: the code that makes them."""
    return code_digest(__name__)


def write_affinities(path: Path, affinities: Affinities, method: str = "") -> None:
    """Affinities as JSON, and the method by which they were found."""
    models = affinities.models
    number = {model: i for i, model in enumerate(models)}
    write_json(
        path,
        {
            "method": method,
            "models": [[m, affinities.bytes[m], sorted(affinities.tags.get(m, ()))] for m in models],
            "pairs": [
                [number[a], number[b], pair.similarity, *pair.damage, pair.saved, pair.why]
                for (a, b), pair in sorted(affinities.pairs.items())
            ],
        },
    )


def read_affinities(path: Path, method: str = "") -> Affinities:
    """The affinities that `write_affinities` wrote. Raises `InvalidArtifact`, also where the method was another."""
    content = read_json(path)
    try:
        if content["method"] != method:
            raise InvalidArtifact(f"{path} was made by another version of the comparison. Compare again.")
        models = content["models"]
        return Affinities(
            {str(name): int(size) for name, size, _ in models},
            {str(name): frozenset(tags) for name, _, tags in models if tags},
            {(models[a][0], models[b][0]): _affinity(*values) for a, b, *values in content["pairs"]},
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidArtifact(f"{path} does not hold affinities: {error!r}. Compare again.") from error


def _affinity(similarity: Any, first: Any, second: Any, saved: Any, why: Any) -> Affinity:
    return Affinity(float(similarity), (float(first), float(second)), int(saved), str(why))

"""Affinities of every two models of a fleet, from their statistics files; known pairs are not computed again."""

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
"""How many times a long comparison reports its progress and saves its results."""


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """A model as comparisons need it.

    Attributes:
        name: The model's name.
        network: The traced network, or a function that loads it.
        hessians: The file that the stage `hessians` wrote.
        digest: Stands for the content of both: it must change whenever the weights or the statistics change.
        tags: The model's tags.
    """

    name: str
    network: Network | Callable[[], Network]
    hessians: Path
    digest: str
    tags: frozenset[str] = field(default_factory=frozenset)

    def profile(self) -> Profile:
        """Load the network, its second moments and its sensitivities.

        Returns:
            The profile for comparisons.

        Raises:
            InvalidArtifact: The statistics are damaged, or do not fit the network.
            MtzError: The network cannot be loaded.
        """
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
    """Compare every two models.

    At most `memory` bytes of models are held at once, but at least two models: what does not fit is read again for
    every block of models that does.

    Args:
        models: The models by name.
        cache: The file that keeps results, by digest, for as long as a model exists.
        on_progress: Receives progress messages.
        memory: Bytes of models to hold at once.

    Returns:
        The affinities of all pairs.

    Raises:
        MtzError: A model cannot be loaded, or its statistics are damaged.
    """
    work = _Work({name: models[name] for name in sorted(models)}, cache, on_progress)
    for pair, found in _compared(work.missing(), work.load, memory):
        work.add(pair, found)
    return work.result()


class _Work:
    """The pairs that are known, by the models' digests, and those that are still to be compared."""

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
        """Convert an affinity between the order of the models' names and the order of their digests."""
        return found if self._models[pair[0]].digest == self._key(pair)[0] else found.reversed

    def missing(self) -> list[_Pair]:
        """Return the pairs that are not known, one of each two contents."""
        wanted = {self._key(pair): pair for pair in combinations(self._models, 2) if self._key(pair) not in self._pairs}
        self._wanted = len(wanted)
        if wanted:
            total = len(self._models) * (len(self._models) - 1) // 2
            self._on_progress(f"{len(wanted):,} of {total:,} pairs of models to compare")
        return list(wanted.values())

    def load(self, name: str) -> Profile:
        """Return a model's profile and record its size."""
        profile = self._models[name].profile()
        self._bytes[self._models[name].digest] = profile.network.bytes
        return profile

    def add(self, pair: _Pair, found: Affinity) -> None:
        """Record a pair; from time to time, report progress and save everything."""
        self._pairs[self._key(pair)] = self._turned(pair, found)
        self._done += 1
        if self._done * _REPORTS // self._wanted > (self._done - 1) * _REPORTS // self._wanted:
            self._on_progress(f"{self._done:,} of {self._wanted:,} pairs compared")
            write_affinities(self._cache, Affinities(self._bytes, {}, self._pairs), _method())

    def result(self) -> Affinities:
        """Return all pairs by the models' names."""
        for name, model in self._models.items():
            if model.digest not in self._bytes:  # it is in no pair
                self.load(name)
        return Affinities(
            {name: self._bytes[model.digest] for name, model in self._models.items()},
            {name: model.tags for name, model in self._models.items()},
            {pair: self._turned(pair, self._pairs[self._key(pair)]) for pair in combinations(self._models, 2)},
        )


def _compared(pairs: Sequence[_Pair], load: Callable[[str], Profile], memory: int) -> Iterator[tuple[_Pair, Affinity]]:
    """Yield every pair; hold as many models as memory allows, and load the others one at a time."""
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
                full = held + 2 * largest > memory  # room for one more, and for one that is loaded meanwhile


def _method() -> str:
    """Return what comparisons depend on beside the models: the digest of their code."""
    return code_digest(__name__)


def write_affinities(path: Path, affinities: Affinities, method: str = "") -> None:
    """Write affinities, and the method by which they were found, as JSON."""
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
    """Read the affinities that `write_affinities` wrote.

    Args:
        path: The file.
        method: The method by which they must have been found.

    Returns:
        The affinities.

    Raises:
        InvalidArtifact: The file is missing or damaged, or the method was another.
    """
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

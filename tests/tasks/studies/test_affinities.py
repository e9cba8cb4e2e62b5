"""Statistics files to affinities: what is known stays known, what changed is compared again, memory is bounded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mtz_core import ZipConfig
from mtz_core.grouping.affinity import Affinities, Comparer
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from tasks import code
from tasks.artifacts.statistics import write_moments
from tasks.code import sources_of
from tasks.files import InvalidArtifact, sha256
from tasks.studies import affinities
from tasks.studies.affinities import ModelStatistics, compare, read_affinities, write_affinities

pytestmark = pytest.mark.slow

NAMES = ("anna", "berta", "clara", "dora")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelStatistics]:
    """Four small models; the last one of another topology."""
    folder = tmp_path_factory.mktemp("hessians")
    found = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        deeper = [nn.Linear(7, 7), nn.ReLU()] if name == "dora" else []
        network = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), *deeper, nn.Linear(7, 2 + seed)).eval()
        batches = as_batches(torch.randn(40, 9), name)
        traced = trace(network, batches[0][:2])
        file = folder / f"{name}.safetensors"
        write_moments(file, original_moments(traced, batches, ZipConfig()), sensitivities(traced, batches))
        found[name] = ModelStatistics(name, traced, file, sha256(file), frozenset({name[0]}))
    return found


def loads(models: Mapping[str, ModelStatistics], loaded: list[str]) -> dict[str, ModelStatistics]:
    """The same models, noting when one's network is loaded."""

    def lazily(model: ModelStatistics) -> ModelStatistics:
        def load() -> Network:
            loaded.append(model.name)
            assert isinstance(model.network, Network)
            return model.network

        return replace(model, network=load)

    return {name: lazily(model) for name, model in models.items()}


@pytest.fixture
def said() -> list[str]:
    return []


def same(found: Affinities, other: Affinities) -> bool:
    return (found.bytes, found.tags, found.pairs) == (other.bytes, other.tags, other.pairs)


def test_pairs_are_what_the_core_finds_in_whatever_order_the_models_come(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str]
) -> None:
    found = compare(models, tmp_path / "pairs.json", said.append)
    assert found.models == NAMES
    assert found.bytes["anna"] == 4 * (9 * 7 + 7 + 7 * 2 + 2)
    assert found.tags["berta"] == {"b"}
    expected = Comparer().compare(models["anna"].profile(), models["berta"].profile())
    assert found.of("anna", "berta").similarity == pytest.approx(expected.similarity, abs=1e-5)
    assert found.of("anna", "berta").damage == pytest.approx(expected.damage, rel=1e-4)
    assert found.of("berta", "anna") == found.of("anna", "berta").reversed
    assert not found.of("anna", "dora").comparable
    assert said[0] == "6 of 6 pairs of models to compare" and said[-1] == "6 of 6 pairs compared"
    backwards = compare({name: models[name] for name in reversed(NAMES)}, tmp_path / "others.json", said.append)
    assert same(found, backwards)


def test_only_pairs_of_changed_models_are_compared_again(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str]
) -> None:
    cache = tmp_path / "cache" / "pairs.json"
    first = compare(models, cache, said.append)
    written = cache.read_bytes()
    loaded: list[str] = []
    said.clear()
    assert same(first, compare(loads(models, loaded), cache, said.append))
    assert not loaded and not said and cache.read_bytes() == written
    changed = dict(models) | {"clara": replace(models["clara"], digest="0" * 64)}
    again = compare(loads(changed, loaded), cache, said.append)
    assert said[0] == "3 of 6 pairs of models to compare"
    assert again.of("clara", "anna").damage == pytest.approx(first.of("clara", "anna").damage, rel=1e-4)
    assert len(loaded) == len(set(loaded)) == 4
    renamed = {{"anna": "zoe"}.get(name, name): model for name, model in changed.items()}
    loaded.clear()
    found = compare(loads(renamed, loaded), cache, said.append)
    assert not loaded
    assert found.of("zoe", "berta") == again.of("anna", "berta")


@pytest.mark.long
@pytest.mark.parametrize("memory", [0, 20_000])
def test_what_does_not_fit_into_memory_is_read_again(
    models: Mapping[str, ModelStatistics],
    tmp_path: Path,
    said: list[str],
    memory: int,
) -> None:
    whole = compare(models, tmp_path / "whole.json", said.append)
    loaded: list[str] = []
    assert same(whole, compare(loads(models, loaded), tmp_path / "blocks.json", said.append, memory=memory))
    assert loaded == (
        ["anna", "berta", "clara", "dora", "berta", "clara", "dora", "clara", "dora"] if not memory else [*NAMES]
    )


def test_models_of_the_same_content_are_compared_once(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str]
) -> None:
    twins = {name: models[name if name != "twin" else "anna"] for name in ("anna", "twin", "berta")}
    found = compare(twins, tmp_path / "pairs.json", said.append)
    assert said[0] == "2 of 3 pairs of models to compare"
    assert found.of("anna", "twin").similarity == pytest.approx(1.0, abs=1e-4)
    assert found.of("anna", "berta") == found.of("twin", "berta")
    assert found.bytes["twin"] == found.bytes["anna"]


def test_a_model_without_others_has_a_size(models: Mapping[str, ModelStatistics], tmp_path: Path) -> None:
    found = compare({"anna": models["anna"]}, tmp_path / "pairs.json")
    assert found.bytes == {"anna": models["anna"].profile().network.bytes}
    assert not found.pairs


def test_an_interrupted_comparison_goes_on_where_it_was(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str]
) -> None:
    cache = tmp_path / "pairs.json"

    def stop(text: str) -> None:
        if text.startswith("4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(models, cache, stop)
    compare(models, cache, said.append)
    assert said[0] == "3 of 6 pairs of models to compare"


@pytest.mark.parametrize("damage", ["not JSON", "{}", '{"method": "another", "models": [], "pairs": []}'])
def test_a_cache_that_cannot_be_used_is_told_and_made_anew(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str], damage: str
) -> None:
    cache = tmp_path / "pairs.json"
    cache.write_text(damage)
    pair = {name: models[name] for name in NAMES[:2]}
    found = compare(pair, cache, said.append)
    assert said[0].startswith(f"all models are compared anew: {cache}")
    said.clear()
    assert same(found, compare(pair, cache, said.append))
    assert not said


def test_the_code_of_the_comparison_is_part_of_what_is_known(
    models: Mapping[str, ModelStatistics], tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {name: models[name] for name in NAMES[:2]}
    compare(pair, tmp_path / "pairs.json", said.append)
    linalg = tmp_path / "linalg.py"
    linalg.write_bytes(sources_of(affinities.__name__)["mtz_core.statistics.linalg"].read_bytes() + b"\n")
    monkeypatch.setattr(
        code, "_file", lambda module, found=code._file: linalg if module.endswith(".linalg") else found(module)
    )
    compare(pair, tmp_path / "pairs.json", said.append)
    assert any("another version" in line for line in said)


def test_affinities_are_written_and_read(models: Mapping[str, ModelStatistics], tmp_path: Path) -> None:
    found = compare(models, tmp_path / "pairs.json")
    write_affinities(tmp_path / "found.json", found)
    assert same(found, read_affinities(tmp_path / "found.json"))
    with pytest.raises(InvalidArtifact, match="Run the stage"):
        read_affinities(tmp_path / "nothing.json")


def test_statistics_of_another_network_are_refused(models: Mapping[str, ModelStatistics], tmp_path: Path) -> None:
    wrong = {"clara": models["clara"], "dora": replace(models["dora"], hessians=models["anna"].hessians)}
    with pytest.raises(InvalidArtifact, match=r"does not fit dora: layer '4' has 8 inputs, but None .* Run collect"):
        compare(wrong, tmp_path / "pairs.json")

"""Tests of networks from exported programs: they compute and zip like their originals, and no file can run code."""

import copy
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core.network.tracing import trace
from tasks.models.programs import InvalidProgram, exported, extract_weights
from tests.support.several import numbers, two_heads

BATCH = ({0: torch.export.Dim("batch")},)


class Small(nn.Module):
    """Convolution, normalisation, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(6 * 3 * 3, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(nn.functional.gelu(self.hidden(features.reshape(features.shape[0], -1)), approximate="tanh"))


class Odd(nn.Module):
    """A tied weight, a buffer that is not stored, a constant, several outputs of one operator, sums of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 6), nn.Linear(8, 6)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("shift", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor) and isinstance(self.shift, Tensor)
        h = (self.one(x) + self.other(x)) * self.scale + self.shift + torch.tensor([1.0, 2, 3, 4, 5, 6])
        a, b = h.chunk(2, dim=1)
        h = torch.cat([b, a], 1).view(x.shape[0] * 2, 3).view(x.shape[0], -1)
        return h.to(torch.float32).masked_fill(h < 0, float("-inf")).clamp(min=-1)


def save(network: nn.Module, example: Any, path: Path, shapes: Any = BATCH) -> None:
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {task: Small().eval() for task in "ab"}


@pytest.fixture(scope="module")
def programs(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("programs")
    for task, network in networks.items():
        save(network, torch.rand(2, 1, 8, 8), folder / f"{task}.pt2")
    return {task: folder / f"{task}.pt2" for task in networks}


def test_a_program_computes_what_its_network_does(networks: dict[str, nn.Module], programs: dict[str, Path]) -> None:
    network = exported(str(programs["a"]))
    for batch in (1, 7):
        x = torch.rand(batch, 1, 8, 8)
        assert torch.equal(network(x), networks["a"](x))


def test_weights_are_those_of_the_network(networks: dict[str, nn.Module], programs: dict[str, Path]) -> None:
    weights, expected = extract_weights(programs["a"]), networks["a"].state_dict()
    assert weights.keys() == exported(str(programs["a"])).state_dict().keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_programs_are_zipped_like_their_networks(networks: dict[str, nn.Module], programs: dict[str, Path]) -> None:
    loaded = {task: exported(str(path)) for task, path in programs.items()}
    images = torch.rand(64, 1, 8, 8)
    calibration = {"a": images, "b": images}
    zipped = mtz_core.zip_networks(loaded, calibration=calibration)
    expected = mtz_core.zip_networks(networks, calibration=calibration)
    for task in "ab":
        assert torch.equal(zipped(images, task=task), expected(images, task=task))
    assert zipped.report == expected.report


@pytest.mark.parametrize("by_name", [False, True])
@torch.no_grad()
def test_several_inputs_and_outputs_are_those_of_the_network(tmp_path: Path, by_name: bool) -> None:
    network, x, batch = two_heads(1), dict(zip(("x", "more"), numbers(5), strict=True)), torch.export.Dim("batch")
    example, shapes = (
        (((), x), {name: {0: batch} for name in x}) if by_name else ((tuple(x.values()),), ({0: batch},) * 2)
    )
    torch.export.save(torch.export.export(network, *example, dynamic_shapes=shapes), tmp_path / "heads.pt2")
    program = exported(str(tmp_path / "heads.pt2"))
    expected = network(**x)
    for found in (program(**x), program(*x.values()), copy.deepcopy(program)(**x)):
        assert torch.equal(found["logits"], expected["logits"])
        assert torch.equal(found["found"][0], expected["found"][0]) and found["found"][1] is None
    graph, own = trace(program, x).graph, trace(network, x).graph
    assert (graph.form, [*graph.endings], graph.hidden_widths) == (own.form, [*own.endings], own.hidden_widths)
    with torch.no_grad():
        copied = copy.deepcopy(program)
        copied.get_parameter("boxes.weight").zero_()
        assert not torch.equal(copied(**x)["found"][0], expected["found"][0])


class Held(nn.Module):
    """Returns its output in something, or is given its input in something."""

    def __init__(self, hold: Callable[[Tensor], Any], take: Callable[[Any], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layer, self.hold, self.take = nn.Linear(2, 2), hold, take

    def forward(self, x: Any) -> Any:
        return self.hold(self.layer(self.take(x)))


@pytest.mark.parametrize(
    ("network", "example", "said"),
    [
        (
            Held(lambda y: OrderedDict(a=y)),
            torch.rand(2, 2),
            "it returns a collections.OrderedDict, not tensors in tuples",
        ),
        (Held(lambda y: {1: y}), torch.rand(2, 2), "with texts for keys"),
        (Held(lambda y: (y, 3)), torch.rand(2, 2), "it does not map tensors to tensors"),
        (
            Held(lambda y: y, lambda x: x["a"] + x["b"]),
            {"a": torch.rand(2, 2), "b": torch.rand(2, 2)},
            "inside of others",
        ),
    ],
    ids=["dict of another kind", "numbers for keys", "a number", "a dict for an input"],
)
def test_inputs_and_outputs_that_are_refused(tmp_path: Path, network: nn.Module, example: Any, said: str) -> None:
    batch = {0: torch.export.Dim("batch")}
    shapes = (dict.fromkeys(example, batch) if isinstance(example, dict) else batch,)
    save(network, example, tmp_path / "a.pt2", shapes)
    with pytest.raises(InvalidProgram, match=said):
        exported(str(tmp_path / "a.pt2"))


def test_what_tensors_may_be_like(tmp_path: Path) -> None:
    torch.manual_seed(0)
    odd = Odd().eval()
    save(odd, torch.rand(2, 8), tmp_path / "odd.pt2")
    network, x = exported(str(tmp_path / "odd.pt2")), torch.rand(5, 8)
    assert torch.equal(network(x), odd(x))
    assert network.state_dict().keys() == odd.state_dict().keys()
    assert network.get_parameter("one.weight") is network.get_parameter("other.weight")


def test_a_batch_of_one_size_is_refused(tmp_path: Path) -> None:
    save(nn.Linear(2, 2), torch.rand(2, 2), tmp_path / "static.pt2", shapes=None)
    with pytest.raises(InvalidProgram, match=r"static\.pt2: it accepts batches of one size only\. .*Dim\('batch'\)"):
        exported(str(tmp_path / "static.pt2"))


def test_a_program_that_trains_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    save(network, torch.rand(4, 2), tmp_path / "training.pt2")
    with pytest.raises(InvalidProgram, match=r"aten\.batch_norm\.default runs as in training\. .*network\.eval\(\)"):
        exported(str(tmp_path / "training.pt2"))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no such file"), (b"", "is no whole archive"), (b"PK\3\4" * 9, "is no whole")]
)
def test_what_is_no_archive(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "a.pt2").write_bytes(content)
    with pytest.raises(InvalidProgram, match=rf"a\.pt2.*{said}"):
        exported(str(tmp_path / "a.pt2"))


def test_a_truncated_file(programs: dict[str, Path], tmp_path: Path) -> None:
    content = programs["a"].read_bytes()
    (tmp_path / "a.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidProgram, match="is no whole archive"):
        exported(str(tmp_path / "a.pt2"))


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    return tmp_path / "sprung"


def rebuilt(source: Path, target: Path, changes: Mapping[str, bytes | Callable[[Any], object] | None]) -> str:
    """A copy of an archive with other files in it: by content, by a change of the JSON, or removed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        files = {name.removeprefix(f"{root}/"): old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            if change is None:
                del files[name]
            elif isinstance(change, bytes):
                files[name] = change
            else:
                value = json.loads(files[name])
                change(value)
                files[name] = json.dumps(value).encode()
        for name, content in files.items():
            new.writestr(f"{root}/{name}", content)
    return str(target)


def torch_pickle(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


MODEL, WEIGHTS, CONSTANTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)


def test_the_trap_is_sprung_by_torch(programs: dict[str, Path], tmp_path: Path, trap: Path) -> None:
    """So that the tests below prove something."""
    changes = {"data/sample_inputs/model.pt": torch_pickle(Trap(trap))}
    with suppress(Exception):
        torch.export.load(rebuilt(programs["a"], tmp_path / "a.pt2", changes))
    assert trap.exists()


def test_sample_inputs_are_never_opened(
    networks: dict[str, nn.Module], programs: dict[str, Path], tmp_path: Path, trap: Path
) -> None:
    changes = {"data/sample_inputs/model.pt": torch_pickle(Trap(trap))}
    network, x = exported(rebuilt(programs["a"], tmp_path / "a.pt2", changes)), torch.rand(3, 1, 8, 8)
    assert torch.equal(network(x), networks["a"](x))
    assert not trap.exists()


def node(model: Any, number: int = 0) -> Any:
    return model["graph_module"]["graph"]["nodes"][number]


def pickled(name: str) -> Callable[[Any], object]:
    return lambda config: config["config"][name].update(use_pickle=True)


def custom(kind: str) -> Callable[[Any], object]:
    entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return lambda config: config["config"].update(trap=entry)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({WEIGHTS: pickled("head.bias"), "data/weights/weight_0": "trap"}, "'head.bias' is pickled"),
        ({WEIGHTS: None, "data/weights/model.pt": "trap"}, "its tensors are pickled"),
        ({CONSTANTS: None, "data/constants/model.pt": "trap"}, "its tensors are pickled"),
        ({CONSTANTS: custom("opaque_obj"), "data/constants/opaque_obj_0": "trap"}, "'trap' is pickled"),
        ({CONSTANTS: custom("custom_obj"), "data/constants/custom_obj_0": "trap"}, "'trap' is pickled"),
        ({MODEL: lambda m: node(m).update(target="torch.load")}, "operator torch.load is none of those"),
        ({MODEL: lambda m: node(m).update(target="torch.ops.aten.from_file.default")}, "from_file.default is none"),
        ({MODEL: lambda m: node(m).update(target="torch.ops.mkldnn.data_ptr.default")}, "is none of those"),
        ({MODEL: lambda m: node(m).update(target="_operator.methodcaller")}, "is none of those"),
        ({MODEL: lambda m: node(m).update(target="torch.ops.aten.__class__.default")}, "is none of those"),
        ({MODEL: lambda m: node(m)["inputs"][0].update(arg={"as_graph": {}})}, "kind as_graph cannot be read"),
        ({MODEL: lambda m: node(m)["inputs"][0].update(arg={"as_custom_obj": {}})}, "as_custom_obj cannot be read"),
        ({MODEL: lambda m: m["schema_version"].update(major=99)}, "its layout has version 99, not 8"),
        ({MODEL: b"[" * 100_000}, "holds no program that can be read"),
        ({MODEL: b"{}"}, "holds no program that can be read"),
        ({"data/weights/weight_0": b"1234"}, "holds no program that can be read"),
        ({"data/weights/weight_0": None}, "holds no program that can be read"),
        ({MODEL: None}, "it holds 0 programs"),
        ({"models/second.json": b"{}"}, "it holds 2 programs"),
    ],
)
def test_what_would_need_pickle_or_more_than_aten_is_refused(
    programs: dict[str, Path], tmp_path: Path, trap: Path, changes: dict[str, Any], said: str
) -> None:
    given = {name: torch_pickle(Trap(trap)) if change == "trap" else change for name, change in changes.items()}
    with pytest.raises(InvalidProgram, match=said):
        exported(rebuilt(programs["a"], tmp_path / "a.pt2", given))
    assert not trap.exists()


def test_texts_are_never_evaluated(programs: dict[str, Path], tmp_path: Path, trap: Path) -> None:
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"

    def plant(model: Any) -> None:
        graph = model["graph_module"]["graph"]
        for meta in graph["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code
        model["guards_code"] = [code]
        model["range_constraints"] = {}
        model["graph_module"]["module_call_graph"][0]["fqn"] = code

    changed = rebuilt(programs["a"], tmp_path / "a.pt2", {MODEL: plant})
    assert exported(changed)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["forward", "a..b", "head.weight.deeper"])
def test_names_that_no_tensor_can_have(programs: dict[str, Path], tmp_path: Path, name: str) -> None:
    def rename(config: Any) -> None:
        config["config"][name] = config["config"].pop("hidden.bias")

    with pytest.raises(InvalidProgram, match="is no name that a tensor"):
        exported(rebuilt(programs["a"], tmp_path / "a.pt2", {WEIGHTS: rename}))


def test_a_compressed_archive_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(programs["a"]) as old,
        zipfile.ZipFile(tmp_path / "a.pt2", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InvalidProgram, match="it is a compressed archive"):
        exported(str(tmp_path / "a.pt2"))


def test_a_pickle_is_no_program(tmp_path: Path, trap: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(InvalidProgram, match="is no whole archive"):
        exported(str(tmp_path / "a.pt2"))
    assert not trap.exists()

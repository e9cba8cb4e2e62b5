"""A request reads its fleet once, and a flow that is called for it goes on with that."""

from pathlib import Path
from typing import Any

import pytest

from flows.spec.request import Request
from tasks.params import InvalidParams

PARAMS = """
models:
  digits: {network: "tasks.models.example_networks:lenet5", weights: networks/digits.safetensors, data: data/mnist}
  fashion: {network: "tasks.models.example_networks:lenet5", weights: networks/fashion.safetensors, data: data/x}
register: {name: example}
"""

GROUPS = "version: 2\nname: {name}\ngroups: {{a: {{}}}}\n"


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "fleet.yaml").write_text(GROUPS.format(name="before"))
    return Request(tmp_path, groups=("a",), settings=("retrain.iterations=7",))


def parameters(request: Request, **changes: Any) -> dict[str, Any]:
    return {**request.as_parameters(), **changes}


def test_files_are_read_once(request_: Request) -> None:
    assert request_.declared.common().retrain.iterations == 7
    (request_.project / "fleet.yaml").write_text("not: [a fleet")
    assert request_.declared.name == "before"
    with pytest.raises(InvalidParams, match="not valid YAML"):
        _ = Request(request_.project).declared


def test_parameters_stand_for_the_request(request_: Request) -> None:
    found = Request.of_parameters(**parameters(request_, groups=["a"], settings=["retrain.iterations=7"]))
    assert found is not request_
    assert found == request_
    only = {name: request_.as_parameters()[name] for name in ("project", "params", "fleet")}
    assert Request.of_parameters(**only) == Request(request_.project)


def test_a_flow_sees_the_bytes_that_were_checked(request_: Request) -> None:
    assert request_.declared.name == "before"
    (request_.project / "fleet.yaml").write_text(GROUPS.format(name="after"))
    with request_.in_use():
        assert Request.of_parameters(**parameters(request_)).declared.name == "before"
        assert Request.of_parameters(**parameters(request_, groups=[])).declared.name == "after"
    assert Request.of_parameters(**parameters(request_)).declared.name == "after"

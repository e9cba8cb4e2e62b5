"""Factories are found by name, also by the names that they had before version 0.2."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tasks.models import example_networks, programs
from tasks.models.factories import InvalidFactory, build_network, find_factory
from tasks.params import Params


def params(network: str, **arguments: Any) -> Params:
    model = SimpleNamespace(network=network, arguments=arguments)
    return cast("Params", SimpleNamespace(models={"m": model}))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tasks.models.example_networks:lenet5", example_networks.lenet5),
        ("tasks.networks:lenet5", example_networks.lenet5),
        ("tasks.programs:exported", programs.exported),
    ],
)
def test_present_and_former_names_mean_the_same(name: str, function: object) -> None:
    assert find_factory(params(name), "m") is function


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("tasks.networks:alexnet", {}, r"models\.m\.network: tasks\.networks:alexnet cannot be imported"),
        (
            "nowhere.at_all:build",
            {},
            r"nowhere\.at_all:build cannot be imported: No module named 'nowhere'\. Its file belongs in the project",
        ),
        ("tasks.networks:lenet5", {"depth": 3}, r"failed with arguments \{'depth': 3\}"),
        ("builtins:dict", {}, "returned dict, not a torch.nn.Module"),
    ],
)
def test_what_builds_no_network_is_refused(network: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidFactory, match=message):
        build_network(params(network, **arguments), "m")

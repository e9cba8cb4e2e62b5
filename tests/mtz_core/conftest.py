"""A strict world for the numerics: one thread, one seed, the same examples in every run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support.zoo.laws")
settings.register_profile(
    "mtz_core",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=20,
    database=None,
)
settings.load_profile("mtz_core")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

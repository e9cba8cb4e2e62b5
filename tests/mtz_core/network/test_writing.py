"""Writing in place is followed or refused, never silently wrong; buffers are as they were after tracing."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.errors import UnsupportedModule
from mtz_core.network.tracing import trace
from tests.support.written import Written, assert_runs_as


def in_place(write: Callable[[Tensor], object]) -> Callable[[], nn.Module]:
    """Something is written into what the first layer puts out, and the second layer reads that."""

    def forward(module: Written, x: Tensor) -> Tensor:
        hidden = module.first(x)
        write(hidden)
        out: Tensor = module.second(hidden)
        return out

    return lambda: Written(forward)


def write_first(h: Tensor) -> None:
    h[:, 0] = 0


def write_positive(h: Tensor) -> None:
    h[h < 0] = 0


def write_indexed(h: Tensor) -> None:
    h[:, [0, 2]] = 1.0


def write_from_itself(h: Tensor) -> None:
    h[:, :2] = h[:, 2:]


def add_to_a_part(h: Tensor) -> None:
    part = h[:, :2]
    part += 1


def read_an_old_view(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    view = hidden[:, :2]
    hidden.relu_()
    out: Tensor = m.second(hidden) + view.sum(1, keepdim=True)
    return out


def read_an_old_alias(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    other = hidden.view(hidden.shape).transpose(0, 1)
    hidden.mul_(2)
    out: Tensor = m.second(other.transpose(0, 1))
    return out


def write_through_a_transpose(m: Written, x: Tensor) -> Tensor:
    view = m.first(x).t()
    view.mul_(2)
    out: Tensor = m.second(view.t())
    return out


def write_into_new_zeros(m: Written, x: Tensor) -> Tensor:
    hidden = torch.zeros(len(x), 4)
    hidden[:, :2] = m.first(x)[:, :2]
    out: Tensor = m.second(hidden)
    return out


def add_in_place(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    same = hidden
    hidden += x
    out: Tensor = m.second(same)
    return out


def write_into_the_input(m: Written, x: Tensor) -> Tensor:
    x.relu_()
    out: Tensor = m.second(m.first(x))
    return out


def write_into_a_view_of_the_input(m: Written, x: Tensor) -> Tensor:
    x.view(-1, 2, 2).relu_()
    out: Tensor = m.second(m.first(x))
    return out


def write_between_readers(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    before = m.second(hidden)
    hidden.clamp_(-0.1, 0.1)
    out: Tensor = before + m.second(hidden)
    return out


def write_into_an_alias_of_dropout(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    F.dropout(hidden, 0.5, m.training).clamp_(-6, 6)
    out: Tensor = m.second(hidden)
    return out


FOLLOWED_IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": in_place(lambda h: h.relu_()),
    "scaled": in_place(lambda h: h.mul_(2)),
    "clamp": in_place(lambda h: h.clamp_(-0.1, 0.1)),
    "added in place": lambda: Written(add_in_place),
    "into the input": lambda: Written(write_into_the_input),
    "between readers": lambda: Written(write_between_readers),
    "through a transpose": lambda: Written(write_through_a_transpose),
}

WRITTEN_IN_PLACE = FOLLOWED_IN_PLACE | {
    "one neuron": in_place(write_first),
    "where negative": in_place(write_positive),
    "indexed": in_place(write_indexed),
    "from itself": in_place(write_from_itself),
    "a part": in_place(add_to_a_part),
    "a view": in_place(lambda h: h.view(-1, 2, 2).relu_()),
    "a reshape": in_place(lambda h: h.reshape(-1, 2, 2).relu_()),
    "a chunk": in_place(lambda h: h.chunk(2, 1)[0].relu_()),
    "one of all": in_place(lambda h: h.unbind(1)[0].relu_()),
    "detached": in_place(lambda h: h.detach().relu_()),
    "filled": in_place(lambda h: h.fill_(2.0)),
    "an old view": lambda: Written(read_an_old_view),
    "an old alias": lambda: Written(read_an_old_alias),
    "new zeros": lambda: Written(write_into_new_zeros),
    "an alias of dropout": lambda: Written(write_into_an_alias_of_dropout),
    "a view of the input": lambda: Written(write_into_a_view_of_the_input),
}


@pytest.mark.parametrize("name", WRITTEN_IN_PLACE)
def test_writing_in_place_is_followed_or_refused(name: str) -> None:
    module = WRITTEN_IN_PLACE[name]().eval()
    try:
        network = trace(module, torch.randn(3, 4))
    except UnsupportedModule:
        assert name not in FOLLOWED_IN_PLACE
        return
    assert_runs_as(module, network, (4,), scale=30.0)


@pytest.mark.parametrize("whole", [True, False])
def test_buffers_are_put_back_whether_refused_or_not(whole: bool) -> None:
    module = Written(
        lambda m, x: (m.seen.add_(1) if whole else m.seen[:2].add_(1), m.second(m.first(x)))[1], seen=torch.zeros(4)
    )
    with suppress(UnsupportedModule):
        trace(module, torch.randn(3, 4))
    assert torch.equal(module.get_buffer("seen"), torch.zeros(4))

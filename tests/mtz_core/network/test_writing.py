"""Writing in place is written out of place or refused, never silently wrong; buffers are as they were after tracing."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import GETITEM, operator, run
from mtz_core.network.narrowing import Dropper
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


def write_a_part_and_then_all(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    part = hidden[:, 1:3]
    part += 1.5
    hidden *= 0.5
    out: Tensor = m.second(hidden) + part.sum(1, keepdim=True)
    return out


def write_a_piece_and_its_parts(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    piece = hidden.chunk(2, 1)[1]
    piece.relu_()
    hidden[:, 2] += 1
    piece.mul_(2)
    out: Tensor = m.second(hidden) + piece.sum(1, keepdim=True)
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


def write_row_by_row(m: Written, x: Tensor) -> Tensor:
    hidden = torch.zeros(len(x), 3, 4)
    for row in range(3):
        hidden[:, row] = m.first(x) * row
        hidden[:, row, 1:] += x[:, 1:]
    out: Tensor = m.second(hidden.mean(1))
    return out


def write_into_a_corner(m: Written, x: Tensor) -> Tensor:
    """As relative positions are added to attention, class tokens aside."""
    hidden = m.first(x).unflatten(1, (2, 2))
    before = hidden[:, 1:]
    hidden[:, 1:, 1:] = (hidden[:, 1:, 1:].reshape(-1, 1) + 0.5).view(-1, 1, 1)
    out: Tensor = m.second((hidden + before).flatten(1))
    return out


def write_into_a_copy(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x).unflatten(1, (2, 2))
    copied = hidden.transpose(1, 2).reshape(-1, 4)
    copied[:, :2] = 0
    out: Tensor = m.second(hidden.flatten(1)) + copied
    return out


def write_into_what_is_expanded(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    hidden[:, None].expand(-1, 1, 4).relu_()
    out: Tensor = m.second(hidden)
    return out


def write_where_the_data_say(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x)
    hidden[x[:, 0] > 0] = 0
    out: Tensor = m.second(hidden)
    return out


def write_over_all(m: Written, x: Tensor) -> Tensor:
    hidden, other = m.first(x), m.first(2 * x)
    hidden.copy_(other)
    hidden.add_(1)
    hidden[:, 1:].copy_(x[:, :1].double())
    out: Tensor = m.second(hidden) + other
    return out


def write_into_one_of_two_values(m: Written, x: Tensor) -> Tensor:
    values = m.first(x).unflatten(1, (2, 2)).max(2, keepdim=True).values
    values[:, 0] = 0.5
    out: Tensor = m.second(values.expand(-1, 2, 2).flatten(1))
    return out


def write_into_a_product(m: Written, x: Tensor) -> Tensor:
    hidden = torch.einsum("bi,jki->bkj", m.first(x), m.table)
    hidden[:, 0].relu_()
    out: Tensor = m.second(hidden.flatten(1))
    return out


def write_and_view_again(m: Written, x: Tensor) -> Tensor:
    hidden = m.first(x).view(-1, 2, 2).transpose(1, 2)
    hidden[:, 0].relu_()
    hidden[..., 1:].mul_(2)
    out: Tensor = m.second(hidden.transpose(1, 2).view(-1, 4))
    return out


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "relu": in_place(lambda h: h.relu_()),
    "scaled": in_place(lambda h: h.mul_(2)),
    "clamp": in_place(lambda h: h.clamp_(-0.1, 0.1)),
    "added in place": lambda: Written(add_in_place),
    "into the input": lambda: Written(write_into_the_input),
    "between readers": lambda: Written(write_between_readers),
    "through a transpose": lambda: Written(write_through_a_transpose),
    "one neuron": in_place(write_first),
    "where negative": in_place(write_positive),
    "indexed": in_place(write_indexed),
    "from itself": in_place(write_from_itself),
    "a part": in_place(add_to_a_part),
    "a part from its end": in_place(lambda h: h.narrow(1, -3, 2).mul_(2)),
    "every other": in_place(lambda h: h[:, ::2].mul_(2)),
    "a view": in_place(lambda h: h.view(-1, 2, 2).relu_()),
    "a view of a part": in_place(lambda h: h.view(-1, 2, 2)[:, 1].transpose(0, 1)[1:].relu_()),
    "permuted": in_place(lambda h: h.view(-1, 2, 2).permute(2, 0, 1)[0].mul_(2)),
    "moved": in_place(lambda h: h.view(-1, 2, 2).movedim(2, 0)[0].mul_(2)),
    "a reshape": in_place(lambda h: h.reshape(-1, 2, 2).relu_()),
    "a chunk": in_place(lambda h: h.chunk(2, 1)[0].relu_()),
    "a piece": in_place(lambda h: h.split([1, 2, 1], 1)[1].relu_()),
    "one of all": in_place(lambda h: h.unbind(1)[0].relu_()),
    "detached": in_place(lambda h: h.detach().relu_()),
    "filled": in_place(lambda h: h.fill_(2.0)),
    "zero": in_place(lambda h: h[:, 1:].zero_()),
    "masked": in_place(lambda h: h[:, 1:].masked_fill_(h[:, 1:] < 0, 0.5)),
    "an old view": lambda: Written(read_an_old_view),
    "a part and then all": lambda: Written(write_a_part_and_then_all),
    "a piece and its parts": lambda: Written(write_a_piece_and_its_parts),
    "an old alias": lambda: Written(read_an_old_alias),
    "new zeros": lambda: Written(write_into_new_zeros),
    "an alias of dropout": lambda: Written(write_into_an_alias_of_dropout),
    "a view of the input": lambda: Written(write_into_a_view_of_the_input),
    "one of two values": lambda: Written(write_into_one_of_two_values),
    "a product": lambda: Written(write_into_a_product, table=nn.Parameter(torch.randn(2, 2, 4))),
    "and viewed again": lambda: Written(write_and_view_again),
    "over all": lambda: Written(write_over_all),
    "row by row": lambda: Written(write_row_by_row),
    "a corner": lambda: Written(write_into_a_corner),
    "a copy": lambda: Written(write_into_a_copy),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_writing_in_place_is_followed(name: str) -> None:
    module = FOLLOWED[name]().eval()
    network = trace(module, torch.randn(3, 4))
    assert_runs_as(module, network, (4,), scale=30.0)
    state = {name: tensor.clone().requires_grad_(name in network.trainable) for name, tensor in network.state.items()}
    run(network.graph, state, torch.randn(5, 4)).sum().backward()  # as measuring sensitivities does
    assert state["second.weight"].grad is not None
    assert all(not operator(node.kind)._schema.is_mutable for node in network.graph.nodes if node.kind != GETITEM)


@pytest.mark.parametrize("name", ["relu", "into the input", "an alias of dropout", "a part", "zero"])
def test_writing_in_place_leaves_other_operators_as_they_are(name: str) -> None:
    """Dropout and normalisation learn as before, and no size of a batch is written down."""
    written = FOLLOWED[name]()
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), written)
    kinds = [node.kind for node in trace(module, torch.randn(3, 4)).graph.nodes]
    assert kinds[:3] == ["linear", "batch_norm", "dropout"]


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_into_what_is_expanded, "relu_"), (lambda m, x: m.second(m.first(x) + m.seen[1:].add_(1)), "add_")],
    ids=["expanded", "a part of a buffer"],
)
def test_what_cannot_be_written_elsewhere_is_refused(write: Callable[[Written, Tensor], Tensor], name: str) -> None:
    def run(module: Written, x: Tensor) -> Tensor:
        return write(module, x) + module.get_buffer("seen")[1:]

    with pytest.raises(UnsupportedModule, match=rf"{name}.*another view is read afterwards\. Write this part"):
        trace(Written(run, seen=torch.zeros(5)), torch.randn(3, 4))


def test_writing_where_the_data_say_can_be_kept_separate() -> None:
    module = Written(write_where_the_data_say).eval()
    with pytest.raises(
        UnsupportedModule, match=r"index_put cannot be zipped: it writes where the data say\. .*'index_put:\d'"
    ):
        trace(module, torch.randn(3, 4))
    (operator,) = (node.name for node in trace(module, torch.randn(3, 4), [""]).graph.nodes if "index_put" in node.kind)
    assert_runs_as(module, trace(module, torch.randn(3, 4), [operator]), (4,))


class HalfGated(nn.Module):
    """Half of its neurons go through a ReLU, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden[:, 4:] = torch.relu(hidden[:, 4:]) + 1
        outputs: Tensor = self.second(hidden)
        return outputs


def test_parts_that_are_written_lose_neurons_as_others_do() -> None:
    module, x = HalfGated(), torch.randn(6, 4)
    network = trace(module, x)
    assert network.graph.hidden_widths == {"first": 8}
    assert Dropper(network).droppable(x) == ("first",)
    reduced = Dropper(network).narrow({"first": np.array([0, 3, 4, 5, 7])})
    kept = [0, 3, 4, 5, 7]
    hidden = module.first(x)[:, kept]
    expected = F.linear(torch.cat([hidden[:, :2], hidden[:, 2:].relu() + 1], 1), module.second.weight[:, kept])
    torch.testing.assert_close(
        run(reduced.network.graph, reduced.network.state, x), expected + module.second.bias, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("whole", [True, False])
def test_buffers_are_put_back_whether_refused_or_not(whole: bool) -> None:
    module = Written(
        lambda m, x: (m.seen.add_(1) if whole else m.seen[:2].add_(1), m.second(m.first(x)))[1], seen=torch.zeros(4)
    )
    with suppress(UnsupportedModule):
        trace(module, torch.randn(3, 4))
    assert torch.equal(module.get_buffer("seen"), torch.zeros(4))

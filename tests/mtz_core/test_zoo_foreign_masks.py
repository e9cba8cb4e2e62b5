"""Networks of the transformers package as they are: tokens and masks by name in, all that they return out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mtz_core as mtz
from tests.support.networks import zip_traced
from tests.support.several import LENGTH, TOKENS, masked

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")]

DECODED = 4


def bert(attention: str, hidden: int = 12) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=hidden,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    return transformers.BertForSequenceClassification(config)


def distilbert(hidden: int = 12) -> nn.Module:
    """Answers questions: where an answer starts, and where it ends."""
    config = transformers.DistilBertConfig(
        vocab_size=TOKENS, dim=8, n_layers=1, n_heads=2, hidden_dim=hidden, max_position_embeddings=LENGTH
    )
    return transformers.DistilBertForQuestionAnswering(config)


def t5(hidden: int = 12) -> nn.Module:
    """An encoder and a decoder, each with tokens of its own."""
    config = transformers.T5Config(
        vocab_size=TOKENS,
        d_model=8,
        d_kv=4,
        d_ff=hidden,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def translated(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        **masked(count, seed),
        "decoder_input_ids": torch.randint(1, TOKENS, (count, DECODED), generator=generator),
    }


CASES: dict[str, tuple[Callable[..., nn.Module], Callable[[int, int], dict[str, Tensor]], list[str]]] = {
    "bert": (partial(bert, "sdpa"), masked, ["logits"]),
    "bert, spelt out": (partial(bert, "eager"), masked, ["logits"]),
    "distilbert": (distilbert, masked, ["start_logits", "end_logits"]),
    "t5": (t5, translated, ["logits", "encoder_last_hidden_state"]),
}


def network(make: Callable[..., nn.Module], seed: int, **size: int) -> nn.Module:
    torch.manual_seed(seed)
    return make(**size).eval()


@torch.no_grad()
@pytest.mark.parametrize(("make", "data", "outputs"), CASES.values(), ids=CASES.keys())
def test_laws(
    make: Callable[..., nn.Module], data: Callable[[int, int], dict[str, Tensor]], outputs: list[str], tmp_path: Path
) -> None:
    networks = {"a": network(make, 1), "b": network(make, 2, hidden=16)}
    calibration, x = {"a": data(30, 1), "b": data(30, 2)}, data(7, 3)
    traced = {task: mtz.trace(original, calibration[task]) for task, original in networks.items()}
    whole = zip_traced(traced, calibration, mtz.ZipConfig(share=0.0))
    for task, original in networks.items():
        found, expected = whole(x, task), original(**x)
        assert list(found) == list(expected) == outputs
        assert all(torch.equal(found[name], expected[name]) for name in outputs)
    shared = zip_traced(traced, calibration, mtz.ZipConfig())
    assert shared.report.stored_fraction < 0.9
    shared.save(tmp_path)
    again = mtz.load(tmp_path)
    for task in networks:
        found, plain = again(x, task), shared.network(task)(**x)
        for name in outputs:
            assert torch.equal(found[name], shared(x, task)[name])
            torch.testing.assert_close(plain[name], found[name], rtol=0, atol=1e-5)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a cache": ({"use_cache": True}, r"output 'past_key_values' is a DynamicCache.*Switch it off"),
    "a loss": ({"use_cache": False}, r"output 'loss' has shape \[\].*leave labels out of the inputs"),
}


@pytest.mark.parametrize(("settings", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_what_a_network_returns_beside_its_outputs_is_refused(settings: dict[str, Any], message: str) -> None:
    config = transformers.GPT2Config(
        vocab_size=TOKENS,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    data = masked(6)
    given = {**data, "labels": data["input_ids"]} if not settings["use_cache"] else data
    with pytest.raises(mtz.UnsupportedModule, match=message):
        mtz.trace(transformers.GPT2LMHeadModel(config).eval(), given)
    network = transformers.GPT2LMHeadModel(config).eval()
    network.config.use_cache = False
    assert mtz.trace(network, data).graph.hidden_groups

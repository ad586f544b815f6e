"""Hand-made plans: what a step computes, and when it says so."""

from typing import Any

import pytest
import torch

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry, StepResult
from kernels.paged_kv import token_views

GREEDY = SamplingParams(max_tokens=9, temperature=0)
PROMPT = tuple(range(3, 40))
BLOCKS = (11, 4, 7, 2)
NUM_BLOCKS = 12


@pytest.fixture
def engine(reference: Any, device: torch.device) -> Engine:
    where: Any = device.type
    config = EngineConfig(num_blocks=NUM_BLOCKS, device=where, dtype="float32")
    return Engine.from_checkpoint(reference("qwen3_moe").folder, config)


def prompt(request_id: str = "a", blocks: tuple[int, ...] = BLOCKS) -> PlanEntry:
    return PlanEntry(request_id, PROMPT, 0, blocks, GREEDY)


def test_one_token_for_each_entry_that_samples(engine: Engine) -> None:
    other = PlanEntry("b", (5, 6, 7), 0, (1,), None)
    assert engine.runner.run(Plan((prompt(), other))).drawn.keys() == {"a"}
    assert engine.runner.run(Plan((prompt()._replace(sampling=None),))) == StepResult({})


def test_an_empty_plan_does_nothing(engine: Engine) -> None:
    calls: list[int] = []
    assert engine.runner.run(Plan(()), calls.append) == StepResult({})
    assert calls == []


def test_layers_are_told_in_order_when_their_kv_stands(engine: Engine) -> None:
    """What a reader finds in the callback is what is there at the end."""
    seen: list[torch.Tensor] = []

    def on_layer(layer: int) -> None:
        assert layer == len(seen)
        seen.append(engine.storage.read(layer, BLOCKS, 0, len(PROMPT)))

    engine.runner.run(Plan((prompt(),)), on_layer)
    assert len(seen) == engine.layout.num_layers
    for layer, kv in enumerate(seen):
        assert kv.any()
        assert torch.equal(kv, engine.storage.read(layer, BLOCKS, 0, len(PROMPT)))


def test_an_error_in_the_callback_ends_the_step(engine: Engine) -> None:
    def on_layer(layer: int) -> None:
        raise RuntimeError(f"layer {layer}")

    with pytest.raises(RuntimeError, match="layer 0"):
        engine.runner.run(Plan((prompt(),)), on_layer)


def test_only_blocks_of_the_plan_are_written(engine: Engine) -> None:
    engine.runner.run(Plan((prompt(),)))
    for layer in engine.storage.layers:
        for view in token_views(layer):
            touched = view.flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert touched == sorted(BLOCKS[: -(-len(PROMPT) // engine.layout.block_size)])


def test_chunks_leave_the_same_kv_as_one_step(engine: Engine) -> None:
    whole = engine.runner.run(Plan((prompt(),)))
    kv = [engine.storage.read(layer, BLOCKS, 0, len(PROMPT)) for layer in range(engine.layout.num_layers)]
    other = (0, 1, 3, 5)
    for start, end in ((0, 1), (1, 17), (17, 36)):
        engine.runner.run(Plan((PlanEntry("b", PROMPT[start:end], start, other, None),)))
    assert engine.runner.run(Plan((PlanEntry("b", PROMPT[36:], 36, other, GREEDY),))).drawn["b"] == whole.drawn["a"]
    for layer, expected in enumerate(kv):
        chunked = engine.storage.read(layer, other, 0, len(PROMPT)).view(torch.float32)
        torch.testing.assert_close(chunked, expected.view(torch.float32), rtol=1e-4, atol=1e-4)


def test_kv_that_was_carried_over_decodes_like_kv_that_was_computed(
    engine: Engine, reference: Any, device: Any
) -> None:
    """Prefill in one engine, read, write into another with other blocks: the next token is the same."""
    other = Engine.from_checkpoint(
        reference("qwen3_moe").folder,
        EngineConfig(num_blocks=20, block_size=8, device=device.type, dtype="float32"),
    )
    first = engine.runner.run(Plan((prompt(),))).drawn["a"].token_ids
    table = (19, 3, 8, 1, 12)
    for layer in range(engine.layout.num_layers):
        other.storage.write(layer, table, 0, len(PROMPT), engine.storage.read(layer, BLOCKS, 0, len(PROMPT)))
    step = PlanEntry("a", first, len(PROMPT), BLOCKS, GREEDY)
    here, there = engine.runner.run(Plan((step,))), other.runner.run(Plan((step._replace(block_ids=table),)))
    assert here == there


def test_garbage_of_an_earlier_request_can_not_reach_another(engine: Engine) -> None:
    """Blocks come back with whatever they held, be it not-a-number."""
    entries = [PlanEntry("short", (5,), 0, (3,), GREEDY), PlanEntry("long", (6,), 12, (9,), GREEDY)]
    engine.runner.run(Plan((entries[1]._replace(token_ids=PROMPT[:12], start=0, sampling=None),)))
    clean = engine.runner.run(Plan(tuple(entries)))
    for layer in engine.storage.layers:
        for view in token_views(layer):
            view[[block for block in range(NUM_BLOCKS) if block != 9]] = float("nan")
    assert engine.runner.run(Plan(tuple(entries))) == clean


def draw_one_by_one(engine: Engine, sampling: SamplingParams, num_tokens: int) -> list[int]:
    tokens = list(engine.runner.run(Plan((prompt()._replace(sampling=sampling),))).drawn["a"].token_ids)
    while len(tokens) < num_tokens:
        step = PlanEntry("a", (tokens[-1],), len(PROMPT) + len(tokens) - 1, BLOCKS, sampling, len(tokens))
        tokens += engine.runner.run(Plan((step,))).drawn["a"].token_ids
    return tokens


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(max_tokens=9, seed=3, temperature=2.0)])
@pytest.mark.parametrize("num_right", [0, 2, 4])
def test_drafts_are_taken_as_far_as_they_are_what_is_drawn(
    engine: Engine, sampling: SamplingParams, num_right: int
) -> None:
    """The draws are those that are made without drafts, whatever the drafts say and whoever stands beside."""
    expected = draw_one_by_one(engine, sampling, 6)
    wrong = [(token + 1) % 223 for token in expected[1 + num_right : 5]]
    drafts = (*expected[: 1 + num_right], *wrong)
    step = PlanEntry("a", drafts, len(PROMPT), BLOCKS, sampling, num_output_tokens=1, num_drafts=4)
    beside = PlanEntry("b", (5, 6, 7), 0, (1,), sampling)
    assert engine.runner.run(Plan((beside, step))).drawn["a"].token_ids == tuple(expected[1 : 2 + num_right])

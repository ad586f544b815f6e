"""How a plan is laid out as tensors."""

import pytest
import torch

from core.errors import IntegrityError
from core.sampling import SamplingParams
from engine.plan import Plan, PlanEntry
from engine.step_inputs import StepInputs, build_step_inputs

GREEDY = SamplingParams(max_tokens=9, temperature=0)


def build(*entries: PlanEntry) -> StepInputs:
    return build_step_inputs(Plan(entries), block_size=4, vocab_size=100, device=torch.device("cpu"))


def test_tokens_positions_and_slots_line_up() -> None:
    inputs = build(
        PlanEntry("prefill", (10, 11, 12), 3, (7, 2), None),
        PlanEntry("decode", (20,), 9, (5, 0, 6, 8), GREEDY),
    )
    assert inputs.token_ids.tolist() == [20, 10, 11, 12]
    assert inputs.positions.tolist() == [9, 3, 4, 5]
    assert inputs.slots.tolist() == [6 * 4 + 1, 7 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1]


def test_sampled_rows_are_the_last_of_their_entries() -> None:
    inputs = build(
        PlanEntry("a", (1, 2, 3), 0, (0,), GREEDY),
        PlanEntry("b", (4,), 4, (1, 2), GREEDY),
        PlanEntry("c", (5, 6), 0, (3,), None),
        PlanEntry("d", (7, 8), 0, (4,), GREEDY),
    )
    assert [e.request_id for e in inputs.sampled] == ["b", "a", "d"]
    assert inputs.token_ids[inputs.sampled_rows].tolist() == [4, 3, 8]


def test_rows_are_picked_with_spans_of_their_own() -> None:
    inputs = build(
        PlanEntry("a", (1, 2, 3), 4, (0, 7), GREEDY),
        PlanEntry("b", (4,), 4, (1, 2), GREEDY),
        PlanEntry("c", (5, 6), 0, (3,), None),
        PlanEntry("d", (7, 8, 9), 0, (4,), GREEDY, num_drafts=1),
    )
    assert inputs.picked is not None
    assert inputs.picked.rows.tolist() == inputs.sampled_rows.tolist() == [0, 3, 7, 8]
    assert inputs.picked.spans.table.tolist() == [[0, 1, 4, 0], [1, 1, 6, 2], [2, 2, 1, 5]]
    assert inputs.picked.spans.blocks.tolist() == [1, 2, 0, 7, 3, 4]


def test_no_rows_are_picked_where_all_are_asked_for_or_a_prompt_is_scored() -> None:
    assert build(PlanEntry("a", (1,), 2, (0,), GREEDY)).picked is None
    scored = PlanEntry("a", (1, 2), 0, (0,), GREEDY, prompt_targets=(2,), num_prompt_top=0)
    assert build(scored).picked is None
    assert build(PlanEntry("a", (1, 2), 0, (0,), None)).picked is not None


def test_spans_name_rows_positions_and_the_blocks_of_the_context_only() -> None:
    inputs = build(
        PlanEntry("long", (1,), 8, (9, 8, 7, 6, 5), None),
        PlanEntry("prefill", (1, 2), 3, (4, 3, 2, 1), None),
        PlanEntry("short", (1,), 2, (6, 5), None),
    )
    assert inputs.spans.table.tolist() == [[0, 1, 2, 0], [1, 1, 8, 1], [2, 2, 3, 4]]
    assert inputs.spans.blocks.tolist() == [6, 9, 8, 7, 4, 3]
    assert torch.equal(inputs.spans.host_table, inputs.spans.table)


@pytest.mark.parametrize("token_id", [-1, 100])
def test_a_token_outside_of_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(IntegrityError, match="outside of the vocabulary"):
        build(PlanEntry("a", (1, token_id), 0, (0,), None))

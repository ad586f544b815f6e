"""What a row of the timing says, and that the two sides of it are the same model."""

import pytest
import torch

from benchmarks.engine_timing import Bench, Row, Size, seconds


@pytest.mark.parametrize(("value", "target", "ok"), [(2.0, 2.0, True), (1.9, 2.0, False)])
def test_without_a_peer_the_value_counts(value: float, target: float, ok: bool) -> None:
    row = Row.of("name", value, "unit", target)
    assert (row.ratio, row.ok) == (None, ok)


@pytest.mark.parametrize(("value", "ok"), [(9.0, True), (7.9, False)])
def test_with_a_peer_the_ratio_counts(value: float, ok: bool) -> None:
    row = Row.of("name", value, "unit", target=0.8, peer=10.0)
    assert (row.ratio, row.ok) == (value / 10, ok)


def test_runs_take_turns() -> None:
    order: list[str] = []
    assert len(seconds(2, lambda: order.append("a"), lambda: order.append("b"))) == 2
    assert order == ["a", "b"] * 5


def test_engine_and_peer_draw_the_same_tokens() -> None:
    torch.set_num_threads(1)
    bench = Bench(Size(64, 2, 96, 4, 2, 128, 32, 2, 4), torch.device("cpu"))
    ids = torch.tensor([bench.prompt])
    expected = bench.peer.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    result = bench.runner.run(bench.whole_prompt())
    assert result.drawn["0"].token_ids == (expected,)
    rows = list(bench.rows())
    assert [row.name for row in rows] == ["prefill", "decode, batch 1", "decode, batch 1, read", "decode, batch 2"]
    assert all(row.value > 0 and row.peer is not None and row.peer > 0 for row in rows)

"""That the two sides of the timing are the same model, and take turns."""

import torch

from benchmarks.engine_timing import Bench, Size, seconds


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

"""A decode worker is asked to end while it decodes: the requests go on with another, and nothing is computed anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Oracle, Serving, start, stop

NUM_TOKENS = 1500
PROMPTS = [(11, 23, 5, 99, 7) * 3, (3, 1, 4, 1, 5, 9, 2, 6) * 9, (8, 8, 8, 13)]


@pytest.fixture(scope="module")
def two_decode_workers() -> Iterator[Serving]:
    serving = start("--launcher", "subprocess", "--decode.num-workers", "2")
    try:
        yield serving
        left = stop(serving)
    finally:
        serving.process.kill()
    assert left == [], f"ctrl-C left processes behind: {left}"


@pytest.mark.timeout(180)
def test_streams_go_on_while_their_worker_leaves(two_decode_workers: Serving, oracle: Oracle) -> None:
    serving = two_decode_workers
    serving.wait_until(lambda info: sum(pair.up for pair in info.pairs) == 2)
    with serving.client() as client:
        generations = [
            client.generate(token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
            for prompt in PROMPTS
        ]
        for generation in generations:
            next(iter(generation))
        info = serving.wait_until(lambda info: any(w.role == "decode" and w.num_running for w in info.workers))
        busy = next(w for w in info.workers if w.role == "decode" and w.num_running)
        os.kill(serving.pid(busy.worker_id), signal.SIGTERM)
        for generation in generations:
            assert generation.text is not None
    moved = 0
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert len(generation.token_ids) == NUM_TOKENS
        oracle.check_greedy(prompt, generation.token_ids)
        assert generation.stats is not None
        assert generation.stats.num_attempts == 1
        moved += generation.stats.prefill_worker == busy.worker_id
    assert moved >= 1
    serving.wait_until(
        lambda info: any(w.worker_id == busy.worker_id and w.incarnation != busy.incarnation for w in info.workers)
    )
    serving.wait_until_nothing_is_held()

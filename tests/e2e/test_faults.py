"""What a user sees when a worker dies in the middle of an answer: at most a pause."""

from __future__ import annotations

import os
import signal

import pytest

from penstock import Generation
from tests.e2e.conftest import Oracle, Serving

PROMPT = tuple(range(100, 164))
NUM_TOKENS = 400


def read(generation: Generation, num_tokens: int) -> None:
    while len(generation.token_ids) < num_tokens and next(generation, None) is not None:
        pass


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_an_answer_goes_on_without_gap_or_repeat_after_its_worker_was_killed(
    cluster: Serving, oracle: Oracle, victim: str
) -> None:
    pid = cluster.pid(victim)
    with cluster.client() as client:
        generation = client.generate(
            token_ids=PROMPT if victim == "decode-0" else PROMPT * 25,
            max_tokens=NUM_TOKENS if victim == "decode-0" else 16,
            temperature=0,
            ignore_eos=True,
        )
        if victim == "decode-0":
            read(generation, 5)
        os.kill(pid, signal.SIGKILL)
        for _ in generation:
            pass
    assert generation.stats is not None
    if victim == "decode-0":
        assert len(generation.token_ids) == NUM_TOKENS
        assert generation.stats.num_attempts >= 2
        oracle.check_greedy(PROMPT, generation.token_ids)
    else:
        assert len(generation.token_ids) == 16
        oracle.check_greedy(PROMPT * 25, generation.token_ids)
    info = cluster.wait_until(lambda info: all(w.connected for w in info.workers) and any(p.up for p in info.pairs))
    assert {w.worker_id for w in info.workers} == {"prefill-0", "decode-0"}
    with cluster.client() as client:
        after = client.generate(token_ids=PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
        assert after.text is not None
    oracle.check_greedy(PROMPT, after.token_ids)


@pytest.mark.timeout(120)
def test_a_worker_that_is_asked_to_end_finishes_what_it_has_and_comes_back(cluster: Serving) -> None:
    before = next(w for w in cluster.info().workers if w.worker_id == "decode-0")
    pid = cluster.pid("decode-0")
    with cluster.client() as client:
        generation = client.generate(token_ids=PROMPT, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        read(generation, 5)
        os.kill(pid, signal.SIGTERM)
        assert generation.text is not None
    assert len(generation.token_ids) == NUM_TOKENS
    assert generation.stats is not None
    assert generation.stats.num_attempts == 1, "the running request was cut off"
    cluster.wait_until(
        lambda info: (
            any(w.worker_id == "decode-0" and w.connected and w.incarnation != before.incarnation for w in info.workers)
            and any(pair.up for pair in info.pairs)
        )
    )


def test_a_client_that_leaves_frees_both_workers(cluster: Serving) -> None:
    with cluster.client() as client:
        generation = client.generate(token_ids=PROMPT, max_tokens=1500, temperature=0, ignore_eos=True)
        read(generation, 3)
        generation.close()
    cluster.wait_until_nothing_is_held()


def test_a_deadline_ends_a_request_on_both_workers(cluster: Serving) -> None:
    from penstock import DeadlineExceededError

    with cluster.client() as client, pytest.raises(DeadlineExceededError):
        for _ in client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True, timeout_s=0.5):
            pass
    cluster.wait_until_nothing_is_held()

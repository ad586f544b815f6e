"""Several tokens come with each step, and the worker that draws them dies in the middle: nobody sees a difference."""

from __future__ import annotations

import random
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from engine.config import EngineConfig, SpeculativeConfig
from tests.faults.control import WAIT_S, World, world
from tests.faults.jobs import Answer, answer_of, run

pytestmark = pytest.mark.timeout(150)
ENGINE = EngineConfig(
    num_blocks=512,
    max_num_batched_tokens=128,
    num_threads=1,
    device="cpu",
    speculative_config=SpeculativeConfig(method="ngram"),
)
NUM_TOKENS = 160


def jobs() -> list[Mapping[str, Any]]:
    """Texts that repeat themselves, so that guesses are right, greedy and drawn."""
    rng, made = random.Random(5), list[Mapping[str, Any]]()
    kinds = ({"temperature": 0}, {"temperature": 0.3, "seed": 9}, {"temperature": 0, "repetition_penalty": 1.02})
    for kind in kinds:
        phrase = [rng.randrange(8, 3000) for _ in range(12)]
        made.append({"token_ids": phrase * 6, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 1, **kind})
    return made


def num_right_guesses(made: World) -> float:
    with urllib.request.urlopen(f"http://{made.cluster.endpoints.http}/metrics", timeout=WAIT_S) as reply:
        lines = reply.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    )


def test_a_resumed_request_with_speculation_is_the_undisturbed_one() -> None:
    asked = jobs()
    with world(1, 1, engine=ENGINE) as made, made.client() as client:
        undisturbed = [run(client, job) for job in asked]
        assert num_right_guesses(made) > 0, "nothing was guessed right: this would test nothing"
        midst = Barrier(len(asked) + 1)

        def answer(job: Mapping[str, Any]) -> tuple[Answer, int]:
            generation, deltas = client.generate(**job), []
            for delta in generation:
                before = len(generation.token_ids) - len(delta.token_ids)
                deltas.append(delta)
                if before < NUM_TOKENS // 4 <= len(generation.token_ids):
                    midst.wait(WAIT_S)
            assert generation.stats is not None
            return answer_of(generation, deltas), generation.stats.num_attempts

        with ThreadPoolExecutor(len(asked)) as threads:
            answers = [threads.submit(answer, job) for job in asked]
            midst.wait(WAIT_S)
            made.kill("decode-0")
            got = [each.result() for each in answers]
        assert [each for each, _ in got] == undisturbed
        assert max(num_attempts for _, num_attempts in got) > 1, "nobody was in the midst of it"
        made.wait_until_whole()

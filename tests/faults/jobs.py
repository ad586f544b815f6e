"""Requests of every kind, and what comes out of them where nothing disturbs them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from penstock import Client, Delta, Generation, PenstockError
from penstock.aio import AsyncGeneration


@dataclass(frozen=True)
class Answer:
    """All that a client sees of one generation."""

    token_ids: tuple[int, ...]
    text: str
    finish: str
    logprobs: tuple[tuple[int, float, int], ...]
    prompt_logprobs: int


@dataclass(frozen=True)
class Failed:
    """The status it ended with."""

    code: str
    message: str


def all_kinds(seed: int, num_jobs: int) -> list[Mapping[str, Any]]:
    """Arguments of `generate`: prompts around blocks and chunks, and each kind of sampling in turn."""
    rng = random.Random(seed)
    jobs: list[Mapping[str, Any]] = []
    for i in range(num_jobs):
        prompt = tuple(rng.randrange(8, 3000) for _ in range(rng.choice((3, 15, 16, 17, 63, 90, 140, 200))))
        common = {"token_ids": prompt, "max_tokens": rng.randint(20, 48), "seed": rng.randrange(1 << 30)}
        jobs.append({**common, **KINDS[i % len(KINDS)]})
    return jobs


KINDS: Sequence[Mapping[str, Any]] = (
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 1.0, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "ignore_eos": True},
    {"temperature": 1.0, "regex": "([0-9]{3}, ){9}end", "max_tokens": 120, "logprobs": 0},
    {"temperature": 1.0, "frequency_penalty": 0.7, "logit_bias": {50: 3.0}, "min_p": 0.02, "ignore_eos": True},
    {"temperature": 1.0, "stop": ["e ", "(s", "\n\n"], "ignore_eos": True},
    {"temperature": 0.9, "top_k": 40, "min_tokens": 12},
    {"temperature": 1.0, "json_schema": '{"type":"array","items":{"type":"integer"},"minItems":6,"maxItems":6}'},
)


def run(client: Client, job: Mapping[str, Any]) -> Answer | Failed:
    try:
        generation = client.generate(**job)
        deltas = list(generation)
    except PenstockError as error:
        return Failed(error.code, str(error))
    return answer_of(generation, deltas)


def answer_of(generation: Generation | AsyncGeneration, deltas: Iterable[Delta]) -> Answer:
    deltas = list(deltas)
    return Answer(
        generation.token_ids,
        "".join(delta.text for delta in deltas),
        str(generation.finish_reason),
        tuple((told.token_id, told.logprob, told.rank) for told in generation.logprobs),
        sum(len(delta.prompt_logprobs) for delta in deltas),
    )


def run_all(client: Client, jobs: Sequence[Mapping[str, Any]]) -> list[Answer | Failed]:
    """All of them at once."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: run(client, job), jobs))


def check(jobs: Sequence[Mapping[str, Any]], got: Sequence[Answer | Failed], undisturbed: Sequence[Answer]) -> None:
    """Not a token, a letter or a bit of a log-probability may differ; nothing is missing and nothing comes twice."""
    for job, answer, expected in zip(jobs, got, undisturbed, strict=True):
        assert isinstance(answer, Answer), f"{job}: {answer}"
        assert answer == expected, f"{job}"

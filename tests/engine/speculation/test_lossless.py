"""Guessing changes no token: not greedy, not sampled, not in company, not with blocks running out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig, SpeculativeConfig
from engine.engine import Engine
from engine.plan import PlanEntry
from engine.sampler import sample

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "penstock-tiny"
METHODS: list[Any] = ["ngram", "suffix", "token_recycling"]
GRAMMAR = LLMatcher.grammar_from_regex("((ab|cd)[,;] ){30}")
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 9},
    {"temperature": 0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    {"temperature": 0.3, "min_tokens": 40, "bad_words": ((7, 8),), "logprobs": 2},
    {
        "temperature": 0.8,
        "seed": 2,
        "stop_token_ids": (0,),
        "grammar": GRAMMAR,
    },
]


def requests(max_tokens: int = 48) -> list[Request]:
    """Source text that says a thing twice and begins to say it a third time, as tokens of a small vocabulary."""
    piece = [3 + (7 * i * i + 11 * i) % 400 for i in range(40)]
    prompts = [[*piece, 5 + i, *piece, 6 + i, *piece[: 4 + i]] for i in range(len(SAMPLINGS))]
    return [
        Request(str(i), prompt, SamplingParams(max_tokens=max_tokens, **sampling))
        for i, (prompt, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=True))
    ]


def run(engine: Engine, made: list[Request]) -> list[list[int]]:
    for request in made:
        engine.scheduler.add(request)
    for _ in range(3000):
        if not engine.scheduler.requests:
            return [request.output_token_ids for request in made]
        engine.step()
        engine.scheduler.check_integrity()
    pytest.fail("the engine does not come to an end")


def engine_with(folder: Path, method: Any = None, **changes: Any) -> Engine:
    settings = {"num_blocks": 64, "device": "cpu", "num_threads": 1, "max_num_seqs": 8, **changes}
    return Engine.from_checkpoint(folder, EngineConfig(speculative_config=SpeculativeConfig(method=method), **settings))


@pytest.fixture(scope="module")
def undrafted() -> list[list[int]]:
    return run(engine_with(MODEL), requests())


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_without_guesses(undrafted: list[list[int]], method: str) -> None:
    engine = engine_with(MODEL, method)
    assert run(engine, requests()) == undrafted
    counts = engine.scheduler.draft_counts
    assert counts.num_draft_tokens > counts.num_accepted_tokens > 0


def test_tokens_are_those_without_guesses_where_blocks_run_out(undrafted: list[list[int]]) -> None:
    engine = engine_with(MODEL, "ngram", num_blocks=60, block_size=4, max_num_batched_tokens=16)
    assert run(engine, requests()) == undrafted
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.draft_counts.num_accepted_tokens > 0


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_tokens_are_those_without_guesses_in_other_models(reference: Any, variant: str) -> None:
    folder: Path = reference(variant).folder

    def made() -> list[Request]:
        """Greedy outputs of random models soon repeat themselves."""
        sampled = [SamplingParams(max_tokens=40, temperature=t, top_k=3, seed=7) for t in (0.0, 0.2)]
        return [Request(str(i), [5, 6, 7, 5, 6], params) for i, params in enumerate(sampled)]

    engine = engine_with(folder, "suffix")
    assert run(engine, made()) == run(engine_with(folder), made())
    assert engine.scheduler.draft_counts.num_draft_tokens > 0


def test_what_was_guessed_wrong_is_not_found_in_the_prefix_cache(undrafted: list[list[int]]) -> None:
    """The second time every block of the first is found, and must hold what it is said to hold."""
    engine = engine_with(MODEL, "token_recycling", block_size=4, num_blocks=512)
    assert [run(engine, requests()) for _ in range(2)] == [undrafted, undrafted]
    assert engine.pool.index is not None
    assert engine.pool.index.num_hits > 0


@pytest.mark.parametrize("draft", range(5))
def test_drafted_draws_have_the_distribution_of_the_model(draft: int) -> None:
    """First token and, after a right guess, the second: chi-square of 4 degrees, below what 1 in 10^5 exceeds."""
    num, vocab = 6000, 5
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0], [1.5, 0.0, 0.3, -2.0, 0.4]])
    params = [SamplingParams(max_tokens=9, temperature=1.3, seed=1000 * draft + i) for i in range(num)]
    entries = [PlanEntry(str(i), (1, draft), 4, (0,), p, num_drafts=1) for i, p in enumerate(params)]
    drawn = list(sample(logits.repeat(num, 1), entries).values())
    expected = (logits / 1.3).softmax(dim=-1)
    seconds = [d.token_ids[1] for d in drawn if len(d.token_ids) == 2]
    for row, tokens in enumerate(([d.token_ids[0] for d in drawn], seconds)):
        counts = torch.bincount(torch.tensor(tokens), minlength=vocab).double()
        mean = expected[row].double() * len(tokens)
        assert ((counts - mean) ** 2 / mean).sum() < 28.5
    assert all(d.token_ids[0] == draft for d in drawn if len(d.token_ids) == 2)

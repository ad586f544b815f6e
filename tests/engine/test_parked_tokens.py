"""Requests that are parked and come back draw the tokens that they draw undisturbed: every cache, every way to draw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig, SpeculativeConfig
from engine.engine import Engine

MODEL = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
ROOM = EngineConfig(num_blocks=100, block_size=4, max_num_batched_tokens=16, max_num_seqs=6, max_model_len=64)
GUESSES = SpeculativeConfig("ngram", num_speculative_tokens=4, prompt_lookup_min=1)
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"seed": 1, "top_p": 0.9, "prompt_logprobs": 1},
    {"seed": 2, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    {"seed": 3, "grammar": LLMatcher.grammar_from_regex("([a-z]{3,5} )+")},
    {"temperature": 0.0, "logit_bias": ((5, 1.5),), "min_tokens": 9},
    {"seed": 5, "top_k": 20, "bad_words": ((9, 11),), "allowed_token_ids": tuple(range(200))},
]


def requests() -> list[Request]:
    prompts = [[(7 * i + 13 * j) % 190 + 5 for j in range(6 + 2 * i)] for i in range(len(WAYS))]
    return [
        Request(str(i), prompt, SamplingParams(max_tokens=30, **way))
        for i, (prompt, way) in enumerate(zip(prompts, WAYS, strict=True))
    ]


def run(engine: Engine) -> list[tuple[Any, ...]]:
    """Tokens and log-probabilities of all, in a batch, each step checked."""
    added = requests()
    told: dict[str, list[Any]] = {each.request_id: [] for each in added}
    for each in added:
        engine.scheduler.add(each)
    for _ in range(1000):
        if not engine.scheduler.requests:
            assert engine.pool.num_free_blocks == engine.pool.num_blocks
            return [(r.output_token_ids, r.prompt_logprobs, told[r.request_id]) for r in added]
        for output in engine.step():
            told[output.request.request_id] += output.logprobs
        engine.scheduler.check_integrity()
    pytest.fail("the engine does not come to an end")


def compare(folder: Path, config: EngineConfig) -> None:
    expected = run(Engine.from_checkpoint(folder, config))
    small = Engine.from_checkpoint(folder, replace(config, num_blocks=24))
    assert run(small) == expected
    counts = small.scheduler.parking_counts
    assert counts.num_parks >= 2
    assert (counts.num_recomputes, counts.num_held_blocks) == (0, 0)


CHANGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 cache": {"kv_cache_dtype": "bfloat16"},
    "float16 cache": {"kv_cache_dtype": "float16"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "int8 weights": {"quantization": "int8"},
    "no prefix cache": {"enable_prefix_caching": False},
    "guesses": {"speculative_config": GUESSES},
    "guesses, int8 cache": {"speculative_config": GUESSES, "kv_cache_dtype": "int8"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_parked_requests_draw_what_they_would_have_drawn(change: str) -> None:
    compare(MODEL, replace(ROOM, device="cpu", num_threads=1, **CHANGES[change]))


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16"])
def test_parked_requests_over_a_latent_cache_draw_the_same(
    reference: Any, kv_cache_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WAYS[3], "grammar", "")  # the model has no tokenizer
    config = replace(ROOM, device="cpu", num_threads=1, dtype="float32", kv_cache_dtype=kv_cache_dtype)
    compare(reference("deepseek_v2").folder, config)


def test_without_host_memory_they_compute_anew_and_draw_the_same() -> None:
    config = replace(ROOM, device="cpu", num_threads=1)
    expected = run(Engine.from_checkpoint(MODEL, config))
    small = Engine.from_checkpoint(MODEL, replace(config, num_blocks=24, swap_space=0.0))
    assert run(small) == expected
    counts = small.scheduler.parking_counts
    assert counts.num_parks == 0
    assert counts.num_recomputes >= 3

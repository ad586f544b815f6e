"""A smaller model that runs ahead: it draws alike, follows what was accepted, and holds nothing for who is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig, SpeculativeConfig
from engine.engine import Engine
from engine.speculation.draft_model import DraftModelProposer

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 0.6, "top_p": 0.8, "seed": 5},
    {"temperature": 0, "repetition_penalty": 1.2},
]


def engine_with(folder: Path, draft: Path | None, **changes: Any) -> Engine:
    method: Any = None if draft is None else "draft_model"
    speculation = SpeculativeConfig(method=method, num_speculative_tokens=4, model=str(draft) if draft else None)
    settings = {"num_blocks": 64, "device": "cpu", "num_threads": 1, "max_num_batched_tokens": 32, "max_num_seqs": 8}
    return Engine.from_checkpoint(folder, EngineConfig(speculative_config=speculation, **{**settings, **changes}))


def requests() -> list[Request]:
    return [
        Request(str(i), [1 + (3 * j + i) % 90 for j in range(40 + i)], SamplingParams(max_tokens=30, **sampling))
        for i, sampling in enumerate(SAMPLINGS)
    ]


def run(engine: Engine, made: list[Request]) -> list[list[int]]:
    for request in made:
        engine.scheduler.add(request)
    for _ in range(1000):
        if not engine.scheduler.requests:
            return [request.output_token_ids for request in made]
        engine.step()
        engine.scheduler.check_integrity()
    pytest.fail("the engine does not come to an end")


def proposer(engine: Engine) -> DraftModelProposer:
    found: Any = engine.scheduler._speculator
    assert isinstance(found._proposer, DraftModelProposer)
    return found._proposer


@pytest.fixture
def large(reference: Any) -> Path:
    folder: Path = reference("mixtral").folder
    return folder


@pytest.fixture
def small(reference: Any) -> Path:
    folder: Path = reference("qwen3").folder
    return folder


def test_tokens_are_those_of_the_large_model(large: Path, small: Path) -> None:
    engine = engine_with(large, small)
    assert run(engine, requests()) == run(engine_with(large, None), requests())
    assert engine.scheduler.draft_counts.num_draft_tokens > 0


def test_a_model_that_guesses_for_itself_is_always_right(large: Path) -> None:
    """Greedy or sampled, as long as nothing looks back: so it has kept up with what was accepted."""
    engine = engine_with(large, large)
    assert run(engine, requests()[:3]) == run(engine_with(large, None), requests()[:3])
    counts = engine.scheduler.draft_counts
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 0


def test_it_keeps_up_with_a_model_that_goes_other_ways(large: Path, small: Path) -> None:
    """Its K and V are those of the accepted tokens: a guess made late is that of a model which has just read all."""
    engine = engine_with(large, small)
    made = requests()[0]
    engine.scheduler.add(made)
    while made.num_tokens < 60:
        engine.step()
    [late] = proposer(engine).propose([(made, 4)])
    fresh = Request("fresh", made.token_ids(0, made.num_tokens), made.sampling)
    [first] = proposer(engine_with(large, small)).propose([(fresh, 4)])
    assert late == first


def test_nothing_is_held_for_requests_that_are_gone(large: Path, small: Path) -> None:
    engine = engine_with(large, small)
    run(engine, requests())
    pool = proposer(engine)._pool
    pool.check_integrity(())
    assert pool.num_free_blocks == pool.num_blocks


def test_without_room_there_are_no_guesses(large: Path, small: Path) -> None:
    engine = engine_with(large, small)
    first, *others = requests()
    proposer(engine)._pool.allocate("hog", 61 * 16)
    assert [len(guesses) for guesses in proposer(engine).propose([(first, 4), (others[0], 4)])] == [4, 0]


def test_another_vocabulary_is_refused(large: Path, reference: Any) -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.model: .* has 211 tokens, must have the 223"):
        engine_with(large, reference("llama").folder)


def test_blocks_are_shared_out_between_the_two(large: Path, small: Path) -> None:
    alone = engine_with(large, None, num_blocks=None, kv_cache_memory_gib=1e-4)
    both = engine_with(large, small, num_blocks=None, kv_cache_memory_gib=1e-4)
    assert 0 < both.pool.num_blocks < alone.pool.num_blocks

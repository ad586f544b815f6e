"""Prefix reuse over the real engine: what is found need not be computed, and changes no bit of what comes after."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.request import Request, RequestState
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine


class Watched:
    """An engine that remembers its logits, and how many positions it has computed."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.engine = Engine.from_checkpoint(folder, config)
        self.logits: list[Tensor] = []
        self.num_computed = 0
        model: Any = self.engine.runner._model
        compute = model.logits

        def remember(hidden: Tensor) -> Tensor:
            self.logits.append(compute(hidden).clone())
            return self.logits[-1].clone()

        model.logits = remember

    def serve(self, request: Request) -> tuple[list[int], Tensor]:
        """Its tokens, and the logits [tokens, V] they were drawn from."""
        scheduler = self.engine.scheduler
        self.logits.clear()
        self.num_computed = 0
        scheduler.add(request)
        while request.state is not RequestState.FINISHED:
            plan = scheduler.schedule()
            self.num_computed += plan.num_tokens
            scheduler.update(plan, self.engine.runner.run(plan))
            scheduler.check_integrity()
        return request.output_token_ids, torch.cat(self.logits)


@pytest.fixture(params=["llama", "qwen3_moe"])
def folder(reference: Any, request: pytest.FixtureRequest) -> Path:
    path: Path = reference(request.param).folder
    return path


@pytest.fixture
def config(device: torch.device) -> EngineConfig:
    where: Any = device.type
    return EngineConfig(num_blocks=40, block_size=8, max_num_batched_tokens=32, max_num_seqs=8, device=where)


def conversation() -> list[Request]:
    """Turns that go on from one another, a prompt said again, one of whole blocks, and one that leaves halfway."""
    rng = random.Random(3)
    tokens = [rng.randrange(200) for _ in range(90)]
    lengths = [21, 45, 45, 64, 64, 90]
    prompts = [tokens[:length] for length in lengths] + [[*tokens[:37], *reversed(tokens[:30])]]
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9}]
    params = [SamplingParams(max_tokens=9, seed=i, **kinds[i % 2]) for i in range(len(prompts))]
    return [Request(str(i), prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]


@pytest.mark.parametrize("num_blocks", [40, 14], ids=["roomy", "evicting"])
def test_tokens_and_logits_are_those_without_a_cache(folder: Path, config: EngineConfig, num_blocks: int) -> None:
    changed = replace(config, num_blocks=num_blocks)
    cached, plain = Watched(folder, changed), Watched(folder, replace(changed, enable_prefix_caching=False))
    saved = 0
    for with_cache, without in zip(conversation(), conversation(), strict=True):
        (tokens, logits), (expected, reference) = cached.serve(with_cache), plain.serve(without)
        assert tokens == expected
        assert torch.equal(logits, reference)
        saved += plain.num_computed - cached.num_computed
    index = cached.engine.pool.index
    assert index is not None
    assert saved == index.num_hits > 0


def test_prompt_logprobs_need_every_position_computed(folder: Path, config: EngineConfig) -> None:
    watched = Watched(folder, config)
    prompt = list(range(30))
    watched.serve(Request("a", prompt, SamplingParams(max_tokens=1)))
    watched.serve(Request("b", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)))
    assert watched.num_computed == 30

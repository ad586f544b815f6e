"""Greedy tokens equal those of transformers: for every family, alone and batched, chunked and not, under preemption."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from tests.engine.model_logits import logits_of

NUM_PROMPTS = 50
NUM_NEW_TOKENS = 12
MAX_TIE = 1e-4
"""Gap of two float32 logits, below which either token may come first."""
LOGITS_TOLERANCE = 2e-4
BFLOAT16_TOLERANCE = 0.25
KV_TOLERANCE = 0.1

MODES = {
    "alone": EngineConfig(num_blocks=16, max_num_seqs=1),
    "batched": EngineConfig(num_blocks=600),
    "chunked": EngineConfig(num_blocks=600, max_num_batched_tokens=24, max_num_seqs=24),
    "preempted": EngineConfig(num_blocks=60, block_size=4, max_num_batched_tokens=48, max_num_seqs=48),
}


@dataclass(frozen=True)
class Expected:
    """What transformers makes of the prompts. logits: [NUM_PROMPTS, NUM_NEW_TOKENS, V]"""

    reference: Any
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def expected(reference: Any, variant: str) -> Expected:
    made = reference(variant)
    rng, vocab_size = random.Random(variant), made.model.config.vocab_size
    lengths = [1, 2, 16, 17, 150, *(rng.randint(1, 150) for _ in range(NUM_PROMPTS - 5))]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return Expected(made, prompts, *made.greedy(prompts, NUM_NEW_TOKENS))


def load(folder: Path, config: EngineConfig, device: torch.device, dtype: Any = "float32") -> Engine:
    on_device: Any = device.type
    return Engine.from_checkpoint(folder, replace(config, device=on_device, dtype=dtype))


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, all prompts offered at once; the bookkeeping is checked after every step."""
    sampling = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(5000):
        if not engine.scheduler.requests:
            return [request.output_token_ids for request in requests]
        engine.step()
        engine.scheduler.check_integrity()
    pytest.fail("the engine does not come to an end")


def num_near_ties(expected: Expected, actual: list[list[int]]) -> int:
    """How many outputs differ from the reference where it has two logits within MAX_TIE. Any other difference fails."""
    num_ties = 0
    for i, (ours, theirs) in enumerate(zip(actual, expected.tokens, strict=True)):
        assert len(ours) == NUM_NEW_TOKENS
        if ours != theirs:
            step = next(j for j in range(NUM_NEW_TOKENS) if ours[j] != theirs[j])
            logits = expected.logits[i, step]
            gap = (logits.max() - logits[ours[step]]).item()
            assert gap <= MAX_TIE, f"prompt {i}, token {step}: {ours[step]}, must be {theirs[step]}: better by {gap}"
            num_ties += 1
    return num_ties


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(
    expected: Expected, mode: str, device: torch.device, near_ties: Counter[str]
) -> None:
    engine = load(expected.reference.folder, MODES[mode], device)
    near_ties["ties"] += num_near_ties(expected, generate(engine, expected.prompts))
    near_ties["outputs"] += NUM_PROMPTS
    assert (engine.scheduler.num_preemptions > 0) == (mode == "preempted")
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_the_reference_is_not_trivial(expected: Expected) -> None:
    """Else equal tokens would prove little."""
    assert len({tuple(tokens) for tokens in expected.tokens}) > 0.9 * NUM_PROMPTS
    assert sum(len(set(tokens)) > NUM_NEW_TOKENS // 2 for tokens in expected.tokens) > NUM_PROMPTS // 2


def test_a_changed_weight_is_noticed(expected: Expected, device: torch.device, tmp_path: Path) -> None:
    for file in expected.reference.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for name in tensors.keys() & {"model.layers.1.self_attn.o_proj.weight"}:
                tensors[name][::2] *= 0.8  # half of it: a norm may come next
            save_file(tensors, tmp_path / file.name)
    engine = load(tmp_path, MODES["batched"], device)
    with pytest.raises(AssertionError, match="must be"):
        num_near_ties(expected, generate(engine, expected.prompts))


def test_logits_of_every_position_are_those_of_transformers(expected: Expected, device: torch.device) -> None:
    folder, prompt = expected.reference.folder, max(expected.prompts, key=len)
    on_device: Any = device.type
    ours = logits_of(folder, EngineConfig(num_blocks=10, device=on_device, dtype="float32"), prompt)
    assert (ours - expected.reference.logits(prompt)).abs().max().item() < LOGITS_TOLERANCE


def test_bfloat16_tokens_are_nearly_the_best(reference: Any, device: torch.device) -> None:
    """Along the engine's own tokens, float32 logits of transformers say how much better the best token is."""
    made = reference("qwen3")
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 9)]
    engine = load(made.folder, MODES["batched"], device, "bfloat16")
    assert engine.layout.dtype == "bfloat16"
    check_nearly_the_best(made, prompts, generate(engine, prompts), BFLOAT16_TOLERANCE)


def check_nearly_the_best(made: Any, prompts: list[list[int]], outputs: list[list[int]], tolerance: float) -> None:
    for prompt, ours in zip(prompts, outputs, strict=True):
        logits = made.logits(prompt + ours)[len(prompt) - 1 : -1]
        gaps = logits.amax(dim=-1) - logits[torch.arange(NUM_NEW_TOKENS), torch.tensor(ours)]
        assert gaps.max().item() < tolerance


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "float16", "int8"])
def test_tokens_over_a_smaller_kv_cache_are_nearly_the_best(reference: Any, kv_cache_dtype: Any, device: Any) -> None:
    made = reference("qwen3")
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 9)]
    config = replace(MODES["batched"], kv_cache_dtype=kv_cache_dtype)
    engine = load(made.folder, config, device)
    assert engine.layout.dtype == kv_cache_dtype
    check_nearly_the_best(made, prompts, generate(engine, prompts), KV_TOLERANCE)

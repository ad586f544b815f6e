"""On a CPU a request's tokens and logprobs are the same bits however its work was cut and whoever else was there.

Prefix reuse, resume, phase splitting and speculation rely on it. The log probabilities of the best tokens are told in
full precision, so one bit of difference anywhere in the model shows.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from kernels import threads
from kernels.native import library

NUM_NEW_TOKENS = 9
STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 KV": {"kv_cache_dtype": "int8"},
    "bfloat16 KV": {"kv_cache_dtype": "bfloat16"},
}
CUT = {
    "batched": EngineConfig(num_blocks=400, max_num_batched_tokens=2000, enable_prefix_caching=False),
    "chunked": EngineConfig(num_blocks=400, max_num_batched_tokens=19, max_num_seqs=19, enable_prefix_caching=False),
    "preempted, in small blocks": EngineConfig(
        num_blocks=52, block_size=4, max_num_batched_tokens=40, max_num_seqs=30, enable_prefix_caching=False
    ),
    "with prefix reuse": EngineConfig(num_blocks=400, max_num_batched_tokens=64),
    "on two threads": EngineConfig(num_blocks=400, num_threads=2),
}
ALONE = EngineConfig(num_blocks=20, max_num_seqs=1, max_num_batched_tokens=300, enable_prefix_caching=False)

Outputs = list[list[tuple[int, tuple[Any, ...]]]]


def prompts(vocab_size: int) -> list[list[int]]:
    """Some share a beginning, so that there is something to reuse."""
    rng = random.Random(7)
    shared = [rng.randrange(vocab_size) for _ in range(70)]
    lengths = [1, 2, 16, 17, 33, 90, 150]
    fresh = [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]
    return fresh + [shared[: rng.randrange(20, 70)] + prompt[:40] for prompt in fresh[3:]]


def outputs(engine: Engine, given: list[list[int]]) -> Outputs:
    """What each request drew, and the log probabilities that it drew from."""
    sampling = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.8, top_p=0.95, seed=3, logprobs=5)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(given)]
    drawn: Outputs = [[] for _ in requests]
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(3000):
        if not engine.scheduler.requests:
            return drawn
        for output in engine.step():
            told = zip(output.token_ids, output.logprobs, strict=True)
            drawn[int(output.request.request_id)] += [(token, tuple(map(repr, [logprobs]))) for token, logprobs in told]
        engine.scheduler.check_integrity()
    pytest.fail("the engine does not come to an end")


@pytest.fixture(autouse=True)
def exact_kernels(device: torch.device) -> Any:
    if device.type != "cpu" or library() is None:
        pytest.skip("only the C++ kernels promise it")
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        *(("llama", stored) for stored in STORED),
        *(("qwen3_moe", stored) for stored in ("float32", "int8")),
        *((family, "float32") for family in ("gemma2", "deepseek_v3", "gpt_oss")),
    ],
)
def test_outputs_are_the_same_bits(reference: Callable[[str], Any], family: str, stored: str) -> None:
    folder = reference(family).folder

    def load(config: EngineConfig) -> Engine:
        config = replace(config, num_threads=config.num_threads or 1, **STORED[stored])
        return Engine.from_checkpoint(folder, config)

    alone = load(ALONE)
    given = prompts(alone.model_config.vocab_size)
    expected = [drawn for prompt in given for drawn in outputs(alone, [prompt])]
    for name, config in CUT.items():
        engine = load(config)
        assert outputs(engine, given) == expected, name
        assert (engine.scheduler.num_preemptions > 0) == name.startswith("preempted")

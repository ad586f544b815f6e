"""On a CPU, the logits of a row depend on neither its batch-mates nor on how its context was cut: bit for bit.

For every family. `test_invariance.py` tells the same of whole requests; the torch reference does not promise it.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry
from engine.step_inputs import build_step_inputs
from kernels.native import library

BLOCK_SIZE, BLOCKS_PER_TEXT, LENGTH = 16, 5, 70
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
}
LoadEngine = Callable[[str, str], Engine]

pytestmark = pytest.mark.skipif(library() is None, reason="the torch reference runs, which is not invariant")


@pytest.fixture(scope="module")
def load(reference: Any, device: torch.device) -> LoadEngine:
    if device.type != "cpu":
        pytest.skip("holds on CPU only")
    loaded: dict[tuple[str, str], Engine] = {}

    def get(variant: str, precision: str) -> Engine:
        folder: Path = reference(variant).folder
        config = EngineConfig(device="cpu", num_blocks=3 * BLOCKS_PER_TEXT, num_threads=1, **PRECISIONS[precision])
        return loaded.setdefault((variant, precision), Engine.from_checkpoint(folder, config))

    return get


def text(index: int) -> tuple[int, ...]:
    return tuple((7 * index + 5 * i * i + 3) % 199 for i in range(LENGTH))


def entry(index: int, start: int, end: int) -> PlanEntry:
    blocks = range(index * BLOCKS_PER_TEXT, (index + 1) * BLOCKS_PER_TEXT)
    return PlanEntry(str(index), text(index)[start:end], start, tuple(blocks), None)


@torch.inference_mode()
def logits(engine: Engine, *entries: PlanEntry) -> list[torch.Tensor]:
    """Those of all rows of each entry, computed in one step."""
    inputs = build_step_inputs(Plan(entries), BLOCK_SIZE, 199, torch.device("cpu"))
    rows = engine.model.logits(engine.model.forward(inputs, engine.storage.layers))
    places = {tuple(row): i for i, row in enumerate(zip(inputs.token_ids.tolist(), inputs.slots.tolist(), strict=True))}
    out = []
    for e in entries:
        slots = [e.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(e.start, e.end)]
        out.append(rows[[places[key] for key in zip(e.token_ids, slots, strict=True)]])
    return out


def check(engine: Engine, cuts: list[int], mates: list[int]) -> None:
    """Text 0 at once and alone, and again in chunks, each beside some tokens of the others."""
    (whole,) = logits(engine, entry(0, 0, LENGTH))
    for index in (1, 2):
        logits(engine, entry(index, 0, LENGTH - 1))
    edges = [0, *sorted(set(cuts)), LENGTH]
    for i, (start, end) in enumerate(pairwise(edges)):
        mate = mates[i % len(mates)]
        beside = [entry(index, LENGTH - mate, LENGTH) for index in (1, 2)] if mate else []
        part, *_ = logits(engine, entry(0, start, end), *beside)
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_picked_row_comes_out_as_among_all(load: LoadEngine, variant: str, precision: str) -> None:
    engine = load(variant, precision)
    greedy = SamplingParams(max_tokens=1, temperature=0)
    drawing = [entry(0, 20, LENGTH)._replace(sampling=greedy), entry(2, 0, 9)._replace(sampling=greedy, num_drafts=3)]
    logits(engine, entry(0, 0, 20))
    inputs = build_step_inputs(Plan((*drawing, entry(1, 0, 30))), BLOCK_SIZE, 199, torch.device("cpu"))
    assert inputs.picked is not None
    with torch.inference_mode():
        every = engine.model.forward(inputs, engine.storage.layers)
        picked = engine.model.forward(inputs, engine.storage.layers, None, inputs.picked)
    assert torch.equal(picked, every[inputs.sampled_rows])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_every_family(load: LoadEngine, variant: str, precision: str) -> None:
    check(load(variant, precision), [1, 2, 18, 19, 20, 47, 48, 69], [0, 1, 3, 40])


@given(
    precision=st.sampled_from(list(PRECISIONS)),
    family=st.sampled_from(["qwen3_moe", "gemma2", "llama3_rope", "gpt_oss"]),
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=6),
    mates=st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_beside_anything(
    load: LoadEngine, precision: str, family: str, cuts: list[int], mates: list[int]
) -> None:
    check(load(family, precision), cuts, mates)

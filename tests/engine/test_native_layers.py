"""All layers in one call against one operation after the other: bit for bit, in every family and precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry
from engine.step_inputs import StepInputs, build_step_inputs
from kernels.native import library
from kernels.paged_kv import token_views

pytestmark = pytest.mark.skipif(library() is None, reason="there are no C++ kernels")

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4": {"quantization": "int4"},
}
MIXED = Plan(
    (
        PlanEntry("decode", (7,), 20, (0, 1), None),
        PlanEntry("chunk", tuple(range(30, 43)), 5, (2, 3), None),
        PlanEntry("prompt", tuple(range(60, 79)), 0, (4, 5), None),
    )
)


@pytest.fixture
def load(reference: Any, device: torch.device) -> Callable[[str, str], Engine]:
    if device.type != "cpu":
        pytest.skip("the C++ kernels are the CPU's")

    def get(variant: str, precision: str) -> Engine:
        folder: Path = reference(variant).folder
        config = EngineConfig(device="cpu", num_blocks=6, num_threads=1, **PRECISIONS[precision])
        return Engine.from_checkpoint(folder, config)

    return get


def inputs_of(plan: Plan) -> StepInputs:
    return build_step_inputs(plan, 16, 199, torch.device("cpu"))


def is_fused(engine: Engine) -> bool:
    return engine.model._native(engine.storage.layers) is not None


@torch.inference_mode()
def run(engine: Engine) -> list[torch.Tensor]:
    """The hidden states of a step, and what stands in the caches after it."""
    hidden = engine.model.forward(inputs_of(MIXED), engine.storage.layers)
    return [hidden, *(view for layer in engine.storage.layers for view in token_views(layer))]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_call_gives_what_single_operations_give(
    load: Callable[[str, str], Engine], variant: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant.startswith("deepseek"):
        pytest.skip("latent attention runs one operation after the other")
    fused = load(variant, precision)
    assert is_fused(fused)
    monkeypatch.setattr(engine.model, "native_layers", lambda *_: None)
    single = load(variant, precision)
    assert not is_fused(single)
    for ours, theirs in zip(run(fused), run(single), strict=True):
        assert torch.equal(ours, theirs)


def test_what_has_no_kernel_of_its_own_runs_one_operation_after_the_other(load: Callable[[str, str], Engine]) -> None:
    assert not is_fused(load("deepseek_v3", "float32"))


@torch.inference_mode()
def test_a_layer_is_announced_when_its_keys_are_written_and_before_those_of_the_next(
    load: Callable[[str, str], Engine],
) -> None:
    loaded = load("gemma3", "float32")
    layers, seen = loaded.storage.layers, []
    loaded.model.forward(inputs_of(MIXED), layers, lambda _: seen.append([bool(kv[0].any()) for kv in layers]))
    assert seen == [[True, False, False], [True, True, False], [True, True, True]]


@torch.inference_mode()
def test_what_the_announcement_raises_ends_the_step(load: Callable[[str, str], Engine]) -> None:
    loaded = load("qwen3_moe", "float32")

    def fail(layer: int) -> None:
        raise RuntimeError(f"layer {layer}")

    with pytest.raises(RuntimeError, match="layer 0"):
        loaded.model.forward(inputs_of(MIXED), loaded.storage.layers, fail)
    assert not any(bool(kv[0].any()) for kv in loaded.storage.layers[1:])

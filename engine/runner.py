"""Runs plans: the one place where a step meets the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kv_storage import KVStorage
from engine.model import Model
from engine.plan import Plan, StepResult
from engine.sampler import sample
from engine.step_inputs import build_step_inputs


class Runner:
    """Computes one plan at a time. It writes the blocks that a plan's entries name and keeps nothing between steps."""

    def __init__(self, model: Model, storage: KVStorage) -> None:
        self._model = model
        self._storage = storage

    @torch.inference_mode()
    def run(self, plan: Plan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Compute the plan and draw a token for each entry with `sampling`.

        `on_layer(l)` is called in the middle of the step, on this thread, as soon as K and V of layer l of the whole
        plan stand in the cache (on a GPU: are ordered on the current stream). Layers come in order. What it raises ends
        the step. Blocks until the tokens are known.
        """
        if not plan:
            return StepResult({})
        storage = self._storage
        inputs = build_step_inputs(plan, storage.layout.block_size, self._model.config.vocab_size, storage.device)
        hidden = self._model.forward(inputs, storage.layers, on_layer or _ignore)
        if not inputs.sampled:
            return StepResult({})
        logits = self._model.logits(hidden.index_select(0, inputs.sampled_rows))
        return StepResult(sample(logits, inputs.sampled))


def _ignore(_layer: int) -> None:
    pass

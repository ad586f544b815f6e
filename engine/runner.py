"""Runs plans: the one place where a step meets the device."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from core.logprobs import TokenLogprobs
from core.sampling import SamplingParams
from engine.grammar import GrammarMasks, PendingMasks
from engine.kv_storage import HostKV, KVStorage
from engine.model import Model
from engine.plan import Drawn, Plan, StepResult
from engine.sampler import sample, token_logprobs
from engine.step_inputs import StepInputs, build_step_inputs
from kernels.threads import awake

MAX_SCORED_ROWS = 64
"""Rows of logits that are made at once for the log-probabilities of prompts."""


class Runner:
    """Computes one plan at a time. It writes the blocks that a plan's entries name.

    What a step gives depends on the plan and the cache alone. `mask_wait_s` is the time that steps have waited for the
    masks of grammars after the model was done.
    """

    def __init__(
        self, model: Model, storage: KVStorage, grammars: GrammarMasks | None = None, host: HostKV | None = None
    ) -> None:
        """Without `host` no plan may swap."""
        self._model = model
        self._storage = storage
        self._grammars = grammars
        self._host = host
        self.mask_wait_s = 0.0

    def prepare(self, sampling: SamplingParams) -> None:
        """A request with these parameters has come: begin what takes long and does not need the device."""
        if sampling.grammar and self._grammars is not None:
            self._grammars.prepare(sampling.grammar)

    @torch.inference_mode()
    def run(self, plan: Plan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Compute the plan and draw tokens for each entry with `sampling`.

        `on_layer(l)` is called in the middle of the step, on this thread, as soon as K and V of layer l of the whole
        plan stand in the cache (on a GPU: are ordered on the current stream). Layers come in order. What it raises ends
        the step. Blocks until the tokens are known.
        """
        self._swap(plan)
        if not plan.entries:
            return StepResult({})
        with awake():
            return self._run(plan, on_layer)

    def _run(self, plan: Plan, on_layer: Callable[[int], None] | None) -> StepResult:
        begun = perf_counter()
        pending = self._begin_masks(plan)
        storage = self._storage
        inputs = build_step_inputs(plan, storage.layout.block_size, self._model.config.vocab_size, storage.device)
        hidden = self._model.forward(inputs, storage.layers, on_layer, inputs.picked)
        prompt_logprobs = self._score(hidden, inputs)
        if not inputs.sampled:
            return StepResult({}, prompt_logprobs)
        if len(hidden) > len(inputs.sampled_rows):
            hidden = hidden.index_select(0, inputs.sampled_rows)
        logits = self._model.logits(hidden)
        masks, failures = pending.get()
        self.mask_wait_s += pending.wait_s
        drawn = sample(logits, inputs.sampled, masks)
        drawn.update((request_id, Drawn((), failure=failure)) for request_id, failure in failures.items())
        return StepResult(drawn, prompt_logprobs, perf_counter() - begun)

    def _swap(self, plan: Plan) -> None:
        if plan.swaps_out or plan.swaps_in:
            assert self._host is not None, "a plan swaps without host memory"
            for swap in plan.swaps_out:
                self._host.take_out(swap.block_ids, swap.host_block_ids)
            for swap in plan.swaps_in:
                self._host.put_back(swap.block_ids, swap.host_block_ids)

    def _begin_masks(self, plan: Plan) -> PendingMasks:
        with_grammar = [entry for entry in plan.entries if entry.sampling is not None and entry.sampling.grammar]
        if self._grammars is not None:
            return self._grammars.begin(with_grammar)
        return PendingMasks({}, {entry.request_id: "the model has no tokenizer.json" for entry in with_grammar})

    def _score(self, hidden: Tensor, inputs: StepInputs) -> dict[str, tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the tokens of prompts, by request id."""
        targets = [target for entry in inputs.scored for target in entry.prompt_targets]
        nums = [entry.num_prompt_top for entry in inputs.scored for _ in entry.prompt_targets]
        told: list[TokenLogprobs] = []
        for start in range(0, len(targets), MAX_SCORED_ROWS):
            chunk = slice(start, start + MAX_SCORED_ROWS)
            logits = self._model.logits(hidden.index_select(0, inputs.scored_rows[chunk]))
            told += token_logprobs(logits, targets[chunk], nums[chunk])
        each = iter(told)
        return {entry.request_id: tuple(next(each) for _ in entry.prompt_targets) for entry in inputs.scored}

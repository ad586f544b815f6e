"""A plan as tensors, made once for all layers of a step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import IntegrityError
from engine.plan import Plan, PlanEntry
from kernels.paged_kv import Spans

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens in one row, those of an entry side by side: entries of one token first, by length, then the others."""

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64"""
    slots: Tensor
    """[T] int64: where K and V of each token go, `block * block_size + offset`."""
    spans: Spans
    """One for each entry."""
    sampled: tuple[PlanEntry, ...]
    """The entries that draw a token."""
    sampled_rows: Tensor
    """[S] int64: the rows they draw from, 1 + `num_drafts` of each."""
    scored: tuple[PlanEntry, ...]
    """The entries that ask for log-probabilities of their prompt's tokens."""
    scored_rows: Tensor
    """[N] int64: the rows that tell them, one for each of `prompt_targets`."""


def build_step_inputs(plan: Plan, block_size: int, vocab_size: int, device: torch.device) -> StepInputs:
    """Lay out a plan that has entries. `IntegrityError` where a token id is not in the vocabulary."""
    entries = sorted(plan.entries, key=lambda e: (e.num_tokens > 1, e.end if e.num_tokens == 1 else 0))
    token_ids = np.fromiter(chain.from_iterable(e.token_ids for e in entries), np.int64)
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise IntegrityError(f"a token id of the plan is outside of the vocabulary, [0, {vocab_size})")
    tables = [e.block_ids[: -(-e.end // block_size)] for e in entries]
    num_rows = [e.num_tokens for e in entries]
    ends, table_ends = list(accumulate(num_rows)), list(accumulate(map(len, tables)))
    blocks = np.fromiter(chain.from_iterable(tables), np.int32, table_ends[-1])
    spans = [
        (end - num, num, e.start, table_end - len(table))
        for end, num, e, table_end, table in zip(ends, num_rows, entries, table_ends, tables, strict=True)
    ]
    table = np.array(spans, np.int32)
    row_starts, _, starts, offsets = np.repeat(table, num_rows, axis=0).T
    positions = np.arange(token_ids.size) - row_starts + starts
    slots = blocks[offsets + positions // block_size].astype(np.int64) * block_size + positions % block_size
    draws = [(e, end) for e, end in zip(entries, ends, strict=True) if e.sampling is not None]
    sampled = [row for e, end in draws for row in range(end - 1 - e.num_drafts, end)]
    scored = [span[0] + i for e, span in zip(entries, spans, strict=True) for i in range(len(e.prompt_targets))]
    wide = _to_device(np.concatenate((token_ids, positions, slots, np.array(sampled + scored, np.int64))), device)
    packed = _to_device(np.concatenate((table.ravel(), blocks)), device)
    tokens, at, places, sampled_rows, scored_rows = torch.split(
        wide, [token_ids.size] * 3 + [len(sampled), len(scored)]
    )
    return StepInputs(
        tokens,
        at,
        places,
        Spans(packed[: table.size].view(-1, 4), packed[table.size :], torch.from_numpy(table)),
        tuple(e for e, _ in draws),
        sampled_rows,
        tuple(e for e in entries if e.prompt_targets),
        scored_rows,
    )


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

"""A plan as tensors, made once for all layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

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
    blocks = np.fromiter(chain.from_iterable(tables), np.int32)
    starts, num_rows = np.array([(e.start, e.num_tokens) for e in entries]).T
    offsets, row_starts = _sums_before(np.fromiter(map(len, tables), np.int64)), _sums_before(num_rows)
    positions = np.arange(token_ids.size) + np.repeat(starts - row_starts, num_rows)
    own_blocks = blocks[np.repeat(offsets, num_rows) + positions // block_size].astype(np.int64)
    slots = own_blocks * block_size + positions % block_size
    sampled_rows = _sampled_rows(entries, row_starts + num_rows)
    scored_rows = _scored_rows(entries, row_starts)
    wide = _to_device(np.concatenate((token_ids, positions, slots, sampled_rows, scored_rows)), device)
    table = np.stack((row_starts, num_rows, starts, offsets), axis=1).astype(np.int32)
    packed = _to_device(np.concatenate((table.ravel(), blocks)), device)
    spans = Spans(packed[: table.size].view(-1, 4), packed[table.size :], torch.from_numpy(table))
    tokens, at, places, rows, scored = torch.split(wide, [token_ids.size] * 3 + [sampled_rows.size, scored_rows.size])
    sampled_entries = tuple(e for e in entries if e.sampling is not None)
    scored_entries = tuple(e for e in entries if e.prompt_targets)
    return StepInputs(tokens, at, places, spans, sampled_entries, rows, scored_entries, scored)


def _sampled_rows(entries: Sequence[PlanEntry], ends: Ints) -> Ints:
    rows = [
        np.arange(end - 1 - e.num_drafts, end) for e, end in zip(entries, ends, strict=True) if e.sampling is not None
    ]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _scored_rows(entries: Sequence[PlanEntry], starts: Ints) -> Ints:
    rows = [np.arange(start, start + len(e.prompt_targets)) for e, start in zip(entries, starts, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _sums_before(counts: Ints) -> Ints:
    sums: Ints = counts.cumsum() - counts
    return sums


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

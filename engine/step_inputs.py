"""A plan as tensors, made once for all layers of a step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import IntegrityError
from engine.plan import Plan, PlanEntry
from kernels.paged_kv import Spans


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
    tokens, positions, slots, sampled, scored = (array("q") for _ in range(5))
    table, blocks = array("i"), array("i")
    for e in entries:
        row, end_row = len(tokens), len(tokens) + e.num_tokens
        table.extend((row, e.num_tokens, e.start, len(blocks)))
        blocks.extend(e.block_ids[: -(-e.end // block_size)])
        tokens.extend(e.token_ids)
        positions.extend(range(e.start, e.end))
        for part in _slots(e, block_size):
            slots.extend(part)
        if e.sampling is not None:
            sampled.extend(range(end_row - 1 - e.num_drafts, end_row))
        scored.extend(range(row, row + len(e.prompt_targets)))
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise IntegrityError(f"a token id of the plan is outside of the vocabulary, [0, {vocab_size})")
    wide = _to_device(tokens + positions + slots + sampled + scored, torch.int64, device)
    packed = _to_device(table + blocks, torch.int32, device)
    on_device = packed[: len(table)].view(-1, 4)
    host_table = on_device if device.type == "cpu" else torch.frombuffer(table, dtype=torch.int32).view(-1, 4)
    parts = torch.split(wide, [*[len(tokens)] * 3, len(sampled), len(scored)])
    return StepInputs(
        token_ids=parts[0],
        positions=parts[1],
        slots=parts[2],
        spans=Spans(on_device, packed[len(table) :], host_table),
        sampled=tuple(e for e in entries if e.sampling is not None),
        sampled_rows=parts[3],
        scored=tuple(e for e in entries if e.prompt_targets),
        scored_rows=parts[4],
    )


def _slots(entry: PlanEntry, block_size: int) -> Iterator[range]:
    """Where K and V of the entry's tokens go, block by block."""
    for block in range(entry.start // block_size, -(-entry.end // block_size)):
        first, to_slot = block * block_size, (entry.block_ids[block] - block) * block_size
        yield range(max(entry.start, first) + to_slot, min(entry.end, first + block_size) + to_slot)


def _to_device(numbers: array[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.frombuffer(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

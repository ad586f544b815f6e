"""A plan as tensors, made once for all layers of a step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import IntegrityError
from engine.plan import Plan, PlanEntry
from kernels.paged_kv import PickedRows, Spans


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
    picked: PickedRows | None
    """`sampled_rows` where no other rows are asked for, None where all are or some are scored."""
    scored: tuple[PlanEntry, ...]
    """The entries that ask for log-probabilities of their prompt's tokens."""
    scored_rows: Tensor
    """[N] int64: the rows that tell them, one for each of `prompt_targets`."""


def build_step_inputs(plan: Plan, block_size: int, vocab_size: int, device: torch.device) -> StepInputs:
    """Lay out a plan that has entries. `IntegrityError` where a token id is not in the vocabulary."""
    entries = sorted(plan.entries, key=lambda e: (e.num_tokens > 1, e.end if e.num_tokens == 1 else 0))
    tokens, positions, slots, sampled, scored = (array("q") for _ in range(5))
    table, picked_table, blocks = array("i"), array("i"), array("i")
    for e in entries:
        row, end_row = len(tokens), len(tokens) + e.num_tokens
        table.extend((row, e.num_tokens, e.start, len(blocks)))
        blocks.extend(e.block_ids[: -(-e.end // block_size)])
        tokens.extend(e.token_ids)
        positions.extend(range(e.start, e.end))
        for part in _slots(e, block_size):
            slots.extend(part)
        if e.sampling is not None:
            num_drawn = 1 + e.num_drafts
            picked_table.extend((len(sampled), num_drawn, e.end - num_drawn, table[-1]))
            sampled.extend(range(end_row - num_drawn, end_row))
        scored.extend(range(row, row + len(e.prompt_targets)))
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise IntegrityError(f"a token id of the plan is outside of the vocabulary, [0, {vocab_size})")
    wide = _to_device(tokens + positions + slots + sampled + scored, torch.int64, device)
    packed = _to_device(table + picked_table + blocks, torch.int32, device)
    tables, block_ids = packed[: -len(blocks)], packed[-len(blocks) :]
    spans = _spans(table, tables[: len(table)], block_ids)
    is_picked = len(sampled) < len(tokens) and not scored
    parts = torch.split(wide, [*[len(tokens)] * 3, len(sampled), len(scored)])
    return StepInputs(
        token_ids=parts[0],
        positions=parts[1],
        slots=parts[2],
        spans=spans,
        sampled=tuple(e for e in entries if e.sampling is not None),
        sampled_rows=parts[3],
        picked=PickedRows(parts[3], _spans(picked_table, tables[len(table) :], block_ids)) if is_picked else None,
        scored=tuple(e for e in entries if e.prompt_targets),
        scored_rows=parts[4],
    )


def _spans(table: array[int], on_device: Tensor, blocks: Tensor) -> Spans:
    """on_device: `table` as it lies there, flat."""
    rows = on_device.view(-1, 4)
    if not table or on_device.device.type == "cpu":
        return Spans(rows, blocks, rows.cpu())
    return Spans(rows, blocks, torch.frombuffer(table, dtype=torch.int32).view(-1, 4))


def _slots(entry: PlanEntry, block_size: int) -> Iterator[range]:
    """Where K and V of the entry's tokens go, block by block."""
    for block in range(entry.start // block_size, -(-entry.end // block_size)):
        first, to_slot = block * block_size, (entry.block_ids[block] - block) * block_size
        yield range(max(entry.start, first) + to_slot, min(entry.end, first + block_size) + to_slot)


def _to_device(numbers: array[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.frombuffer(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

"""A plan as tensors, made once for all layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import IntegrityError
from engine.plan import Plan, PlanEntry

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Consecutive rows of a step that are one query token each, with contexts of similar length."""

    rows: slice
    block_tables: Tensor
    """[B, M] int64, padded with block 0."""
    context_lens: Tensor
    """[B] int64"""
    max_context_len: int


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Consecutive rows of a step that are positions [start, start + T) of one sequence."""

    rows: slice
    block_table: Tensor
    """[M] int64"""
    start: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens in one row: the decode groups first, then the prefill spans."""

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64"""
    slots: Tensor
    """[T] int64: where K and V of each token go, `block * block_size + offset`."""
    decode_groups: tuple[DecodeGroup, ...]
    prefill_spans: tuple[PrefillSpan, ...]
    sampled: tuple[PlanEntry, ...]
    """The entries that draw a token."""
    sampled_rows: Tensor
    """[S] int64: the rows they draw from, 1 + `num_drafts` of each."""


def build_step_inputs(plan: Plan, block_size: int, vocab_size: int, device: torch.device) -> StepInputs:
    """Lay out a plan that has entries. `IntegrityError` where a token id is not in the vocabulary.

    Decode entries are grouped by their number of blocks, between two powers of two: so there are few groups, and none
    pads to more than twice what it needs. All integers travel to the device as one tensor.
    """
    decodes = sorted((e for e in plan.entries if e.num_tokens == 1), key=lambda e: _size_class(e, block_size))
    prefills = [e for e in plan.entries if e.num_tokens > 1]
    entries = decodes + prefills
    groups = [list(group) for _, group in groupby(decodes, key=lambda e: _size_class(e, block_size))]
    token_ids = np.fromiter(chain.from_iterable(e.token_ids for e in entries), np.int64)
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise IntegrityError(f"a token id of the plan is outside of the vocabulary, [0, {vocab_size})")
    ends = np.cumsum([e.num_tokens for e in entries])
    sampled = [i for i, e in enumerate(entries) if e.sampling is not None]
    (tokens, positions, slots, sampled_rows), group_tables, context_lens, prefill_tables = _to_device(
        device,
        [token_ids, *_places(decodes, prefills, block_size), _sampled_rows(entries, ends)],
        [_tables(group, block_size) for group in groups],
        [np.array([e.end for e in group]) for group in groups],
        [_tables([e], block_size)[0] for e in prefills],
    )
    group_ends, prefill_ends = list(accumulate(map(len, groups))), ends[len(decodes) :].tolist()
    return StepInputs(
        tokens,
        positions,
        slots,
        decode_groups=tuple(
            DecodeGroup(slice(end - len(group), end), table, lens, max(e.end for e in group))
            for group, end, table, lens in zip(groups, group_ends, group_tables, context_lens, strict=True)
        ),
        prefill_spans=tuple(
            PrefillSpan(slice(end - e.num_tokens, end), table, e.start)
            for e, end, table in zip(prefills, prefill_ends, prefill_tables, strict=True)
        ),
        sampled=tuple(entries[i] for i in sampled),
        sampled_rows=sampled_rows,
    )


def _sampled_rows(entries: Sequence[PlanEntry], ends: Ints) -> Ints:
    rows = [
        np.arange(end - 1 - e.num_drafts, end) for e, end in zip(entries, ends, strict=True) if e.sampling is not None
    ]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _num_blocks(entry: PlanEntry, block_size: int) -> int:
    return -(-entry.end // block_size)


def _size_class(entry: PlanEntry, block_size: int) -> int:
    return (_num_blocks(entry, block_size) - 1).bit_length()


def _tables(entries: Sequence[PlanEntry], block_size: int) -> Ints:
    """[B, M]: the blocks that hold each entry's context, padded with block 0."""
    tables = np.zeros((len(entries), max(_num_blocks(e, block_size) for e in entries)), dtype=np.int64)
    for row, e in zip(tables, entries, strict=True):
        num_blocks = _num_blocks(e, block_size)
        row[:num_blocks] = e.block_ids[:num_blocks]
    return tables


def _places(decodes: Sequence[PlanEntry], prefills: Sequence[PlanEntry], block_size: int) -> tuple[Ints, Ints]:
    """Positions and slots of all tokens, [T] each."""
    positions = [np.array([e.start for e in decodes], dtype=np.int64)]
    blocks = [np.array([e.block_ids[e.start // block_size] for e in decodes], dtype=np.int64)]
    for e in prefills:
        positions.append(np.arange(e.start, e.end))
        blocks.append(np.array(e.block_ids)[positions[-1] // block_size])
    all_positions = np.concatenate(positions)
    return all_positions, np.concatenate(blocks) * block_size + all_positions % block_size


def _to_device(device: torch.device, *groups: list[Ints]) -> list[list[Tensor]]:
    """The arrays as tensors, grouped as they came: one copy for all."""
    arrays = [array for group in groups for array in group]
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = zip(torch.split(packed, [array.size for array in arrays]), arrays, strict=True)
    tensors = iter([piece.view(array.shape) for piece, array in pieces])
    return [list(islice(tensors, len(group))) for group in groups]

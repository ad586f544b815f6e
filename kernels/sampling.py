"""Drawing tokens from logits: penalties, temperature, top-k, top-p (Holtzman et al., 2020), min-p, the inverse CDF.

Weights of tokens are integers, so that their sums don't depend on an order, and the exponential is a fixed sequence of
float32 operations: from the same logits the C++ kernel and the reference, wherever it runs, draw the same token.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import philox
from kernels.native import function


class Row(NamedTuple):
    """How one row of logits is sampled."""

    temperature: float
    """0 takes the best."""
    repetition: float
    frequency: float
    presence: float
    top_p: float
    top_k: int
    """V for no limit."""
    min_weight: int
    """From `min_weight`."""
    seed: int
    position: int
    history_start: int
    history_end: int
    """The row's tokens so far are history[history_start:history_end], and none where nothing is penalized."""
    num_prompt: int
    """So many of them are the prompt's."""
    mask: int
    """Index of the row's mask, -1 for none."""


_PACKED = struct.Struct("ffffdqqQQqqqq")
"""A `Row` as the kernel has it."""
_ROW = np.dtype([(name, kind) for name, kind in zip(Row._fields, _PACKED.format, strict=True)])

FULL_WEIGHT = 2**44
"""Weight of the best token; a vocabulary below 2^19 sums up to less than 2^63."""
NOTHING = -1
"""In place of a token, where each is forbidden."""

_LEAST = -40.0  # (logit - best) / temperature below which a weight rounds to 0
_LOG2_E = 1.44269502162933349609375
_LN_2 = (0.693145751953125, 1.428606765330187045037746429443359375e-06)  # the first has few bits: products are exact
_EXP_TERMS = (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # below the leading 1 / 720
_FIRST_WIDTH = 128  # a nucleus rarely holds more tokens, and to find the largest few is far cheaper than to sort all
_WIDER = 16


def min_weight(min_p: float) -> int:
    """The least weight of a token that is `min_p` times as likely as the best."""
    return math.ceil(min_p * FULL_WEIGHT)


def num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def sample_rows(
    logits: Tensor, rows: Sequence[Row], history: npt.NDArray[np.int32] | None, masks: npt.NDArray[np.uint32] | None
) -> list[int]:
    """A token for each row, or `NOTHING`.

    logits: [R, V] float32, contiguous, may be changed; history: [N], or None where no row has any; masks: [M, ceil(V /
    32)], bit i of word j allows token 32 j + i, or None where no row has one. Of equal logits the lower token id is the
    better.
    """
    run = function("penstock_sample", "pqqpppp")
    packed = b"".join(starmap(_PACKED.pack, rows))
    if run is None or logits.device.type != "cpu":
        return _sample_rows(logits, np.frombuffer(packed, _ROW), history, masks)
    tokens = (ctypes.c_int64 * len(rows))()
    addresses = (None if table is None else table.ctypes.data for table in (history, masks))
    run(logits.data_ptr(), *logits.shape, packed, *addresses, ctypes.addressof(tokens))
    return list(tokens)


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[list[list[float]], list[list[int]], list[int]]:
    """Log-probabilities of one token a row and of the `num_top` best: values and ids, [R][1 + num_top], and ranks [R].

    logits: [R, V] float32, contiguous. The rank of the best token is 1.
    """
    run = function("penstock_logprobs", "pqqpqppp")
    if run is None or logits.device.type != "cpu":
        return _token_logprobs(logits, token_ids, num_top)
    shape = len(token_ids), 1 + num_top
    tokens, ranks = np.array(token_ids, np.int64), np.empty(len(token_ids), np.int64)
    values, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
    addresses = (values.ctypes.data, ids.ctypes.data, ranks.ctypes.data)
    run(logits.data_ptr(), *logits.shape, tokens.ctypes.data, num_top, *addresses)
    return values.tolist(), ids.tolist(), ranks.tolist()


# ---- the reference


def _sample_rows(
    logits: Tensor,
    rows: npt.NDArray[np.void],
    history: npt.NDArray[np.int32] | None,
    masks: npt.NDArray[np.uint32] | None,
) -> list[int]:
    for i, row in enumerate(rows):
        if masks is not None and row["mask"] >= 0:
            mask_(logits[i], masks[row["mask"]])
        if history is not None and row["history_end"] > row["history_start"]:
            penalize_(logits[i], row, history[row["history_start"] : row["history_end"]])
    tokens = logits.argmax(dim=-1)
    random = torch.from_numpy(np.flatnonzero(rows["temperature"])).to(logits.device)
    if len(random):
        tokens[random] = _draw_rows(logits.index_select(0, random), rows[rows["temperature"] != 0])
    return tokens.masked_fill_(logits.amax(dim=-1).isneginf(), NOTHING).tolist()


def _draw_rows(logits: Tensor, rows: npt.NDArray[np.void]) -> Tensor:
    device, vocab_size = logits.device, logits.shape[1]
    weights = token_weights(logits, torch.from_numpy(rows["temperature"].copy()).to(device))
    weights.masked_fill_(weights < torch.from_numpy(rows["min_weight"].copy()).to(device).unsqueeze(1), 0)
    top_k, top_p = rows["top_k"].clip(max=vocab_size), rows["top_p"]
    filtered = np.flatnonzero((top_k < vocab_size) | (top_p < 1))
    if len(filtered):
        index = torch.from_numpy(filtered).to(device)
        weights[index] = keep_best_(
            weights.index_select(0, index),
            torch.from_numpy(top_k[filtered]).to(device),
            torch.from_numpy(top_p[filtered]).to(device),
            max_top_k=int(top_k[top_k < vocab_size].max(initial=0)),
        )
    uniforms = torch.from_numpy(philox.uniforms(rows["seed"].tolist(), rows["position"].tolist())).to(device)
    return draw(weights, uniforms)


def mask_(logits: Tensor, mask: npt.NDArray[np.uint32]) -> None:
    """Forbid what the mask [ceil(V / 32)] does not allow. logits: [V]"""
    allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), -math.inf)


def penalize_(logits: Tensor, row: np.void, history: npt.NDArray[np.int32]) -> None:
    """Make tokens that were there before less likely. logits: [V]; history: [N]"""
    if row["repetition"] != 1:
        seen = torch.from_numpy(np.unique(history)).to(logits.device)
        values, penalty = logits[seen], float(row["repetition"])
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output, counts = np.unique(history[row["num_prompt"] :], return_counts=True)
    if len(output) and (row["frequency"] != 0 or row["presence"] != 0):
        index = torch.from_numpy(output).to(logits.device)
        often = torch.from_numpy(row["frequency"] * counts.astype(np.float32)).to(logits.device)
        logits[index] = logits[index] - often - float(row["presence"])


def token_weights(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Softmax as integers: `round(2^44 * exp((logit - best) / temperature))`, exp to 3e-7 of itself.

    logits: [B, V] float32, V < 2^19; temperatures: [B] float32, > 0; returns [B, V] int64. A token of weight 0 (below
    3e-14 of the best) can't be drawn.
    """
    best = logits.amax(dim=-1, keepdim=True)
    sharpness = temperatures.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().unsqueeze(1)
    z = ((logits - best) * sharpness).nan_to_num_(nan=_LEAST, neginf=_LEAST).clamp_(min=_LEAST)
    n = (z * _LOG2_E).round_()
    r = z.sub_(n * _LN_2[0]).sub_(n * _LN_2[1])
    p = torch.full_like(r, 1 / 720)
    for term in _EXP_TERMS:
        p.mul_(r).add_(term)
    scale = (n.to(torch.int32) + (127 + 44)).bitwise_left_shift_(23).view(torch.float32)  # 2^(44 + n)
    return p.mul_(scale).to(torch.float64).round_().to(torch.int64)


def keep_best_(weights: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int) -> Tensor:
    """Set the weight of all but the best tokens to 0, in place; of equal tokens those with lower ids are better.

    Kept are the `top_k` best, and of these the fewest that hold a share of `top_p`, but at least one. weights: [B, V]
    int64; top_k: [B] int64, V for no limit; top_p: [B] float64 in (0, 1]; max_top_k: the largest top_k below V, or 0.
    """
    vocab_size = weights.shape[1]
    limits = top_k.unsqueeze(1)
    width = min(max(max_top_k, _FIRST_WIDTH), vocab_size)
    while True:
        best = weights.topk(width, dim=-1).values
        best.masked_fill_(torch.arange(width, device=weights.device) >= limits, 0)
        sums = best.cumsum(dim=-1)
        total = torch.where(limits < vocab_size, sums[:, -1:], weights.sum(dim=-1, keepdim=True))
        needed = (total.to(torch.float64) * top_p.unsqueeze(1)).ceil().to(torch.int64).minimum(total)
        if width == vocab_size or bool((sums[:, -1:] >= needed).all()):
            return _keep_first_(weights, best, num_kept=(sums - best < needed).sum(dim=-1, keepdim=True))
        width = min(_WIDER * width, vocab_size)


def _keep_first_(weights: Tensor, best: Tensor, num_kept: Tensor) -> Tensor:
    """Keep the `num_kept` [B, 1] best tokens of each row. best: [B, W] int64, the largest weights, in order."""
    last = num_kept.minimum((best > 0).sum(dim=-1, keepdim=True)) - 1
    worst = best.gather(1, last.clamp_(min=0))  # a row without weight keeps nothing anyway
    num_ties_kept = num_kept - (best > worst).sum(dim=-1, keepdim=True)
    ties = weights == worst
    dropped = (weights < worst) | (ties & (ties.cumsum(dim=-1) > num_ties_kept))
    return weights.masked_fill_(dropped, 0)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF over the token ids. weights: [B, V] int64; uniforms: [B] float64 in [0, 1); returns [B] int64."""
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    target = (uniforms.unsqueeze(1) * total.to(torch.float64)).to(torch.int64).minimum(total - 1)
    return torch.searchsorted(sums, target, right=True).squeeze(1)


def _token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[list[list[float]], list[list[int]], list[int]]:
    device = logits.device
    chosen = torch.tensor(token_ids, device=device).unsqueeze(1)
    own = logits.gather(1, chosen)
    lower = torch.arange(logits.shape[1], device=device) < chosen
    ranks = 1 + ((logits > own) | ((logits == own) & lower)).sum(dim=1)
    top = logits.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    ids = torch.cat((chosen, top), dim=1)
    totals = token_weights(logits, torch.ones(len(logits), device=device)).sum(dim=1, keepdim=True)
    log_sums = (totals.to(torch.float64) / FULL_WEIGHT).log()
    values = (logits.gather(1, ids) - logits.amax(dim=1, keepdim=True)).to(torch.float64) - log_sums
    return values.to(torch.float32).tolist(), ids.tolist(), ranks.tolist()

"""From logits to tokens and log-probabilities, as the sampling parameters of each request say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import IntegrityError
from core.logprobs import TokenLogprobs
from core.sampling import SamplingParams
from engine.plan import Drawn, PlanEntry
from kernels import sampling

Mask = npt.NDArray[np.uint32]
"""[ceil(V / 32)]: bit i of word j allows token 32 j + i."""
Ints = npt.NDArray[np.int32]


def sample(
    logits: Tensor, entries: Sequence[PlanEntry], masks: Mapping[str, Sequence[Mask]] | None = None
) -> dict[str, Drawn]:
    """Draw the next tokens of each entry; every entry has `sampling`. By request id.

    logits: [R, V] float32, may be changed: 1 + `num_drafts` rows of each entry, in order. masks: what the grammar of a
    request allows, for each of its rows.

    A token depends on its row of logits, the parameters, the seed, its position and, where parameters look back, the
    tokens before it: not on other rows, nor on the step. Of equal logits the lower token id counts as the better. Where
    the parameters forbid every token, the request's first stop token is drawn, or 0. Log-probabilities are those of the
    logits as they came.
    """
    rows = [row for entry in entries for row in _rows(entry, (masks or {}).get(entry.request_id, ()))]
    told = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[torch.tensor(told, device=logits.device)] if told else None
    _forbid_and_bias_(logits, rows)
    tokens = _draw(logits, rows)
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    if raw is not None:
        nums = [rows[i].params.logprobs or 0 for i in told]
        for i, each in zip(told, token_logprobs(raw, [tokens[i] for i in told], nums), strict=True):
            logprobs[i] = each
    drawn, start = {}, 0
    for entry in entries:
        end = start + 1 + entry.num_drafts
        drawn[entry.request_id] = _accept(entry, tokens[start:end], logprobs[start:end])
        start = end
    return drawn


def token_logprobs(logits: Tensor, token_ids: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of one token a row, and of the best. logits: [R, V] float32; nums_top: how many best, [R]."""
    vocab_size = logits.shape[1]
    if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise IntegrityError(f"a token id is outside of the vocabulary, [0, {vocab_size})")
    num_top = min(max(nums_top), vocab_size)
    values, ids, ranks = sampling.token_logprobs(logits.contiguous(), token_ids, num_top)
    return [
        TokenLogprobs(row_ids[0], row[0], rank, tuple(zip(row_ids[1 : 1 + num], row[1 : 1 + num], strict=True)))
        for row_ids, row, rank, num in zip(ids, values, ranks, nums_top, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of logits: what follows some of the drafts of an entry.

    `position` is where the drawn token stands. `history` are all tokens before it, where the parameters look back.
    """

    params: SamplingParams
    position: int
    num_output_tokens: int
    history: Ints
    mask: Mask | None


def _rows(entry: PlanEntry, masks: Sequence[Mask]) -> list[_Row]:
    params = entry.sampling
    assert params is not None, f"{entry.request_id}: logits were computed for an entry that draws no token"
    num_drafts = entry.num_drafts
    history = np.frombuffer(entry.history, np.int32)
    if params.looks_back and num_drafts:
        history = np.concatenate((history, np.array(entry.token_ids[-num_drafts:], np.int32)))
    first = len(history) - num_drafts if params.looks_back else 0
    return [
        _Row(
            params,
            entry.end - num_drafts + offset,
            entry.num_output_tokens + offset,
            history[: first + offset] if params.looks_back else history,
            masks[offset] if masks else None,
        )
        for offset in range(num_drafts + 1)
    ]


def _accept(entry: PlanEntry, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> Drawn:
    """The draws that equal the drafts, up to the first that does not, and that one."""
    drafts = entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
    num_right = next((i for i, draft in enumerate(drafts) if tokens[i] != draft), len(drafts))
    kept = tuple(each for each in logprobs[: num_right + 1] if each is not None)
    return Drawn(tuple(tokens[: num_right + 1]), kept, in_vain=tuple(tokens[num_right + 1 :]))


def _forbid_and_bias_(logits: Tensor, rows: Sequence[_Row]) -> None:
    """Stop tokens before `min_tokens`, ends of bad words, and the bias of single tokens."""
    vocab_size = logits.shape[1]
    forbidden = [(i, t) for i, row in enumerate(rows) for t in _forbidden(row) if t < vocab_size]
    if forbidden:
        at, token_ids = torch.tensor(forbidden, device=logits.device).unbind(1)
        logits[at, token_ids] = float("-inf")
    biased = [(i, *bias) for i, row in enumerate(rows) for bias in row.params.logit_bias if bias[0] < vocab_size]
    if biased:
        at, token_ids = torch.tensor([cell[:2] for cell in biased], device=logits.device).unbind(1)
        logits[at, token_ids] += torch.tensor([cell[2] for cell in biased], device=logits.device)


def _forbidden(row: _Row) -> list[int]:
    params = row.params
    token_ids = list(params.stop_token_ids) if row.num_output_tokens < params.min_tokens else []
    for *before, last in params.bad_words:
        num = len(before)
        if num <= len(row.history) and row.history[len(row.history) - num :].tolist() == before:
            token_ids.append(last)
    return token_ids


def _draw(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    vocab_size = logits.shape[1]
    masks = [mask for row in rows if (mask := _mask(row, vocab_size)) is not None]
    past = [row.history for row in rows if row.params.penalizes]
    mask_index, history_start, table = 0, 0, []
    for row in rows:
        p = row.params
        has_mask, num = row.mask is not None or bool(p.allowed_token_ids), len(row.history) if p.penalizes else 0
        penalties = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
        limits = p.top_p, p.top_k or vocab_size, sampling.min_weight(p.min_p)
        span = history_start, history_start + num, max(num - row.num_output_tokens, 0)
        place = p.seed, row.position, *span, mask_index if has_mask else -1
        table.append(sampling.Row(p.temperature, *penalties, *limits, *place))
        mask_index, history_start = mask_index + has_mask, history_start + num
    history = np.concatenate(past) if past else None
    if history is not None and len(history) and not 0 <= history.min() <= history.max() < vocab_size:
        raise IntegrityError(f"a token id of the history is outside of the vocabulary, [0, {vocab_size})")
    tokens = sampling.sample_rows(logits.contiguous(), table, history, np.stack(masks) if masks else None)
    return [
        token if token != sampling.NOTHING else next(iter(row.params.stop_token_ids), 0)
        for token, row in zip(tokens, rows, strict=True)
    ]


def _mask(row: _Row, vocab_size: int) -> Mask | None:
    """What the grammar and `allowed_token_ids` allow together."""
    if not row.params.allowed_token_ids:
        return row.mask
    bits = np.zeros(32 * sampling.num_mask_words(vocab_size), np.bool_)
    bits[[token_id for token_id in row.params.allowed_token_ids if token_id < vocab_size]] = True
    allowed = np.packbits(bits, bitorder="little").view(np.uint32)
    return allowed if row.mask is None else allowed & row.mask

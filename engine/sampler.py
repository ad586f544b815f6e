"""From logits to tokens, as the sampling parameters of each request say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.sampling import SamplingParams
from engine.plan import PlanEntry
from kernels import philox, sampling


def sample(logits: Tensor, entries: Sequence[PlanEntry]) -> list[int]:
    """Draw the next token of each entry; every entry has `sampling`. logits: [B, V] float32, may be changed.

    A token depends on its row of logits, the parameters, the seed, and its position: not on other rows, nor on what was
    drawn before. Of equal logits the lower token id counts as the better. Greedy rows cost an argmax.
    """
    params = [_params(entry) for entry in entries]
    _forbid_stop_tokens_(logits, entries, params)
    random_rows = [row for row, p in enumerate(params) if not p.greedy]
    if not random_rows:
        return logits.argmax(dim=-1).tolist()
    positions = [entries[row].end for row in random_rows]
    if len(random_rows) == len(entries):
        return _draw(logits, params, positions).tolist()
    token_ids = logits.argmax(dim=-1)
    rows = torch.tensor(random_rows, device=logits.device)
    token_ids[rows] = _draw(logits.index_select(0, rows), [params[row] for row in random_rows], positions)
    return token_ids.tolist()


def _params(entry: PlanEntry) -> SamplingParams:
    assert entry.sampling is not None, f"{entry.request_id}: logits were computed for an entry that draws no token"
    return entry.sampling


def _forbid_stop_tokens_(logits: Tensor, entries: Sequence[PlanEntry], params: Sequence[SamplingParams]) -> None:
    """Take the stop tokens from requests that have drawn fewer than `min_tokens`."""
    vocab_size = logits.shape[1]
    cells = [
        (row, token_id)
        for row, (entry, p) in enumerate(zip(entries, params, strict=True))
        if entry.num_output_tokens < p.min_tokens
        for token_id in p.stop_token_ids
        if token_id < vocab_size
    ]
    if cells:
        rows, token_ids = torch.tensor(cells, device=logits.device).unbind(1)
        logits[rows, token_ids] = float("-inf")


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """logits: [B, V]; returns [B] int64."""
    device, vocab_size = logits.device, logits.shape[1]
    weights = sampling.token_weights(logits, torch.tensor([p.temperature for p in params], device=device))
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    top_p = [p.top_p for p in params]
    filtered = [row for row in range(len(params)) if top_k[row] < vocab_size or top_p[row] < 1]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        weights[rows] = sampling.keep_best_(
            weights.index_select(0, rows),
            torch.tensor([top_k[row] for row in filtered], device=device),
            torch.tensor([top_p[row] for row in filtered], dtype=torch.float64, device=device),
            max_top_k=max((k for k in top_k if k < vocab_size), default=0),
        )
    uniforms = torch.from_numpy(philox.uniforms([p.seed for p in params], positions)).to(device)
    return sampling.draw(weights, uniforms)

"""From logits to tokens, as the sampling parameters of each request say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.sampling import SamplingParams
from engine.plan import Drawn, PlanEntry
from kernels import philox, sampling


def sample(logits: Tensor, entries: Sequence[PlanEntry]) -> dict[str, Drawn]:
    """Draw the next tokens of each entry; every entry has `sampling`. By request id.

    logits: [R, V] float32, may be changed: 1 + `num_drafts` rows of each entry, in order.

    A token depends on its row of logits, the parameters, the seed, its position and, where parameters look back, the
    tokens before it: not on other rows, nor on the step. Of equal logits the lower token id counts as the better.
    Greedy rows cost an argmax.
    """
    rows = [_Row(entry, _params(entry), offset) for entry in entries for offset in range(entry.num_drafts + 1)]
    tokens = iter(_draw_rows(logits, rows))
    return {entry.request_id: _accept(entry, [next(tokens) for _ in range(entry.num_drafts + 1)]) for entry in entries}


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of logits: what follows the first `offset` drafts of an entry."""

    entry: PlanEntry
    params: SamplingParams
    offset: int

    @property
    def position(self) -> int:
        """Where the drawn token stands."""
        return self.entry.end - self.entry.num_drafts + self.offset

    @property
    def num_output_tokens(self) -> int:
        return self.entry.num_output_tokens + self.offset


def _accept(entry: PlanEntry, drawn: list[int]) -> Drawn:
    """The draws that equal the drafts, up to the first that does not, and that one."""
    drafts = entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
    num_right = next((i for i, draft in enumerate(drafts) if drawn[i] != draft), len(drafts))
    return Drawn(tuple(drawn[: num_right + 1]))


def _draw_rows(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    params, positions = [row.params for row in rows], [row.position for row in rows]
    _forbid_stop_tokens_(logits, rows)
    random_rows = [i for i, p in enumerate(params) if not p.greedy]
    if not random_rows:
        return logits.argmax(dim=-1).tolist()
    if len(random_rows) == len(rows):
        return _draw(logits, params, positions).tolist()
    token_ids = logits.argmax(dim=-1)
    index = torch.tensor(random_rows, device=logits.device)
    drawn = _draw(logits.index_select(0, index), [params[i] for i in random_rows], [positions[i] for i in random_rows])
    token_ids[index] = drawn
    return token_ids.tolist()


def _params(entry: PlanEntry) -> SamplingParams:
    assert entry.sampling is not None, f"{entry.request_id}: logits were computed for an entry that draws no token"
    return entry.sampling


def _forbid_stop_tokens_(logits: Tensor, rows: Sequence[_Row]) -> None:
    """Take the stop tokens from requests that have drawn fewer than `min_tokens`."""
    vocab_size = logits.shape[1]
    cells = [
        (i, token_id)
        for i, row in enumerate(rows)
        if row.num_output_tokens < row.params.min_tokens
        for token_id in row.params.stop_token_ids
        if token_id < vocab_size
    ]
    if cells:
        rows_, token_ids = torch.tensor(cells, device=logits.device).unbind(1)
        logits[rows_, token_ids] = float("-inf")


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

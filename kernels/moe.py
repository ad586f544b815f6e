"""The gate of a mixture of experts: which of them each token goes through (Shazeer et al., 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.native import function


def route(
    gate_logits: Tensor,
    top_k: int,
    renormalize: bool,
    *,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first.

    gate_logits: [T, E]; returns weights [T, top_k] float32 and expert ids [T, top_k] int64. The weights are the scores
    of the chosen, scaled to sum to 1 where `renormalize`, times `scale`. bias: [E] float32, added for the choice only.
    Experts come from the `top_groups` best of `num_groups` groups of neighbours, where a group is as good as its
    `group_best` best experts together (DeepSeek-V2 and V3, 2024).
    """
    wide = gate_logits.to(torch.float32)
    run = function("penstock_route", "pqiiiipiiifpp")
    if run is not None and wide.device.type == "cpu":
        wide, num_tokens = wide.contiguous(), wide.shape[0]
        weights, expert_ids = torch.empty(num_tokens, top_k), torch.empty(num_tokens, top_k, dtype=torch.int64)
        run(
            *(wide.data_ptr(), *wide.shape, top_k, renormalize, scores == "sigmoid"),
            *(None if bias is None else bias.data_ptr(), num_groups, top_groups, group_best, scale),
            *(weights.data_ptr(), expert_ids.data_ptr()),
        )
        return weights, expert_ids
    return _route(wide, top_k, renormalize, scores, bias, (num_groups, top_groups, group_best), scale)


def _route(
    wide: Tensor,
    top_k: int,
    renormalize: bool,
    scores: Literal["softmax", "sigmoid"],
    bias: Tensor | None,
    groups: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_groups, top_groups, group_best = groups
    if scores == "softmax" and renormalize and bias is None and num_groups == 1:  # a softmax over the chosen ones
        best, expert_ids = wide.topk(top_k, dim=-1)
        return best.softmax(dim=-1) * scale, expert_ids
    values = wide.softmax(dim=-1) if scores == "softmax" else wide.sigmoid()
    ranks = values if bias is None else values + bias
    if top_groups < num_groups:
        ranks = _within_groups(ranks, num_groups, top_groups, group_best)
    expert_ids = ranks.topk(top_k, dim=-1).indices
    weights = values.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, expert_ids


def _within_groups(ranks: Tensor, num_groups: int, top_groups: int, group_best: int) -> Tensor:
    """ranks: [T, E]; returns them with minus infinity outside of the best groups."""
    grouped = ranks.view(ranks.shape[0], num_groups, -1)
    groups = grouped.topk(group_best, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, groups, False)
    return grouped.masked_fill(outside.unsqueeze(2), float("-inf")).flatten(1)

"""The gate of a mixture of experts: which of them each token goes through (Shazeer et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.native import function


@dataclass(frozen=True, slots=True)
class Gating:
    """How a gate's logits become experts and their weights.

    The weights are the scores of the chosen, scaled to sum to 1 where `renormalize`, times `scale`. Experts come from
    the `top_groups` best of `num_groups` groups of neighbours, where a group is as good as its `group_best` best
    experts together (DeepSeek-V2 and V3, 2024).
    """

    top_k: int
    renormalize: bool
    scores: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    scale: float = 1.0


def route(gate_logits: Tensor, gating: Gating, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first.

    gate_logits: [T, E]; bias: [E] float32, added to the scores for the choice only; returns weights [T, top_k] float32
    and expert ids [T, top_k] int64.
    """
    wide = gate_logits.to(torch.float32)
    run = function("penstock_route", "pqiiiipiiifpp")
    if run is not None and wide.device.type == "cpu":
        wide, num_tokens, g = wide.contiguous(), wide.shape[0], gating
        weights, expert_ids = torch.empty(num_tokens, g.top_k), torch.empty(num_tokens, g.top_k, dtype=torch.int64)
        run(
            *(wide.data_ptr(), *wide.shape, g.top_k, g.renormalize, g.scores == "sigmoid"),
            *(None if bias is None else bias.data_ptr(), g.num_groups, g.top_groups, g.group_best, g.scale),
            *(weights.data_ptr(), expert_ids.data_ptr()),
        )
        return weights, expert_ids
    return _route(wide, gating, bias)


def _route(wide: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if gating.scores == "softmax" and gating.renormalize and bias is None and gating.num_groups == 1:
        best, expert_ids = wide.topk(gating.top_k, dim=-1)  # a softmax over the chosen ones
        return best.softmax(dim=-1) * gating.scale, expert_ids
    values = wide.softmax(dim=-1) if gating.scores == "softmax" else wide.sigmoid()
    ranks = values if bias is None else values + bias
    if gating.top_groups < gating.num_groups:
        ranks = _within_groups(ranks, gating.num_groups, gating.top_groups, gating.group_best)
    expert_ids = ranks.topk(gating.top_k, dim=-1).indices
    weights = values.gather(1, expert_ids)
    if gating.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * gating.scale, expert_ids


def _within_groups(ranks: Tensor, num_groups: int, top_groups: int, group_best: int) -> Tensor:
    """ranks: [T, E]; returns them with minus infinity outside of the best groups."""
    grouped = ranks.view(ranks.shape[0], num_groups, -1)
    groups = grouped.topk(group_best, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, groups, False)
    return grouped.masked_fill(outside.unsqueeze(2), float("-inf")).flatten(1)

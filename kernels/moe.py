"""Mixture of experts: each token goes through the `top_k` experts that its gate prefers (Shazeer et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.swiglu import swiglu


def route(gate_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first.

    gate_logits: [T, E]; returns weights [T, top_k] float32, from a softmax over all experts, scaled to sum to 1 where
    `renormalize`, and expert ids [T, top_k] int64.
    """
    if renormalize:  # the same as a softmax over the chosen ones
        best, expert_ids = gate_logits.to(torch.float32).topk(top_k, dim=-1)
        return best.softmax(dim=-1), expert_ids
    weights, expert_ids = gate_logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights, expert_ids


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """Weighted sum of each token's experts.

    x: [T, C]; gate_up: [E, 2I, C]; down: [E, C, I]; weights, expert_ids: [T, top_k] from `route`; returns [T, C].

    Tokens are sorted by expert, so each expert runs once over the rows that are its own, without padding.
    """
    num_tokens, top_k = expert_ids.shape
    if num_tokens == 1:
        outputs = [_expert(x, gate_up[e], down[e]) for e in expert_ids[0].tolist()]
        return weights.to(x.dtype) @ torch.cat(outputs)
    flat_ids = expert_ids.flatten()
    order = flat_ids.argsort(stable=True)
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
    counts = flat_ids.bincount(minlength=gate_up.shape[0]).tolist()
    outputs = [_expert(part, gate_up[e], down[e]) for e, part in enumerate(torch.split(rows, counts)) if counts[e]]
    unsorted = torch.cat(outputs).index_select(0, order.argsort()).view(num_tokens, top_k, -1)
    return (unsorted * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x: [N, C]; gate_up: [2I, C]; down: [C, I]; returns [N, C]."""
    return F.linear(swiglu(F.linear(x, gate_up)), down)

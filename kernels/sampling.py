"""Drawing tokens from logits: temperature, top-k, top-p (Holtzman et al., 2020), and the inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE = 2.0**44  # weight of the best token; a vocabulary below 2^19 sums up to less than 2^63
_FIRST_WIDTH = 128  # a nucleus rarely holds more tokens, and to find the largest few is far cheaper than to sort all
_WIDER = 16


def token_weights(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Softmax as integers: `round(2^44 * exp((logit - best) / temperature))`.

    logits: [B, V] float32, V < 2^19; temperatures: [B] float32, > 0; returns [B, V] int64. Integers sum up to the same
    whatever the order, and a token of weight 0 (below 3e-14 of the best) can't be drawn.
    """
    best = logits.amax(dim=-1, keepdim=True)
    divisors = temperatures.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return ((logits - best) / divisors).exp().to(torch.float64).mul_(_SCALE).round_().to(torch.int64)


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
    worst = best.gather(1, num_kept.minimum((best > 0).sum(dim=-1, keepdim=True)) - 1)
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

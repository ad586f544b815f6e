"""Routing against a loop over tokens."""

from typing import Any

import pytest
import torch

from kernels.moe import Gating, route


@pytest.mark.parametrize("renormalize", [True, False])
def test_routes_are_the_best_of_a_softmax(renormalize: bool, device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(40, 8, generator=rng, device=device)
    weights, ids = route(logits, Gating(3, renormalize))
    probabilities = logits.softmax(dim=-1)
    for t in range(40):
        best = sorted(range(8), key=lambda e: -float(probabilities[t, e]))[:3]
        total = float(probabilities[t, best].sum()) if renormalize else 1.0
        assert ids[t].tolist() == best
        torch.testing.assert_close(weights[t], probabilities[t, best] / total)


def test_weights_are_float32_whatever_the_logits_are(device: torch.device, rng: torch.Generator) -> None:
    weights, _ = route(torch.randn(4, 8, generator=rng, device=device).bfloat16(), Gating(2, True))
    assert weights.dtype is torch.float32


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_best", [1, 2])
def test_experts_come_from_the_best_groups(
    scores: Any, group_best: int, device: torch.device, rng: torch.Generator
) -> None:
    logits, bias = torch.randn(40, 12, generator=rng, device=device), torch.randn(12, generator=rng, device=device)
    gating = Gating(3, True, scores, num_groups=4, top_groups=2, group_best=group_best, scale=2.5)
    weights, ids = route(logits, gating, bias)
    values = logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()
    for t in range(40):
        ranks = (values[t] + bias).tolist()
        groups = [sorted(ranks[g * 3 : g * 3 + 3], reverse=True)[:group_best] for g in range(4)]
        best_groups = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
        allowed = [e for e in range(12) if e // 3 in best_groups]
        assert ids[t].tolist() == sorted(allowed, key=lambda e: -ranks[e])[:3]
        chosen = values[t, ids[t]]
        torch.testing.assert_close(weights[t], 2.5 * chosen / chosen.sum())


def test_a_bias_moves_the_choice_and_not_the_weights(device: torch.device) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]], device=device)
    weights, ids = route(logits, Gating(1, False, "sigmoid"), torch.tensor([0.0, 0.0, 5.0], device=device))
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights, logits[:, 2:].sigmoid())

"""Each row as its own parameters say, whatever stands beside it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from core.sampling import SamplingParams
from engine.plan import PlanEntry
from engine.sampler import sample as sample_entries


def sample(logits: torch.Tensor, entries: list[PlanEntry]) -> list[int]:
    """One token for each entry, whatever their request ids."""
    drawn = sample_entries(logits, [replace(entry, request_id=str(i)) for i, entry in enumerate(entries)])
    return [drawn[str(i)].token_ids[0] for i in range(len(entries))]


PARAMS = SamplingParams(max_tokens=100)


def entry(position: int = 5, num_output_tokens: int = 0, **changes: Any) -> PlanEntry:
    return PlanEntry("r", (1,), position - 1, (0,), replace(PARAMS, **changes), num_output_tokens)


def draws(logits: torch.Tensor, num: int, **changes: Any) -> torch.Tensor:
    """Counts [V] of `num` draws from one row of logits, at positions 0 .. num - 1."""
    entries = [entry(position, **changes) for position in range(1, num + 1)]
    tokens = sample(logits.repeat(num, 1), entries)
    return torch.tensor(tokens).bincount(minlength=logits.numel())


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return float(((counts - expected) ** 2 / expected)[kept].sum())


def test_greedy_takes_the_best_and_the_lower_of_equals(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0], [3.0, 1.0, 2.0, 0.0]], device=device)
    assert sample(logits, [entry(temperature=0), entry(temperature=0)]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float, device: torch.device) -> None:
    """19 degrees of freedom: beyond 43.8 once in a thousand."""
    logits = torch.linspace(-1, 1, 20, device=device)
    probabilities = (logits.cpu().double() / temperature).softmax(dim=0)
    assert chi_square(draws(logits, 20_000, temperature=temperature, seed=3), probabilities) < 43.8


def test_draws_with_other_seeds_follow_the_softmax_too(device: torch.device) -> None:
    logits = torch.linspace(-1, 1, 20, device=device)
    entries = [entry(seed=seed) for seed in range(20_000)]
    counts = torch.tensor(sample(logits.repeat(20_000, 1), entries)).bincount(minlength=20)
    assert chi_square(counts, logits.cpu().double().softmax(dim=0)) < 43.8


def test_top_k_keeps_the_proportions_of_the_best(device: torch.device) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.5, -1.0, 2.0], device=device)
    probabilities = torch.zeros(6)
    probabilities[[1, 3, 5]] = torch.tensor([2.0, 2.5, 2.0]).softmax(dim=0)
    assert chi_square(draws(logits, 5000, top_k=3), probabilities) < 13.8  # 2 degrees of freedom


def test_top_p_keeps_the_fewest_that_reach_it(device: torch.device) -> None:
    shares = torch.tensor([0.05, 0.5, 0.15, 0.3], device=device)
    kept = [(draws(shares.log(), 400, top_p=p) > 0).tolist() for p in (1e-6, 0.499, 0.501, 0.799, 0.801, 1.0)]
    best = [False, True, False, False]
    assert kept == [
        best,
        best,
        [False, True, False, True],
        [False, True, False, True],
        [False, True, True, True],
        [True] * 4,
    ]


def test_top_p_counts_shares_of_what_top_k_left(device: torch.device) -> None:
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device)
    assert (draws(shares.log(), 400, top_k=2, top_p=0.5) > 0).tolist() == [True, False, False, False]


def test_top_k_1_is_greedy(device: torch.device) -> None:
    logits = torch.randn(7, 1000, device=device)
    tokens = sample(logits.clone(), [entry(position, top_k=1, seed=position) for position in range(1, 8)])
    assert tokens == logits.argmax(dim=-1).tolist()


def test_a_top_k_beyond_the_vocabulary_has_no_effect(device: torch.device) -> None:
    logits = torch.randn(4, 50, device=device)
    plain = [sample(logits.clone(), [entry(p, seed=9, top_k=k) for p in range(4)]) for k in (0, 50, 10**9)]
    assert plain[0] == plain[1] == plain[2]


def mixed_entries() -> list[PlanEntry]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 200, "top_p": 0.9},
        {"min_tokens": 4, "stop_token_ids": (0, 1)},
    ]
    return [entry(10 + i, seed=i, **kinds[i % len(kinds)]) for i in range(40)]


def test_a_token_does_not_depend_on_batch_mates(device: torch.device) -> None:
    entries = mixed_entries()
    logits = torch.randn(len(entries), 500, device=device) * 3
    together = sample(logits.clone(), entries)
    assert together == [sample(logits[i : i + 1].clone(), [e])[0] for i, e in enumerate(entries)]
    assert together == sample(logits.flip(0).clone(), entries[::-1])[::-1]


def test_seed_and_position_fix_the_token(device: torch.device) -> None:
    logits = torch.zeros(1, 10_000, device=device)
    tokens = {(s, p): sample(logits.clone(), [entry(p, seed=s)])[0] for s in range(4) for p in range(1, 5)}
    assert len(set(tokens.values())) == 16
    assert all(sample(logits.clone(), [entry(p, seed=s)]) == [token] for (s, p), token in tokens.items())


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_stop_tokens_wait_for_min_tokens(changes: dict[str, Any], device: torch.device) -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0, 20.0]], device=device)
    rules = {"min_tokens": 3, "stop_token_ids": (0, 3, 10**6), **changes}
    early = {sample(logits.clone(), [entry(p, num_output_tokens=2, **rules)])[0] for p in range(1, 50)}
    assert early <= {1, 2}
    assert sample(logits.clone(), [entry(num_output_tokens=3, **rules)]) == [3]


def test_a_tiny_temperature_is_greedy(device: torch.device) -> None:
    assert sample(torch.tensor([[1.0, 1.1, 1.05]], device=device), [entry(temperature=1e-300)]) == [1]


def test_the_largest_seed_is_fine(device: torch.device) -> None:
    assert 0 <= sample(torch.zeros(1, 9, device=device), [entry(seed=2**64 - 1)])[0] < 9

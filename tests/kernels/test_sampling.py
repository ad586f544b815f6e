"""Filters and draw against a reference that sorts plain lists."""

import math
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sampling
from kernels.native import library
from kernels.sampling import draw, keep_best_, token_weights

DEVICE = os.environ.get("PENSTOCK_TEST_DEVICE", "cpu")


def kept_by_definition(weights: list[int], top_k: int, top_p: float) -> set[int]:
    """Token ids: the top_k best, of these the fewest that hold a share of top_p; lower ids first among equals."""
    best = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total, held, kept = sum(weights[i] for i in best), 0, set()
    for i in best:
        kept.add(i)
        held += weights[i]
        if held >= math.ceil(top_p * total):
            break
    return {i for i in kept if weights[i] > 0}


def kept(weights: torch.Tensor, top_k: list[int], top_p: list[float]) -> list[set[int]]:
    device, vocab_size = weights.device, weights.shape[1]
    max_top_k = max((k for k in top_k if k < vocab_size), default=0)
    limits, shares = torch.tensor(top_k, device=device), torch.tensor(top_p, dtype=torch.float64, device=device)
    left = keep_best_(weights.clone(), limits, shares, max_top_k)
    assert torch.equal(left[left > 0], weights[left > 0])
    return [set(row.nonzero().flatten().tolist()) for row in left]


def test_weights_are_the_softmax(device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(3, 50, generator=rng, device=device) * 4
    temperatures = torch.tensor([0.5, 1.0, 2.0], device=device)
    weights = token_weights(logits, temperatures).double()
    expected = (logits.double() / temperatures.double().unsqueeze(1)).softmax(dim=-1)
    torch.testing.assert_close(weights / weights.sum(dim=-1, keepdim=True), expected, rtol=1e-5, atol=1e-9)


def test_the_least_temperature_leaves_the_best_token(device: torch.device) -> None:
    weights = token_weights(torch.tensor([[1.0, 3.0, 2.0]], device=device), torch.tensor([1e-45], device=device))
    assert (weights > 0).tolist() == [[False, True, False]]


def test_a_forbidden_token_has_no_weight(device: torch.device) -> None:
    logits = torch.tensor([[1.0, float("-inf"), 2.0]], device=device)
    assert token_weights(logits, torch.ones(1, device=device))[0, 1] == 0


@pytest.mark.parametrize("vocab_size", [5, 127, 128, 129, 3000])
def test_filters_keep_what_they_should(vocab_size: int, device: torch.device) -> None:
    """Rows of many kinds in one batch, with equal weights among them."""
    rng = random.Random(vocab_size)
    rows, top_k, top_p = [], [], []
    for _ in range(60):
        scale = rng.choice([3, 1000, 2**44 // vocab_size])
        rows.append([rng.choice([0, rng.randint(0, scale)]) for _ in range(vocab_size - 1)] + [scale])
        top_k.append(min(rng.choice([1, 2, 20, 150, vocab_size]), vocab_size))
        top_p.append(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]))
    expected = [kept_by_definition(*row) for row in zip(rows, top_k, top_p, strict=True)]
    assert kept(torch.tensor(rows, device=device), top_k, top_p) == expected


def test_rows_do_not_disturb_each_other(device: torch.device, rng: torch.Generator) -> None:
    weights = torch.randint(0, 1000, (8, 600), generator=rng, device=device)
    top_k, top_p = [1, 5, 200, 600, 600, 600, 10, 600], [1.0, 0.5, 0.9, 1e-9, 0.2, 0.999, 1.0, 1.0]
    together = kept(weights, top_k, top_p)
    assert together == [kept(weights[i : i + 1], [top_k[i]], [top_p[i]])[0] for i in range(8)]


def test_a_tiny_top_p_keeps_the_best_token(device: torch.device) -> None:
    assert kept(torch.tensor([[3, 9, 9, 1]], device=device), [4], [1e-300]) == [{1}]


def test_equal_weights_are_kept_in_the_order_of_ids(device: torch.device) -> None:
    assert kept(torch.full((1, 300), 7, device=device), [3], [1.0]) == [{0, 1, 2}]


def test_a_draw_inverts_the_distribution_function(device: torch.device) -> None:
    weights = torch.tensor([[2, 0, 5, 0, 1, 0]], device=device).expand(9, 6)
    uniforms = [0, 1 / 8, 1.99 / 8, 2 / 8, 4 / 8, 6.99 / 8, 7 / 8, 7.99 / 8, 1 - 2**-53]
    tokens = draw(weights.contiguous(), torch.tensor(uniforms, dtype=torch.float64, device=device))
    assert tokens.tolist() == [0, 0, 0, 2, 2, 2, 4, 4, 4]


def test_a_draw_never_leaves_the_largest_sums(device: torch.device) -> None:
    """262144 tokens of full weight: the sum is 2^62, where a double can't tell neighbours apart."""
    weights = torch.full((1, 2**18), 2**44, device=device)
    last = draw(weights, torch.tensor([1 - 2**-53], dtype=torch.float64, device=device))
    assert last.item() == 2**18 - 1


def row(rng: np.random.Generator, vocab_size: int, history_start: int, history_end: int, mask: int) -> sampling.Row:
    return sampling.Row(
        rng.choice([0, 0.3, 1, 2.5, 1e-45]),
        rng.choice([1, 1.3, 0.7]),
        rng.choice([0, 0.5, -1.1]),
        rng.choice([0, 0.3]),
        rng.choice([1, 0.9, 0.5, 0.1, 1e-9]),
        rng.choice([vocab_size, 1, 5, 200, 10**9]),
        sampling.min_weight(rng.choice([0, 0.1, 0.9, 1])),
        int(rng.integers(0, 2**63)),
        int(rng.integers(0, 2**40)),
        history_start,
        history_end,
        (history_end - history_start) // 2,
        mask,
    )


@pytest.mark.skipif(DEVICE == "cpu" and library() is None, reason="there is nothing to compare with the reference")
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 5, 31, 64, 127, 1000, 3001, 9001]),
    spread=st.sampled_from([0.0, 0.1, 1, 3, 20]),
    steps=st.sampled_from([0, 2]),
)
@settings(deadline=None, max_examples=150)
def test_the_kernel_draws_what_the_reference_draws_on_the_cpu(
    seed: int, vocab_size: int, spread: float, steps: int
) -> None:
    """Tokens, and logits after penalties and masks, bit for bit; where `steps`, among many equal logits."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((rng.standard_normal((4, vocab_size)) * spread).astype(np.float32))
    if steps:
        logits = (logits * steps).round() / steps
    history = rng.integers(0, vocab_size, 80).astype(np.int32)
    masks = rng.integers(0, 2**32, (2, sampling.num_mask_words(vocab_size)), dtype=np.uint64).astype(np.uint32)
    rows = [
        row(rng, vocab_size, 20 * i, 20 * i + int(rng.integers(0, 21)), int(rng.choice([-1, 0, 1]))) for i in range(4)
    ]
    ours, theirs = logits.to(DEVICE, copy=True), logits.clone()
    tokens = sampling.sample_rows(ours, rows, history, masks)
    assert tokens == sampling._sample_rows(theirs, np.array(rows, sampling._ROW), history, masks)
    assert torch.equal(ours.cpu(), theirs)
    chosen, num_top = [max(token, 0) for token in tokens], min(vocab_size, 7)
    told, expected = (
        sampling.token_logprobs(logits.to(DEVICE), chosen, num_top),
        sampling._token_logprobs(logits, chosen, num_top),
    )
    assert told[1:] == expected[1:]
    assert torch.allclose(torch.tensor(told[0]), torch.tensor(expected[0]), rtol=0 if DEVICE == "cpu" else 1e-6, atol=0)


def test_log_probabilities_and_ranks(device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(3, 50, generator=rng, device=device) * 4
    values, ids, ranks = sampling.token_logprobs(logits, [7, 8, 9], 50)
    expected = logits.double().log_softmax(dim=-1)
    for i, token in enumerate([7, 8, 9]):
        assert ids[i] == [token, *logits[i].argsort(descending=True).tolist()]
        assert ids[i][ranks[i]] == token
        torch.testing.assert_close(torch.tensor(values[i]).double(), expected[i, ids[i]].cpu(), rtol=1e-6, atol=1e-6)


def test_nothing_is_drawn_where_all_is_forbidden(device: torch.device) -> None:
    rows = [sampling.Row(temperature, 1, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 0) for temperature in (0, 1)]
    nothing = np.zeros((1, 1), np.uint32)
    assert sampling.sample_rows(torch.zeros(2, 9, device=device), rows, None, nothing) == [-1, -1]

"""Each row as its own parameters say, whatever stands beside it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import IntegrityError
from core.logprobs import TokenLogprobs
from core.sampling import SamplingParams
from engine.plan import PlanEntry
from engine.sampler import sample as sample_entries
from engine.sampler import token_logprobs


def sample(logits: torch.Tensor, entries: list[PlanEntry]) -> list[int]:
    """One token for each entry, whatever their request ids."""
    drawn = sample_entries(logits, [entry._replace(request_id=str(i)) for i, entry in enumerate(entries)])
    return [drawn[str(i)].token_ids[0] for i in range(len(entries))]


PARAMS = SamplingParams(max_tokens=100)


def entry(position: int = 5, num_output_tokens: int = 0, history: list[int] | None = None, **changes: Any) -> PlanEntry:
    past = np.array(history or [], np.int32).tobytes()
    return PlanEntry("r", (1,), position - 1, (0,), replace(PARAMS, **changes), num_output_tokens, history=past)


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


VOCAB = 40
PROMPT, OUTPUT = [3, 5, 3, 9], [7, 5, 7, 7, 11]


def ranking(logits: torch.Tensor, **changes: Any) -> list[int]:
    """All tokens that greedy sampling takes, best first: each is forbidden once it was drawn."""
    tokens: list[int] = []
    bias = tuple(changes.pop("logit_bias", ()))
    while len(tokens) < logits.numel():
        rules = entry(10, len(OUTPUT), PROMPT + OUTPUT, temperature=0, **changes, logit_bias=bias)
        left = logits.clone()
        left[tokens] = -1e9
        token = sample(left.unsqueeze(0), [rules])[0]
        if token in tokens:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("penalty", [0.6, 1.5])
def test_repetition_penalty_ranks_as_transformers_does(penalty: float, device: torch.device) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.linspace(-3, 3, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))]
    processed = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits.unsqueeze(0).clone())
    expected = processed[0].sort(descending=True, stable=True).indices.tolist()
    assert ranking(logits.to(device), repetition_penalty=penalty) == expected


def test_frequency_and_presence_count_output_only(device: torch.device) -> None:
    logits = torch.linspace(0, 3, VOCAB)
    naive = logits.clone()
    for token in set(OUTPUT):
        naive[token] -= 0.31 * OUTPUT.count(token) + 0.17
    expected = naive.sort(descending=True, stable=True).indices.tolist()
    assert ranking(logits.to(device), frequency_penalty=0.31, presence_penalty=0.17) == expected


def test_logit_bias_is_added(device: torch.device) -> None:
    logits = torch.arange(6.0, device=device)
    assert sample(logits.unsqueeze(0), [entry(temperature=0, logit_bias=((2, 4.5), (10**6, 9.0)))]) == [2]
    assert sample(logits.unsqueeze(0).clone(), [entry(temperature=0, logit_bias=((5, -100.0),))]) == [2]


def test_bad_words_forbid_what_transformers_forbids(device: torch.device) -> None:
    from transformers import NoBadWordsLogitsProcessor

    words = [[4], [11, 8], [7, 11, 9], [5, 11, 10], [11], [2, 3, 5, 3, 9, 7, 5, 7, 7, 11, 6]]
    history = torch.tensor([PROMPT + OUTPUT])
    processed = NoBadWordsLogitsProcessor(words)(history, torch.zeros(1, VOCAB))
    allowed = set(processed[0].isfinite().nonzero().flatten().tolist())
    rules = {"bad_words": tuple(map(tuple, words)), "temperature": 1.0}
    rows = [entry(p, len(OUTPUT), PROMPT + OUTPUT, **rules) for p in range(1, 1000)]
    assert set(sample(torch.zeros(len(rows), VOCAB, device=device), rows)) == allowed


def test_min_p_keeps_what_transformers_keeps(device: torch.device) -> None:
    from transformers import MinPLogitsWarper

    logits = torch.linspace(0, 4, VOCAB)
    nothing: Any = torch.zeros(1, 1, dtype=torch.long)
    kept = MinPLogitsWarper(0.3)(nothing, logits.unsqueeze(0) / 2)[0].isfinite()
    assert torch.equal(draws(logits.to(device), 2000, min_p=0.3, temperature=2.0) > 0, kept)


def test_allowed_tokens_are_the_only_ones(device: torch.device) -> None:
    counts = draws(torch.zeros(VOCAB, device=device), 300, allowed_token_ids=(3, 38, 10**6))
    assert counts.nonzero().flatten().tolist() == [3, 38]


def test_parameters_that_leave_no_token_end_the_request(device: torch.device) -> None:
    rules: dict[str, Any] = {"allowed_token_ids": (3,), "bad_words": ((3,),), "stop_token_ids": (17,)}
    assert sample(torch.zeros(2, VOCAB, device=device), [entry(**rules), entry(temperature=0, **rules)]) == [17, 17]


def test_log_probabilities_are_those_of_the_model(device: torch.device) -> None:
    """Whatever the parameters do to the logits, and only where they are asked for."""
    logits = torch.randn(2, VOCAB, device=device) * 3
    expected = logits.double().log_softmax(dim=-1)
    rules = {"temperature": 0, "logit_bias": ((4, 100.0),), "repetition_penalty": 2.0, "logprobs": 3}
    rows = [entry(10, 1, PROMPT, **rules)._replace(request_id="a"), entry()._replace(request_id="b")]
    drawn = sample_entries(logits, rows)
    [told] = drawn["a"].logprobs
    assert (told.token_id, drawn["a"].token_ids, drawn["b"].logprobs) == (4, (4,), ())
    assert told.logprob == pytest.approx(expected[0, 4].item(), abs=1e-5)
    assert told.rank == 1 + (expected[0] > expected[0, 4]).sum().item()
    assert [token for token, _ in told.top] == expected[0].argsort(descending=True)[:3].tolist()


def test_a_token_outside_of_the_vocabulary_is_an_error_and_no_read_of_foreign_memory(device: torch.device) -> None:
    logits = torch.zeros(1, VOCAB, device=device)
    with pytest.raises(IntegrityError, match="outside of the vocabulary"):
        token_logprobs(logits, [VOCAB], [0])
    with pytest.raises(IntegrityError, match="outside of the vocabulary"):
        sample(logits, [entry(10, 1, [3, VOCAB, 4], repetition_penalty=2.0)])


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.9]),
        "top_k": st.sampled_from([0, 3, 20]),
        "top_p": st.sampled_from([1.0, 0.9, 0.4]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "presence_penalty": st.sampled_from([0.0, -0.3]),
        "bad_words": st.sampled_from([(), ((4,), (1, 2))]),
        "logit_bias": st.sampled_from([(), ((5, 2.0), (6, -3.0))]),
        "allowed_token_ids": st.sampled_from([(), tuple(range(2, 30))]),
        "min_tokens": st.sampled_from([0, 4]),
        "logprobs": st.sampled_from([None, 2]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@given(params=parameters, mates=st.lists(parameters, max_size=3), data=st.data())
@settings(deadline=None, max_examples=100)
def test_tokens_are_the_same_alone_batched_drafted_and_resumed(
    params: dict[str, Any], mates: list[dict[str, Any]], data: Any
) -> None:
    """A made-up model, whose logits depend on the tokens before."""

    def logits(tokens: list[int]) -> torch.Tensor:
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)) * 2

    def step(tokens: list[int], drafts: list[int], name: str = "a", **changes: Any) -> tuple[PlanEntry, torch.Tensor]:
        sampling = replace(PARAMS, stop_token_ids=(0,), **{**params, **changes})
        at = PlanEntry(name, (*tokens[-1:], *drafts), len(tokens) - 1, (0,), sampling, len(tokens) - 3, len(drafts))
        rows = torch.stack([logits([*tokens, *drafts[:i]]) for i in range(len(drafts) + 1)])
        return at._replace(history=np.array(tokens, np.int32).tobytes() if sampling.looks_back else b""), rows

    def run(steps: list[tuple[PlanEntry, torch.Tensor]]) -> Any:
        return sample_entries(torch.cat([rows for _, rows in steps]), [at for at, _ in steps])["a"]

    tokens: list[int] = [1, 2, 1]
    told: list[TokenLogprobs] = []
    for _ in range(6):
        drawn = run([step(tokens, [])])
        tokens, told = [*tokens, *drawn.token_ids], [*told, *drawn.logprobs]
    num_known = data.draw(st.integers(3, 8))
    drafts: list[int] = tokens[num_known:]
    if data.draw(st.booleans()) and drafts:
        drafts[-1] = (drafts[-1] + 1) % VOCAB
    beside = [step([1, 2, 1], [], str(i), **mate) for i, mate in enumerate(mates)]
    place = data.draw(st.integers(0, len(beside)))
    again = run([*beside[:place], step(tokens[:num_known], drafts), *beside[place:]])
    num = len(again.token_ids)
    assert list(again.token_ids)[: 9 - num_known] == tokens[num_known : num_known + num]
    assert list(again.logprobs)[: 9 - num_known] == told[num_known - 3 : num_known - 3 + num]

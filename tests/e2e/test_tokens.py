"""What comes out of a cluster is what the model says, whichever way the request went."""

from __future__ import annotations

import random

import pytest

from penstock import Client
from tests.e2e.conftest import Oracle, Serving

LENGTHS = (1, 2, 15, 16, 17, 64, 250, 600, 1100)
"""Around a block, and over one and two chunks of prefill."""


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, 3000) for _ in range(length)] for length in LENGTHS]


def generate(serving: Serving, prompt: list[int], **sampling: float) -> tuple[tuple[int, ...], str, str]:
    with serving.client() as client:
        generation = client.generate(token_ids=prompt, max_tokens=24, ignore_eos=True, **sampling)  # type: ignore[arg-type]
        assert generation.text is not None
        assert generation.stats is not None
        return generation.token_ids, generation.stats.prefill_worker, generation.stats.decode_worker


def test_disaggregated_and_colocated_tokens_are_those_of_transformers(
    cluster: Serving, colocated: Serving, oracle: Oracle
) -> None:
    num_ties = num_different = 0
    for prompt in prompts(1):
        split, prefill, decode = generate(cluster, prompt, temperature=0)
        mixed, alone, also_alone = generate(colocated, prompt, temperature=0)
        assert (prefill, decode, alone, also_alone) == ("prefill-0", "decode-0", "mixed-0", "mixed-0")
        num_ties += oracle.check_greedy(tuple(prompt), split) + oracle.check_greedy(tuple(prompt), mixed)
        num_different += split != mixed
    assert num_different <= num_ties, "tokens differ where the reference sees no near-tie"


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20}])
def test_a_seed_gives_the_same_tokens_split_and_colocated(
    cluster: Serving, colocated: Serving, sampling: dict[str, float]
) -> None:
    prompt = prompts(2)[5]
    split = generate(cluster, prompt, seed=7, **sampling)[0]
    assert split == generate(cluster, prompt, seed=7, **sampling)[0]
    assert split == generate(colocated, prompt, seed=7, **sampling)[0]
    assert split != generate(cluster, prompt, seed=8, **sampling)[0]


def test_the_transfer_carries_every_layer_of_every_position_once(cluster: Serving) -> None:
    with cluster.client() as client:
        generation = client.generate(token_ids=prompts(3)[6], max_tokens=8, ignore_eos=True)
        assert generation.text is not None
    stats = generation.stats
    layers, kv_heads, head_size, float32 = 6, 2, 32, 4
    assert stats is not None
    assert stats.kv_bytes == 250 * layers * 2 * kv_heads * head_size * float32
    assert stats.transfer_s is not None
    assert stats.transfer_s > 0
    assert stats.overlap_ratio is not None
    assert 0 <= stats.overlap_ratio <= 1


def test_a_request_that_asks_for_one_worker_gets_one_and_the_same_tokens(cluster: Serving) -> None:
    told = []
    with cluster.client() as client:
        for mode in ("local", "require"):
            generation = client.generate(token_ids=prompts(3)[6], max_tokens=8, seed=7, disaggregate=mode)
            assert generation.text is not None
            assert generation.stats is not None
            told.append((generation.token_ids, generation.stats.prefill_worker))
    (alone, reader), (apart, other) = told
    assert alone == apart
    assert (reader, other) == ("decode-0", "prefill-0")


def test_a_chat_goes_through_the_template(cluster: Serving) -> None:
    with cluster.client() as client:
        chat = client.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0)
        plain = client.generate("<|user|>hi<|assistant|>", max_tokens=4, temperature=0)
        assert len(chat.text) >= 0
        assert len(plain.text) >= 0
        assert chat.usage is not None
        assert chat.usage.num_prompt_tokens >= 4


def test_text_streams_as_it_comes(cluster: Serving) -> None:
    with Client(cluster.grpc) as client:
        deltas = list(client.generate("def __init__(self", max_tokens=40, temperature=0, ignore_eos=True))
    assert sum(len(delta.token_ids) for delta in deltas) == 40
    assert len(deltas) > 10, "tokens came in lumps"

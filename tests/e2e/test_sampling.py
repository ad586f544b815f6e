"""Sampling parameters on a real cluster, over its front doors and through a transfer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import Any

import openai
import pytest
import torch

from penstock import Generation, TokenLogprobs
from tests.e2e.conftest import Oracle, Serving

PROMPT = tuple(range(100, 164))
NUMBERS = "([0-9]{3}, ){40}end"
"""Long enough for a worker to be killed in the middle of it."""


def close_to_reference(oracle: Oracle, tokens: tuple[int, ...], told: tuple[TokenLogprobs, ...]) -> None:
    """`told` are of the last of `tokens`."""
    with torch.inference_mode():
        logprobs = oracle._model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    for position, each in enumerate(told, start=len(tokens) - len(told)):
        row = logprobs[position - 1]
        assert each.token_id == tokens[position]
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=2e-3)
        assert [p for _, p in each.top] == pytest.approx(row.topk(len(each.top)).values.tolist(), abs=2e-3)


def test_log_probabilities_are_the_models_from_the_first_token_on(
    cluster: Serving, colocated: Serving, oracle: Oracle
) -> None:
    """The first token comes from the prefill worker, the others from decode; penalties and bias do not show in them."""
    for serving in (cluster, colocated):
        with serving.client() as client:
            generation = client.generate(
                token_ids=PROMPT,
                max_tokens=12,
                seed=3,
                frequency_penalty=0.5,
                logit_bias={50: 3.0},
                ignore_eos=True,
                logprobs=3,
                prompt_logprobs=2,
            )
            assert generation.text is not None
        assert len(generation.logprobs) == 12
        close_to_reference(oracle, PROMPT + generation.token_ids, generation.logprobs)
        assert len(generation.prompt_logprobs) == len(PROMPT) - 1
        close_to_reference(oracle, PROMPT, generation.prompt_logprobs)


def test_the_openai_package_gets_json_and_log_probabilities(cluster: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "tags": {"enum": ["x", "y"]}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    sdk = openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="none", max_retries=0)
    answer = sdk.chat.completions.create(
        model="penstock-tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=200,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    choice = answer.choices[0]
    value = json.loads(choice.message.content or "")
    assert value.keys() == {"name", "tags"}
    assert value["tags"] in ("x", "y")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    assert "".join(each.token for each in told).startswith(choice.message.content or "")
    assert {len(each.top_logprobs) for each in told} == {2}
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        sdk.completions.create(model="penstock-tiny", prompt="a", extra_body={"guided_regex": "(("})


@pytest.mark.timeout(180)
def test_penalties_and_grammar_go_on_unchanged_after_a_kill(cluster: Serving) -> None:
    options: Mapping[str, Any] = {
        "token_ids": PROMPT,
        "max_tokens": 400,
        "seed": 5,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "regex": NUMBERS,
        "logprobs": 0,
    }
    with cluster.client() as client:
        undisturbed = client.generate(**options)
        assert undisturbed.text.endswith("end")
        generation = client.generate(**options)
        read(generation, 5)
        os.kill(cluster.pid("decode-0"), signal.SIGKILL)
        assert generation.text == undisturbed.text
    assert generation.stats is not None
    assert generation.stats.num_attempts >= 2
    assert generation.token_ids == undisturbed.token_ids
    assert [told.token_id for told in generation.logprobs] == list(generation.token_ids)
    cluster.wait_until(lambda info: all(w.connected for w in info.workers) and any(p.up for p in info.pairs))


def read(generation: Generation, num_tokens: int) -> None:
    while len(generation.token_ids) < num_tokens and next(generation, None) is not None:
        pass

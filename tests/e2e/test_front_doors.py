"""The ways in, on a real cluster."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from penstock import InvalidRequestError, ModelNotFoundError
from tests.e2e.conftest import Serving

PROMPT = "def __init__(self"


@pytest.fixture
def sdk(cluster: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="none", max_retries=0)


def test_the_openai_package_completes(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model="penstock-tiny", prompt=PROMPT, max_tokens=16, temperature=0)
    chunks = sdk.completions.create(model="penstock-tiny", prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16


def test_the_openai_package_chats(sdk: openai.OpenAI) -> None:
    chat: dict[str, Any] = {"model": "penstock-tiny", "max_tokens": 8, "temperature": 0}
    whole = sdk.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **chat)
    chunks = sdk.chat.completions.create(messages=[{"role": "user", "content": "hi"}], stream=True, **chat)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == streamed
    assert [model.id for model in sdk.models.list()] == ["penstock-tiny"]


def test_usage_tells_how_much_of_a_prompt_was_cached(sdk: openai.OpenAI) -> None:
    salted: dict[str, Any] = {"extra_body": {"cache_salt": "usage"}, "max_tokens": 2, "model": "penstock-tiny"}
    usages = [sdk.completions.create(prompt=PROMPT * 20, **salted).usage for _ in range(2)]
    first, again = (usage.prompt_tokens_details for usage in usages if usage is not None)
    assert first is not None
    assert again is not None
    assert first.cached_tokens == 0
    assert again.cached_tokens == 48, "three whole blocks of the prompt's 60 tokens"


def test_metrics_and_health_tell_of_the_requests(cluster: Serving, sdk: openai.OpenAI) -> None:
    sdk.completions.create(model="penstock-tiny", prompt=PROMPT, max_tokens=4)
    assert httpx.get(f"http://{cluster.http}/health").status_code == 200
    text = httpx.get(f"http://{cluster.http}/metrics").text
    for name in (
        "vllm:time_to_first_token_seconds_count",
        "penstock_stage_seconds_bucket",
        "vllm:request_success_total",
    ):
        assert name in text


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": ""}),
        ("temperature", {"prompt": "x", "temperature": -1}),
        ("top_p", {"prompt": "x", "top_p": 0}),
        ("max_tokens", {"prompt": "x", "max_tokens": 100_000}),
        ("token_ids[1]", {"token_ids": [1, 999_999]}),
    ],
)
def test_bad_input_is_one_error_that_names_the_field(
    cluster: Serving, field: str, arguments: dict[str, object]
) -> None:
    with cluster.client() as client, pytest.raises(InvalidRequestError) as caught:
        assert client.generate(**arguments).text is None  # type: ignore[arg-type]
    assert caught.value.field == field
    assert field in str(caught.value)


def test_an_unknown_model_is_not_found(cluster: Serving, sdk: openai.OpenAI) -> None:
    with cluster.client() as client, pytest.raises(ModelNotFoundError):
        assert client.generate("x", model="other").text is None
    with pytest.raises(openai.NotFoundError):
        sdk.completions.create(model="other", prompt="x")

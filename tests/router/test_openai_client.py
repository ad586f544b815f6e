"""The official client against a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.to_thread
import openai
import pytest

from core.errors import OverloadedError, UnavailableError
from core.request import FinishReason
from tests.router.front_doors import WAIT_S, FrontDoors, front_doors, http_door

pytestmark = pytest.mark.anyio
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[tuple[FrontDoors, str]]:
    """One for all tests: to stop uvicorn takes it a while."""
    with front_doors() as doors:
        async with http_door(doors) as url:
            yield doors, f"{url}/v1"


@pytest.fixture
def base_url(server: tuple[FrontDoors, str]) -> str:
    return server[1]


@pytest.fixture
def doors(server: tuple[FrontDoors, str]) -> FrontDoors:
    doors, _ = server
    doors.dispatcher.reset()
    doors.refusals.clear()
    return doors


@pytest.fixture
async def client(base_url: str, doors: FrontDoors) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


async def test_a_completion(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="the pipe", max_tokens=9, seed=5)
    request = doors.dispatcher.running[0].request
    assert answer.choices[0].text == "the pipe"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model, answer.created) == ("text_completion", "tiny", 1_700_000_000)
    assert answer.id == f"cmpl-{request.request_id}"
    assert answer.system_fingerprint == "f00d"
    assert answer.usage is not None
    num_tokens = len(doors.tokenizer.encode("the pipe"))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        num_tokens,
        num_tokens,
        2 * num_tokens,
    )
    assert (request.sampling.max_tokens, request.sampling.seed) == (9, 5)


async def test_a_streamed_completion(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = "das 水門 ist groß"
    stream = await client.completions.create(
        model="tiny", prompt="the pipe", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "das 水門 ist groß"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(doors.tokenizer.encode("das 水門 ist groß"))


async def test_a_chat(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=3)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].message.content == "the pipe"
    assert answer.id.startswith("chatcmpl-")
    request = doors.dispatcher.running[0].request
    assert request.prompt_token_ids == doors.tokenizer.encode("<|user|>user:hi</s><|user|>assistant:")
    assert request.sampling.max_tokens == 3


async def test_a_streamed_chat(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the pipe"
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_an_answer_goes_back_into_the_next_question(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HI)
    again = [*HI, answer.choices[0].message, {"role": "user", "content": "and?"}]
    await client.chat.completions.create(model="tiny", messages=again)
    expected = "<|user|>user:hi</s><|user|>assistant:the pipe</s><|user|>user:and?</s><|user|>assistant:"
    assert doors.dispatcher.running[1].request.prompt_token_ids == doors.tokenizer.encode(expected)


async def test_several_prompts_and_choices_keep_their_order(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["a", "the pipe"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = [doors.tokenizer.decode(running.request.prompt_token_ids) for running in doors.dispatcher.running]
    assert prompts == ["a", "a", "the pipe", "the pipe"]
    assert len({running.request.sampling.seed for running in doors.dispatcher.running}) == 4
    assert answer.usage is not None
    num_prompt = sum(len(doors.tokenizer.encode(prompt)) for prompt in ("a", "the pipe"))
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == 4 * len(doors.tokenizer.encode("the pipe"))


async def test_streamed_choices_are_told_apart_by_index(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    task = asyncio.create_task(client.chat.completions.create(model="tiny", messages=HI, n=2, stream=True))
    second = await doors.dispatcher.until_running(2)
    first = doors.dispatcher.running[0]
    second.push(*doors.tokenizer.encode("two"), finish=FinishReason.STOP)
    stream = await asyncio.wait_for(task, WAIT_S)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.index == 1 and choice.finish_reason == "stop":
            first.push(*doors.tokenizer.encode("one"), finish=FinishReason.LENGTH)
    assert texts == {0: "one", 1: "two"}


async def test_our_own_parameters_go_in_extra_body(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    extra = {"top_k": 3, "min_tokens": 2, "stop_token_ids": [9], "ignore_eos": True}
    await client.completions.create(model="tiny", prompt=[5, 6], stop="zz", extra_body=extra)
    request = doors.dispatcher.running[0].request
    assert request.prompt_token_ids == [5, 6]
    assert (request.sampling.top_k, request.sampling.min_tokens, request.sampling.stop_token_ids) == (3, 2, (9,))


async def test_a_stop_string_ends_the_answer_before_it(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.finish = None
    answer = await client.completions.create(model="tiny", prompt="a", stop=[" p"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the", "stop")


async def test_the_model_is_listed_and_found(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "penstock"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("who/knows")


async def test_a_bad_request_is_a_bad_request_error_with_its_param(
    doors: FrontDoors, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: got -1") as caught:
        await client.completions.create(model="tiny", prompt="a", temperature=-1)
    error = caught.value
    assert (error.param, error.type, error.code) == ("temperature", "invalid_request_error", "invalid_argument")
    assert doors.dispatcher.running == []


async def test_an_unknown_model_is_a_not_found_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="got 'gpt', must be one of 'tiny'") as caught:
        await client.chat.completions.create(model="gpt", messages=HI)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_a_rate_limit_error_with_a_time_to_retry(
    doors: FrontDoors, client: openai.AsyncOpenAI, stream: bool
) -> None:
    doors.dispatcher.refusal = OverloadedError("the queue is full", retry_after_s=2.1)
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        await client.completions.create(model="tiny", prompt="a", stream=stream)
    assert caught.value.response.headers["retry-after"] == "3"


async def test_the_client_retries_by_itself_after_the_time_it_is_told(
    doors: FrontDoors, client: openai.AsyncOpenAI
) -> None:
    doors.dispatcher.refusal = OverloadedError("the queue is full", retry_after_s=0.0)
    asking = asyncio.create_task(
        client.with_options(max_retries=5).completions.create(model="tiny", prompt="a", max_tokens=4)
    )
    await doors.dispatcher.until(lambda: bool(doors.refusals))
    doors.dispatcher.refusal = None
    assert (await asyncio.wait_for(asking, WAIT_S)).choices[0].text == "the pipe"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_has_a_status_of_its_own(
    doors: FrontDoors, client: openai.AsyncOpenAI, stream: bool
) -> None:
    doors.dispatcher.reply, doors.dispatcher.error = "", UnavailableError("no worker is connected")
    with pytest.raises(openai.InternalServerError, match="no worker is connected") as caught:
        await client.completions.create(model="tiny", prompt="a", stream=stream)
    assert caught.value.status_code == 503


async def test_a_failure_midway_is_an_error_after_the_text(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.error = UnavailableError("both workers are gone")
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    async with asyncio.timeout(WAIT_S):
        assert (await anext(stream)).choices[0].text == "the pipe"
        with pytest.raises(openai.APIError, match="both workers are gone"):
            await anext(stream)


async def test_one_failed_choice_fails_the_call_and_cancels_the_others(
    doors: FrontDoors, client: openai.AsyncOpenAI
) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt=["a", "b", "c"]))
    await doors.dispatcher.until_running(3)
    doors.dispatcher.running[1].stream.fail(UnavailableError("gone"))
    with pytest.raises(openai.InternalServerError, match="gone"):
        await asyncio.wait_for(asking, WAIT_S)
    assert [running.cancelled for running in doors.dispatcher.running] == [True, True, True]


async def test_closing_a_stream_cancels_the_request(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.finish = None
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    async with asyncio.timeout(WAIT_S):
        async for _ in stream:
            break
    await stream.close()
    await doors.dispatcher.until_cancelled()


def sync_calls(base_url: str) -> list[object]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        answer = client.completions.create(model="tiny", prompt="a")
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        try:
            client.completions.create(model="tiny", prompt="")
        except openai.BadRequestError as error:
            return [answer.choices[0].text, streamed, error.param]
    return []


async def test_the_synchronous_client(base_url: str, doors: FrontDoors) -> None:
    call: Callable[[str], list[object]] = sync_calls
    assert await anyio.to_thread.run_sync(call, base_url) == ["the pipe", "the pipe", "prompt"]


async def test_chat_log_probabilities(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    wanted: Any = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 2}
    answer = await client.chat.completions.create(**wanted)
    tokens = doors.tokenizer.encode("the pipe")
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert "".join(each.token for each in content) == "the pipe"
    assert [bytes(each.bytes or []) for each in content] == [doors.tokenizer.token_bytes(token) for token in tokens]
    assert {(each.logprob, len(each.top_logprobs), each.top_logprobs[0].logprob) for each in content} == {
        (-0.5, 2, -0.25)
    }
    streamed = []
    async for chunk in await client.chat.completions.create(**wanted, stream=True):
        streamed += [t for c in chunk.choices if c.logprobs for t in c.logprobs.content or []]
    assert streamed == content


async def test_completion_log_probabilities(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="the pipe", logprobs=1, extra_body={"prompt_logprobs": 0}
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == "the pipe"
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    assert told.token_logprobs == [-0.5] * len(told.tokens)
    best = doors.tokenizer.token_bytes(5).decode()
    assert told.top_logprobs == [{best: -0.25, token: -0.5} for token in told.tokens]
    prompt: Any = answer.choices[0].to_dict()["prompt_logprobs"]
    prompt_ids = doors.dispatcher.running[0].request.prompt_token_ids
    assert prompt[0] is None
    assert [next(iter(place)) for place in prompt[1:]] == [str(token_id) for token_id in prompt_ids[1:]]
    assert prompt[1][str(prompt_ids[1])]["rank"] == 9
    offsets: list[int] = []
    async for chunk in await client.completions.create(model="tiny", prompt="the pipe", logprobs=1, stream=True):
        offsets += [offset for c in chunk.choices if c.logprobs for offset in c.logprobs.text_offset or []]
    assert offsets == told.text_offset


async def test_a_schema_is_compiled_and_a_bad_one_refused(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    def wanted(schema: dict[str, object]) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return {"model": "tiny", "messages": HI, "response_format": form}

    await client.chat.completions.create(**wanted({"type": "object"}))
    assert "json_schema" in doors.dispatcher.running[0].request.sampling.grammar
    with pytest.raises(openai.BadRequestError, match="Invalid type: wat") as refused:
        await client.chat.completions.create(**wanted({"type": "wat"}))
    assert refused.value.param == "response_format.json_schema.schema"

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from core.errors import InvalidRequestError, OverloadedError, RequestCancelledError, UnavailableError
from core.logprobs import TokenLogprobs
from core.request import FinishReason
from router.generation import Done, Generation, TextDelta
from router.validation import GenerateInput, SamplingFields
from tests.router.front_doors import END_OF_TEXT, WAIT_S, FrontDoors, Running, front_doors

pytestmark = pytest.mark.anyio
PROMPT = "the pipe"


@pytest.fixture
def doors() -> Iterator[FrontDoors]:
    with front_doors() as doors:
        yield doors


async def begin(doors: FrontDoors, **sampling: object) -> tuple[Generation, Running]:
    """A generation whose tokens the test pushes itself."""
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    wanted = GenerateInput(PROMPT, SamplingFields(**sampling))  # type: ignore[arg-type]
    generation = doors.generator.start(await doors.generator.prepare(wanted))
    return generation, doors.dispatcher.running[-1]


async def read(generation: Generation) -> tuple[str, list[int], Done | None]:
    text, token_ids, done = "", list[int](), None
    async with asyncio.timeout(WAIT_S):
        async for event in generation:
            assert done is None
            if isinstance(event, Done):
                done = event
            else:
                text += event.text
                token_ids += event.token_ids
    return text, token_ids, done


async def next_delta(generation: Generation) -> TextDelta:
    async with asyncio.timeout(WAIT_S):
        event = await anext(generation)
    assert isinstance(event, TextDelta)
    return event


async def test_tokens_come_out_as_text_with_counts_and_stats_at_the_end(doors: FrontDoors) -> None:
    generation, running = await begin(doors, seed=3)
    tokens = doors.tokenizer.encode("the 水門 pipe")
    running.push(*tokens, finish=FinishReason.LENGTH)
    text, token_ids, done = await read(generation)
    assert (text, token_ids) == ("the 水門 pipe", tokens)
    num_prompt = len(doors.tokenizer.encode(PROMPT))
    assert done == Done(FinishReason.LENGTH, num_prompt, len(tokens), running.stream.stats)
    assert (generation.started.seed, generation.started.num_prompt_tokens) == (3, num_prompt)
    assert not running.cancelled


async def test_a_character_split_over_deltas_appears_once_and_whole(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    texts = []
    for token_id in doors.tokenizer.encode("𝔓"):
        running.push(token_id)
        texts.append((await next_delta(generation)).text)
    assert texts == ["", "", "", "𝔓"]


async def test_an_unfinished_character_at_the_end_is_not_lost(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    running.push(*doors.tokenizer.encode("a𝔓")[:-1], finish=FinishReason.LENGTH)
    assert (await read(generation))[0] == "a\ufffd"


async def test_a_stop_string_ends_the_request_and_the_text_before_it(doors: FrontDoors) -> None:
    generation, running = await begin(doors, stop=("pipe", "zzz"))
    before, after = doors.tokenizer.encode("the pi"), doors.tokenizer.encode("pe feeds")
    running.push(*before, *after)
    text, token_ids, done = await read(generation)
    assert text == "the "
    assert done is not None
    assert done.finish_reason is FinishReason.STOP
    assert (running.stopped, running.cancelled) == (True, False)
    assert token_ids == (before + after)[: len(token_ids)]
    assert doors.tokenizer.decode(token_ids).startswith("the pipe")
    assert "pipe" not in doors.tokenizer.decode(token_ids[:-1])
    assert done.num_output_tokens == len(token_ids)


@pytest.mark.parametrize("together", [True, False])
async def test_where_deltas_are_cut_does_not_change_what_a_stop_string_cuts(doors: FrontDoors, together: bool) -> None:
    generation, running = await begin(doors, stop=("e p",))
    tokens = doors.tokenizer.encode("the pipe that feeds")
    for part in [tokens] if together else [[token_id] for token_id in tokens]:
        running.push(*part)
    text, token_ids, done = await read(generation)
    assert (text, done and done.finish_reason) == ("th", FinishReason.STOP)
    assert "e p" in doors.tokenizer.decode(token_ids)


async def test_text_that_may_begin_a_stop_string_is_held_back_and_not_lost(doors: FrontDoors) -> None:
    generation, running = await begin(doors, stop=("pipeline",))
    running.push(*doors.tokenizer.encode("the pipe"))
    assert (await next_delta(generation)).text == "the "
    running.push(finish=FinishReason.LENGTH)
    assert (await read(generation))[0] == "pipe"


async def test_a_stop_string_completed_by_the_last_character_of_all_counts(doors: FrontDoors) -> None:
    generation, running = await begin(doors, stop=("\ufffd",))
    running.push(*doors.tokenizer.encode("a𝔓")[:-1], finish=FinishReason.LENGTH)
    text, _, done = await read(generation)
    assert (text, done and done.finish_reason) == ("a", FinishReason.STOP)


async def test_stop_strings_count_only_after_min_tokens(doors: FrontDoors) -> None:
    tokens = doors.tokenizer.encode("pipe the pipe")
    generation, running = await begin(doors, stop=("pipe",), min_tokens=len(doors.tokenizer.encode("pipe")))
    running.push(*tokens)
    assert (await read(generation))[0] == "pipe the "


async def test_the_token_that_ends_the_request_has_no_text(doors: FrontDoors) -> None:
    the, pipe = doors.tokenizer.encode("the")[0], doors.tokenizer.encode("p")[0]
    generation, running = await begin(doors, stop_token_ids=(pipe,))
    running.push(the, pipe)
    running.push(finish=FinishReason.STOP)
    text, token_ids, done = await read(generation)
    assert (text, token_ids) == (doors.tokenizer.decode([the]), [the, pipe])
    assert done is not None
    assert done.num_output_tokens == 2


async def test_a_stop_token_before_min_tokens_is_text_like_any_other(doors: FrontDoors) -> None:
    pipe = doors.tokenizer.encode("p")[0]
    generation, running = await begin(doors, stop_token_ids=(pipe,), min_tokens=1)
    running.push(pipe, pipe)
    running.push(finish=FinishReason.STOP)
    assert (await read(generation))[0] == "p"


async def test_end_of_text_is_a_token_without_text(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    running.push(*doors.tokenizer.encode("the"), END_OF_TEXT, finish=FinishReason.STOP)
    text, token_ids, _ = await read(generation)
    assert (text, token_ids[-1]) == ("the", END_OF_TEXT)


async def test_a_failure_comes_after_the_text_before_it(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    running.push(*doors.tokenizer.encode("the"))
    running.stream.fail(UnavailableError("both workers are gone"))
    assert (await next_delta(generation)).text == "the"
    with pytest.raises(UnavailableError, match="both workers are gone"):
        await next_delta(generation)


async def test_closing_cancels_and_ends_the_iteration(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    generation.close()
    generation.close()
    assert running.cancelled
    assert await read(generation) == ("", [], None)


async def test_closing_after_the_end_cancels_nothing(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    running.push(*doors.tokenizer.encode("the"), finish=FinishReason.LENGTH)
    await next_delta(generation)
    generation.close()
    assert not running.cancelled


async def test_a_cancel_by_id_ends_the_stream_with_an_error(doors: FrontDoors) -> None:
    generation, running = await begin(doors)
    assert doors.generator.cancel(running.request.request_id)
    assert not doors.generator.cancel(running.request.request_id)
    with pytest.raises(RequestCancelledError):
        await next_delta(generation)


async def test_equal_prompts_are_prepared_once_and_share_no_list(doors: FrontDoors) -> None:
    wanted = [GenerateInput(PROMPT), GenerateInput("a"), GenerateInput(PROMPT)]
    one, other, again = [valid.request.prompt_token_ids for valid in await doors.generator.prepare_all(wanted)]
    assert one == again != other
    assert one is not again


async def test_no_request_is_prepared_where_one_is_bad(doors: FrontDoors) -> None:
    with pytest.raises(InvalidRequestError):
        await doors.generator.prepare_all([GenerateInput(PROMPT), GenerateInput("")])
    assert [type(error) for error in doors.refusals] == [InvalidRequestError]


async def test_a_refusal_of_the_dispatcher_is_noted_and_raised(doors: FrontDoors) -> None:
    valid = await doors.generator.prepare(GenerateInput(PROMPT))
    doors.dispatcher.refusal = OverloadedError("the queue is full", 2.0)
    with pytest.raises(OverloadedError):
        doors.generator.start(valid)
    assert doors.refusals == [doors.dispatcher.refusal]


async def test_a_long_prompt_is_tokenized_beside_the_loop_and_a_short_one_in_it(
    doors: FrontDoors, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    tokenize = doors.validator.tokenize

    def spy(prompt: str, _: bool | None) -> Sequence[int]:
        threads.append(threading.get_ident())
        return tokenize(prompt)[:5]

    monkeypatch.setattr(doors.validator, "tokenize", spy)
    await doors.generator.prepare(GenerateInput("short"))
    await doors.generator.prepare(GenerateInput("long " * 1000))
    assert [thread == threading.get_ident() for thread in threads] == [True, False]


@pytest.mark.parametrize(("include", "text"), [(False, "the "), (True, "the pi")])
async def test_a_stop_string_is_part_of_the_text_where_it_is_asked_for(
    doors: FrontDoors, include: bool, text: str
) -> None:
    generation, running = await begin(doors, stop=("pi",), include_stop_str_in_output=include)
    running.push(*doors.tokenizer.encode("the pipe"))
    assert (await read(generation))[0] == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [({}, "a"), ({"skip_special_tokens": False}, "<|user|>a"), ({"include_stop_str_in_output": True}, "a")],
)
async def test_special_tokens_have_text_where_it_is_asked_for(doors: FrontDoors, shown: Any, text: str) -> None:
    generation, running = await begin(doors, **shown)
    running.push(2, *doors.tokenizer.encode("a"), END_OF_TEXT, finish=FinishReason.STOP)
    assert (await read(generation))[0] == text


async def test_an_end_token_has_text_where_both_are_asked_for(doors: FrontDoors) -> None:
    generation, running = await begin(doors, skip_special_tokens=False, include_stop_str_in_output=True)
    running.push(*doors.tokenizer.encode("a"), END_OF_TEXT, finish=FinishReason.STOP)
    assert (await read(generation))[0] == "a</s>"


async def test_log_probabilities_end_with_the_tokens_they_are_of(doors: FrontDoors) -> None:
    generation, running = await begin(doors, stop=("th",), logprobs=0)
    tokens = doors.tokenizer.encode("the pipe")
    told = tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in tokens)
    running.stream.push(tokens, logprobs=told)
    delta = await next_delta(generation)
    assert delta.logprobs == told[: len(delta.token_ids)]
    assert len(delta.token_ids) < len(tokens)

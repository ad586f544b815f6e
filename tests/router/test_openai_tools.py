"""Tools over HTTP, with the official client against a real port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from core.request import FinishReason
from tests.router.front_doors import WAIT_S, FrontDoors, front_doors, http_door

pytestmark = pytest.mark.anyio
ASK: Any = [{"role": "user", "content": "weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOW_TOOL: Any = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
    NOW_TOOL,
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[tuple[FrontDoors, str]]:
    """One for all tests: to stop uvicorn takes it a while."""
    with front_doors() as doors:
        async with http_door(doors) as url:
            yield doors, f"{url}/v1"


@pytest.fixture
def doors(server: tuple[FrontDoors, str]) -> FrontDoors:
    doors, _ = server
    doors.dispatcher.reset()
    doors.dispatcher.finish = FinishReason.STOP
    return doors


@pytest.fixture
async def client(server: tuple[FrontDoors, str], doors: FrontDoors) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


async def test_a_call_is_told_apart_from_the_text(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = f"Let me see.\n{CALL}\n{NOW}"
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    calls: Any = choice.message.tool_calls
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "weather", '{"city": "Ulm"}'),
        ("function", "now", "{}"),
    ]
    assert len({call.id for call in calls}) == 2


async def test_a_call_alone_has_no_content(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = CALL
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    assert answer.choices[0].message.content is None


async def test_a_streamed_call_comes_piece_by_piece(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    stream = await start(doors, client)
    running = doors.dispatcher.running[0]
    running.push(*doors.tokenizer.encode('Hm <tool_call>{"name": "weather", "arguments": {"ci'))
    chunk = await anext(stream)
    assert chunk.choices[0].delta.role == "assistant"
    deltas = [(await anext(stream)).choices[0].delta]
    running.push(*doors.tokenizer.encode('ty": "Ulm"}}</tool_call>'))
    deltas.append((await anext(stream)).choices[0].delta)
    running.push(finish=FinishReason.STOP)
    last = await anext(stream)
    assert deltas[0].content == "  Hm"
    begun, more = (delta.tool_calls[0] for delta in deltas)
    assert (begun.index, begun.type) == (0, "function")
    assert (begun.function.name, begun.function.arguments) == ("weather", '{"ci')
    assert begun.id.startswith("call_")
    assert (more.index, more.id, more.function.arguments) == (0, None, 'ty": "Ulm"}')
    assert last.choices[0].finish_reason == "tool_calls"


async def start(doors: FrontDoors, client: openai.AsyncOpenAI) -> Any:
    """A stream whose tokens the test pushes; one must be there for the response to begin."""
    asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, stream=True))
    running = await doors.dispatcher.until_running()
    running.push(*doors.tokenizer.encode("  "))
    return await asking


async def test_text_held_back_as_a_call_comes_at_the_end(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = "a <tool"
    stream = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a <tool"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_call_that_was_cut_off_is_a_matter_of_length(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = CALL[:50], FinishReason.LENGTH
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    assert answer.choices[0].finish_reason == "length"


async def test_one_call_at_a_time_where_that_is_asked(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = CALL + NOW
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or ()) == 1


async def test_a_call_that_must_come_is_forced_by_a_grammar(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = CALL
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = doors.dispatcher.running[0].request.sampling.grammar
    assert "weather" in grammar
    assert "now" in grammar
    named: Any = {"type": "function", "function": {"name": "weather"}}
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice=named)
    assert (answer.choices[0].finish_reason, len(answer.choices[0].message.tool_calls or ())) == ("stop", 1)
    grammar = doors.dispatcher.running[1].request.sampling.grammar
    assert "weather" in grammar
    assert "now" not in grammar


async def test_without_tools_a_tag_is_text(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = CALL
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice="none")
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (CALL, None)
    prompt = doors.tokenizer.decode(doors.dispatcher.running[0].request.prompt_token_ids)
    assert "weather(" not in prompt


async def test_tools_calls_and_results_reach_the_template(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    doors.dispatcher.reply = CALL
    answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    call = (answer.choices[0].message.tool_calls or [])[0]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    turns: Any = [*ASK, answer.choices[0].message, result]
    await client.chat.completions.create(model="tiny", messages=turns, tools=TOOLS)
    prompt = doors.tokenizer.decode(doors.dispatcher.running[1].request.prompt_token_ids)
    assert prompt.startswith("tools:weather,now;")
    assert 'weather({"city": "Ulm"})' in prompt
    assert f"tool:rain[{call.id}]" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
async def test_what_can_not_be_is_refused_by_name(
    doors: FrontDoors, server: tuple[FrontDoors, str], fields: dict[str, Any], param: str
) -> None:
    async with httpx.AsyncClient(timeout=WAIT_S) as http:
        response = await http.post(f"{server[1]}/chat/completions", content=json.dumps({"messages": ASK} | fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert doors.dispatcher.running == []


async def test_a_schema_that_nothing_fits_is_refused(doors: FrontDoors, client: openai.AsyncOpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "never"}}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="tiny", messages=ASK, tools=tools, tool_choice="required")
    assert refused.value.param == "tools"

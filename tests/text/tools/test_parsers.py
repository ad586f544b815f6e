from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.tools.calls import CallArguments, CallBegun, Piece, ToolCallParser
from text.tools.formats import FORMATS, format_of_template

NAMES = frozenset({"weather", "now", "f"})
Calls = list[tuple[str, str]]


def read(parser: ToolCallParser, parts: list[str]) -> tuple[str, Calls]:
    """All text, and all calls as (name, arguments)."""
    pieces: list[Piece] = [piece for part in parts for piece in parser.push(part)] + parser.flush()
    text = ""
    calls: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        match piece:
            case str():
                text += piece
            case CallBegun(index, name):
                assert index == len(calls)
                calls[index] = (name, "")
            case CallArguments(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return text, [*calls.values()]


ANSWERS: list[tuple[str, str, str, Calls]] = [
    ("hermes", "just text < <tool", "just text < <tool", []),
    ("hermes", "  padded\n", "  padded\n", []),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": [1, 2]}}\n</tool_call>\n',
        "Let me see.",
        [("weather", '{"city": "Ulm", "days": [1, 2]}')],
    ),
    (
        "hermes",
        '<tool_call>\n{"arguments": {"s": "a \\" } b"}, "name": "f"}\n</tool_call>\n'
        '<tool_call>{"name":"now"}</tool_call>',
        "",
        [("f", '{"s": "a \\" } b"}'), ("now", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}', "", [("g", "null")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", "a <tool_call>\nnot json</tool_call>", "a<tool_call>\nnot json</tool_call>", []),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}} </tool_call> Done.', " Done.", [("f", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {"x": 1.5}}', "", [("f", '{"x": 1.5}')]),
    (
        "llama3_json",
        '\n<|python_tag|>{"name": "f", "parameters": {}}; {"name": "now", "parameters": {}}',
        "",
        [("f", "{}"), ("now", "{}")],
    ),
    ("llama3_json", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
    ("llama3_json", '{"answer": [1, 2]} is it', '{"answer": [1, 2]} is it', []),
    ("llama3_json", 'See: {"name": "f", "parameters": {}}', 'See: {"name": "f", "parameters": {}}', []),
    ("llama3_json", "<|python", "<|python", []),
    (
        "pythonic",
        '[f(x=1, y=["a)", {"b": true}]), now()]',
        "",
        [("f", '{"x": 1, "y": ["a)", {"b": true}]}'), ("now", "{}")],
    ),
    ("pythonic", "[1, 2] and (3)", "[1, 2] and (3)", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[g(x=1)]", "[g(x=1)]", []),
    ("pythonic", "[f(x=open('/etc'))]", "[f(x=open('/etc'))]", []),
    ("pythonic", "[f(x=-1, s='it\\'s')] ok", "ok", [("f", '{"x": -1, "s": "it\'s"}')]),
    ("pythonic", "[f(x=1", "[f(x=1", []),
    ("pythonic", "plain", "plain", []),
]


@pytest.mark.parametrize(("name", "answer", "text", "calls"), ANSWERS)
@settings(max_examples=20)
@given(data=st.data())
def test_calls_and_text_are_told_apart_wherever_it_is_cut(
    name: Any, answer: str, text: str, calls: Calls, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=12)))
    parts = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(FORMATS[name].parser(NAMES), parts) == (text, calls)


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(alphabet='<tol_ca/>{}[]()"\\:,; namergusf1', max_size=60))
def test_no_text_breaks_a_parser(name: Any, text: str) -> None:
    whole = read(FORMATS[name].parser(NAMES), [text])
    assert read(FORMATS[name].parser(NAMES), [*text]) == whole
    if not whole[1]:
        assert "".join(whole[0].split()) == "".join(text.split())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("hermes", lambda call: f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n"),
        ("llama3_json", lambda call: json.dumps({"name": call["name"], "parameters": call["arguments"]}) + ";"),
    ],
)
@given(arguments=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), min_size=1, max_size=3))
def test_any_arguments_come_back(name: Any, write: Callable[[Any], str], arguments: list[Any]) -> None:
    answer = "".join(write({"name": "f", "arguments": each}) for each in arguments)
    text, calls = read(FORMATS[name].parser(NAMES), [*answer])
    assert text == ""
    assert [json.loads(each) for _, each in calls] == arguments


def test_a_call_is_told_before_its_arguments_are_complete() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    assert parser.push('x <tool_call>{"name": "f", "arguments": {"a') == [
        "x",
        CallBegun(0, "f"),
        CallArguments(0, '{"a'),
    ]
    assert parser.push('": 1}') == [CallArguments(0, '": 1}')]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ tools }} between <tool_call></tool_call>", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_read_off_the_chat_template(source: str, name: str | None) -> None:
    assert format_of_template(source) == name

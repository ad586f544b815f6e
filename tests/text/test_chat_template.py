from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import CheckpointError, InvalidRequestError
from text.chat_template import Chat, ChatMessage, ChatTemplate, ToolCall, template_source

CHAT = Chat(
    (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "Où est l'eau <b>?"),
        ChatMessage("assistant", " Là. "),
        ChatMessage("user", "水"),
    )
)

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BLOCKS = """{% if tools is not none %}
  tools
{% endif %}
{{ bos_token }}
  {% for message in messages %}
    {% if message.role == 'system' %}
      {% continue %}
    {% endif %}
    {% generation %}
{{ message | tojson }}{{ eos_token }}
    {% endgeneration %}
  {% endfor %}
{{ unk_token }}{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}
{{ ns.count }} {{ messages[1:] | map(attribute='role') | join(',') }} {{ {'b': 1, 'a': [1]} | tojson(indent=2) }}
"""


def make(source: str) -> ChatTemplate:
    return ChatTemplate(
        source,
        origin="x/chat_template.jinja",
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        now=lambda: datetime(2026, 3, 1),
    )


@pytest.mark.parametrize("source", [CHATML, BLOCKS], ids=["chatml", "blocks"])
def test_renders_what_transformers_renders(source: str) -> None:
    turns = [{"role": message.role, "content": message.content} for message in CHAT.messages]
    rendered: Any = render_jinja_template(
        [turns], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert [make(source).render(CHAT)] == rendered[0]


def test_dates_come_from_the_clock_given() -> None:
    assert make("{{ strftime_now('%d %b %Y') }}").render(CHAT) == "01 Mar 2026"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_names_the_field_messages(source: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as error:
        make(source).render(CHAT)
    assert error.value.field == "messages"


def test_a_broken_template_names_file_and_line() -> None:
    with pytest.raises(CheckpointError, match=r"x/chat_template\.jinja: chat template, line 2: "):
        make("\n{% for %}")


def test_of_named_templates_the_default_is_taken() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert template_source({"chat_template": named}, "c.json") == "d"
    assert template_source({"chat_template": named[:1]}, "c.json") == "t"
    assert template_source({"chat_template": "s"}, "c.json") == "s"
    assert template_source({}, "c.json") is None


@pytest.mark.parametrize(
    "value",
    [7, [], [{"name": "default"}], [{"name": "a", "template": "1"}, {"name": "b", "template": "2"}]],
)
def test_a_config_without_a_usable_template_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"c\.json: chat_template"):
        template_source({"chat_template": value}, "c.json")


TOOLS = """
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{ tool | tojson }}{%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- for message in messages %}
    {{- message.role + ':' + (message.content or '') }}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {%- if message.tool_call_id %}{{ '[' + message.tool_call_id + ']' }}{%- endif %}
{%- endfor %}
{%- for document in documents or [] %}{{ document.text }}{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{%- endif %}
"""
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Où?", "parameters": {"type": "object"}}}


def test_tools_calls_and_results_are_shown_as_transformers_shows_them() -> None:
    chat = Chat(
        (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "weather", '{"city": "Köln"}'),)),
            ChatMessage("tool", "rain", tool_call_id="c1"),
        ),
        tools=(json.dumps(WEATHER, ensure_ascii=False),),
        documents=('{"text": "x"}',),
        variables='{"enable_thinking": false}',
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    rendered: Any = render_jinja_template(
        [turns], chat_template=TOOLS, tools=[WEATHER], documents=[{"text": "x"}], enable_thinking=False
    )
    assert [make(TOOLS).render(chat)] == rendered[0]


def test_a_template_says_what_it_looks_at() -> None:
    assert make(TOOLS).reads("tools")
    assert not make(CHATML).reads("tools")


def test_a_continued_message_ends_the_prompt() -> None:
    chat = replace(CHAT, messages=CHAT.messages[:3], continue_last=True, add_generation_prompt=False)
    assert make(CHATML).render(chat).endswith("<|im_start|>assistant\nLà.")


def test_a_message_that_the_template_hides_can_not_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages: got .* to be continued"):
        make("{{ 'nothing' }}").render(replace(CHAT, continue_last=True))


def test_an_endless_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="messages: got '5000000 characters'"):
        make("{{ 'x' * 5000000 }}").render(CHAT)

"""Requests as servers get them, and what is made of their answers; over real sockets."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.serve.backends import OpenAIBackend, Shape
from benchmarks.serve.driver import Answer, RequestError
from benchmarks.serve.http_stream import Url
from benchmarks.serve.known_server import DONE, KnownServer, event, serving, token, usage
from benchmarks.serve.workload import Plan, Prompts
from core.errors import ConfigError

PLAN = Plan(0, 0.0, 7, 5)


@pytest.fixture
def fake() -> Iterator[KnownServer]:
    with serving(KnownServer()) as server:
        yield server


def backend(url: str, *, chat: bool = False, **shape: Any) -> OpenAIBackend:
    endpoint = "/v1/chat/completions" if chat else "/v1/completions"
    made = Shape("tiny", Prompts(100), **shape)
    return OpenAIBackend(Url.parse(url, endpoint), made, chat=chat, headers={"Authorization": "Bearer k"})


def ask(url: str, *, chat: bool = False, **shape: Any) -> Answer:
    exchange = backend(url, chat=chat, **shape).prepare(PLAN)

    async def run() -> Answer:
        async with asyncio.timeout(20):
            await exchange.run(time.perf_counter)
        return exchange.answer

    return asyncio.run(run())


def failure(url: str, **shape: Any) -> str:
    with pytest.raises(RequestError) as caught:
        ask(url, **shape)
    return str(caught.value)


def test_a_completion_is_asked_for_with_token_ids(fake: KnownServer) -> None:
    ask(fake.url, extra_body={"top_k": 3, "temperature": 0.5})
    assert fake.requests == [
        {
            "model": "tiny",
            "prompt": Prompts(100).token_ids(PLAN),
            "max_tokens": 5,
            "temperature": 0.5,
            "top_k": 3,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert fake.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer k" in fake.heads[0]


def test_a_chat_is_asked_for_with_a_word_a_token(fake: KnownServer) -> None:
    fake.pieces = [
        event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
        event(choices=[{"delta": {"content": "a"}, "finish_reason": None}]),
        event(choices=[{"delta": {}, "finish_reason": "length"}]),
        DONE,
    ]
    answer = ask(fake.url, chat=True, ignore_eos=False)
    assert len(answer.tokens_s) == 1
    (message,) = fake.requests[0]["messages"]
    assert len(message["content"].split()) == 7
    assert "ignore_eos" not in fake.requests[0]


def test_tokens_are_counted_by_the_server_and_timed_by_message(fake: KnownServer) -> None:
    fake.pieces = [token("a"), token(""), token("bc"), token("", "length"), usage(7, 4), DONE]
    answer = ask(fake.url)
    assert len(answer.tokens_s) == 3  # half a character is a token; an end without text is none
    assert (answer.num_inputs, answer.num_outputs) == (7, 4)


def test_a_last_token_with_its_finish_reason_counts(fake: KnownServer) -> None:
    fake.pieces = [token("a"), token("b", "stop"), DONE]
    answer = ask(fake.url)
    assert len(answer.tokens_s) == 2
    assert answer.num_outputs is None


def test_token_ids_decide_where_they_are_told(fake: KnownServer) -> None:
    def told(*token_ids: int, text: str = "") -> bytes:
        return event(choices=[{"text": text, "token_ids": list(token_ids), "finish_reason": None}])

    fake.pieces = [told(5), told(), told(text="late"), told(6, 7, text="b"), DONE]
    assert len(ask(fake.url).tokens_s) == 2


def test_events_may_be_cut_and_joined_anywhere(fake: KnownServer) -> None:
    whole = b": hello\n\n" + token("ä").replace(b"\n", b"\r\n") + token("b") + DONE
    fake.pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    assert len(ask(fake.url).tokens_s) == 2
    fake.pieces = [whole]
    one, other = ask(fake.url).tokens_s
    assert one == other  # they came together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "503 Unavailable", "whole": b'{"error": {"message": "full"}}'}, "HTTP 503: full"),
        ({"status": "500 Oops", "whole": b"<html>"}, "HTTP 500: <html>"),
        ({"pieces": [token("a"), event(error={"message": "gone"})]}, "gone"),
        ({"pieces": [token("a")]}, "the stream ended before [DONE]"),
        ({"pieces": [token("a")], "cut": True}, "the server hung up in the middle of its answer"),
        ({"pieces": [b"data: {x\n\n"]}, "an event that is none of the OpenAI API: b'{x'"),
        ({"pieces": [b"data: 5\n\n"]}, "an event that is none of the OpenAI API: b'5'"),
        ({"status": "twohundred"}, "no HTTP/1.1 answer: 'HTTP/1.1 twohundred'"),
    ],
    ids=["refused", "no JSON", "error event", "no end", "hung up", "broken JSON", "no object", "no status"],
)
def test_what_goes_wrong_is_told(fake: KnownServer, changes: dict[str, Any], message: str) -> None:
    for name, value in changes.items():
        setattr(fake, name, value)
    assert failure(fake.url) == message


def test_what_came_before_a_failure_is_kept(fake: KnownServer) -> None:
    fake.pieces = [token("a"), event(error={"message": "gone"})]
    exchange = backend(fake.url).prepare(PLAN)
    with pytest.raises(RequestError):
        asyncio.run(exchange.run(time.perf_counter))
    assert len(exchange.answer.tokens_s) == 1


def test_nobody_there_is_told() -> None:
    assert "can't reach 127.0.0.1:1: " in failure("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("base_url", "path"),
    [
        ("http://h:80", "/v1/completions"),
        ("http://h/", "/v1/completions"),
        ("http://h/v1", "/v1/completions"),
        ("http://h/a/v1/", "/a/v1/completions"),
    ],
)
def test_the_base_may_end_in_v1_as_openai_clients_have_it(base_url: str, path: str) -> None:
    assert Url.parse(base_url, "/v1/completions").path == path


@pytest.mark.parametrize("base_url", ["h:80", "ftp://h", "http://", "http://h:99999"])
def test_a_base_that_is_no_url_is_refused(base_url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        Url.parse(base_url, "/v1/completions")


def test_an_address_of_ipv6_is_kept_in_brackets() -> None:
    assert Url.parse("http://[::1]:8000", "/x").authority == "[::1]:8000"


def test_what_is_measured_is_when_the_server_wrote_it(fake: KnownServer) -> None:
    """Against the server's own notes, on one clock: the median token is taken within 5 ms of its writing, on a machine
    that may be busy; `python -m benchmarks.serve.overhead` tells how little it is on a quiet one."""
    fake.pieces = [*(piece for _ in range(50) for piece in (token(), 0.002)), DONE]
    answer = ask(fake.url)
    (written_s,) = fake.written_s
    late_s = [came - wrote for came, wrote in zip(answer.tokens_s, written_s, strict=False)]
    assert min(late_s) >= 0
    assert statistics.median(late_s) < 0.005

"""What goes over the wire, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from core.errors import UnavailableError
from router.openai_http import MAX_BODY_BYTES
from tests.router.front_doors import WAIT_S, FrontDoors, front_doors, http_door

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[tuple[FrontDoors, str]]:
    """One for all tests: to stop uvicorn takes it a while."""
    with front_doors() as doors:
        async with http_door(doors) as url:
            yield doors, url


@pytest.fixture
def doors(server: tuple[FrontDoors, str]) -> FrontDoors:
    doors, _ = server
    doors.dispatcher.reset()
    doors.refusals.clear()
    return doors


@pytest.fixture
async def http(server: tuple[FrontDoors, str], doors: FrontDoors) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server[1], timeout=WAIT_S) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error


async def test_a_stream_is_server_sent_events_ending_in_done(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    doors.dispatcher.reply = "groß 水門"
    response = await http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    *frames, last, rest = response.content.split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
    assert "groß 水門".encode() in response.content
    assert b"usage" not in response.content


async def test_each_token_is_sent_as_it_comes(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "the", None
    async with http.stream("POST", COMPLETIONS, json={"prompt": "a", "stream": True}) as response:
        async with asyncio.timeout(WAIT_S):
            frames = response.aiter_lines()
            first = json.loads((await anext(frames)).removeprefix("data: "))
            assert first["choices"][0]["text"] == "the"
            await anext(frames)
            doors.dispatcher.running[0].push(*doors.tokenizer.encode(" pipe"))
            second = json.loads((await anext(frames)).removeprefix("data: "))
            assert second["choices"][0]["text"] == " pipe"


async def test_a_failure_midway_is_an_error_event_and_no_done(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    doors.dispatcher.error = UnavailableError("gone")
    response = await http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert response.status_code == 200
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {"message": "gone", "type": "service_unavailable", "param": None, "code": "unavailable"}
    }


async def test_a_whole_answer_has_its_length(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": "a"})
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_requests(
    doors: FrontDoors, http: httpx.AsyncClient, stream: bool
) -> None:
    doors.dispatcher.finish = None
    asking = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": ["a", "b"], "stream": stream}))
    await doors.dispatcher.until_running(2)
    asking.cancel()
    await doors.dispatcher.until_cancelled(2)


async def test_a_client_that_leaves_before_the_first_token_cancels_its_request(
    doors: FrontDoors, http: httpx.AsyncClient
) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    asking = asyncio.create_task(http.post(CHAT, json={"messages": [{"role": "user", "content": "a"}], "stream": True}))
    await doors.dispatcher.until_running()
    asking.cancel()
    await doors.dispatcher.until_cancelled()


async def test_an_answer_that_was_read_cancels_nothing(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    await http.post(COMPLETIONS, json={"prompt": "a"})
    await http.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert [running.cancelled for running in doors.dispatcher.running] == [False, False]


async def test_a_queue_that_fills_midway_cancels_what_was_let_in(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": ["a", "b"], "temperature": 0})
    assert response.status_code == 200
    submit = doors.dispatcher.submit

    def submit_one(*args: Any, **kwargs: Any) -> Any:
        doors.dispatcher.refusal = UnavailableError("full") if len(doors.dispatcher.running) > 2 else None
        return submit(*args, **kwargs)

    doors.dispatcher.submit = submit_one  # type: ignore[method-assign]
    doors.dispatcher.finish = None
    assert (await http.post(COMPLETIONS, json={"prompt": ["a", "b"]})).status_code == 503
    assert [running.cancelled for running in doors.dispatcher.running] == [False, False, True]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"{", "body"),
        (b'{"prompt": "\xff\xfe"}', "body"),
        (b"[]", "body"),
        (b'{"prompt": "\\ud83d"}', "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": [999999]}', "prompt[0]"),
        (b'{"prompt": [[1], [-1]]}', "prompt[0]"),
        (b'{"prompt": "a", "max_tokens": 4000}', "max_tokens"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "n": 1000}', "n"),
        (b'{"prompt": "a", "frob": 1}', "frob"),
        (b'{"prompt": "a", "echo": true}', "echo"),
        (b'{"prompt": "a", "stop": ""}', "stop[0]"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
    ],
)
async def test_a_bad_body_is_400_with_its_param(
    doors: FrontDoors, http: httpx.AsyncClient, content: bytes, param: str
) -> None:
    response = await http.post(COMPLETIONS, content=content)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: got ")
    assert doors.dispatcher.running == []


async def test_fields_are_named_as_the_endpoint_knows_them(http: httpx.AsyncClient) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert (
        error_of(await http.post(CHAT, json={**chat, "max_completion_tokens": 0}))["param"] == "max_completion_tokens"
    )
    assert error_of(await http.post(CHAT, json={**chat, "max_tokens": 0}))["param"] == "max_tokens"
    long = {"messages": [{"role": "user", "content": "long " * 200}]}
    assert error_of(await http.post(CHAT, json=long))["param"] == "messages"


async def test_a_body_is_json_whatever_its_content_type_says(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 200


async def test_a_body_over_the_limit_is_refused_before_it_is_all_read(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 400
    assert error_of(response)["message"].endswith(f"must be at most {MAX_BODY_BYTES} bytes")


async def test_an_unknown_path_or_method_is_an_error_object_too(http: httpx.AsyncClient) -> None:
    response = await http.get("/v2/nowhere")
    assert (response.status_code, error_of(response)["type"]) == (404, "not_found_error")
    response = await http.get(COMPLETIONS)
    assert (response.status_code, error_of(response)["type"]) == (405, "invalid_request_error")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/nowhere"])
async def test_every_response_echoes_the_clients_request_id(http: httpx.AsyncClient, path: str) -> None:
    response = await http.request("GET" if path != COMPLETIONS else "POST", path, headers={"x-request-id": "abc-1"})
    assert response.headers.get_list("x-request-id") == ["abc-1"]


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"\xc3\xa9"])
async def test_a_request_id_is_drawn_where_there_is_no_usable_one(http: httpx.AsyncClient, given: bytes | None) -> None:
    response = await http.get("/version", headers=[] if given is None else [(b"x-request-id", given)])
    assert len(response.headers["x-request-id"]) == 32


async def test_health_says_whether_anything_can_serve(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    response = await http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    doors.dispatcher.can_serve = False
    response = await http.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "unavailable"})


async def test_a_trace_of_a_request_that_nobody_knows_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.get("/requests/known/trace")).json() == {"request_id": "known"}
    response = await http.get("/requests/unknown/trace")
    assert (response.status_code, error_of(response)["param"]) == (404, "request_id")


async def test_version_and_metrics(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": "1.2.3"}
    metrics = await http.get("/metrics")
    assert metrics.text == "penstock_up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=")


async def test_models_tell_what_connected_workers_can_hold(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    model = {"id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "penstock", "max_model_len": 128}
    assert (await http.get("/v1/models")).json() == {"object": "list", "data": [model]}
    doors.dispatcher.max_model_len = 64
    assert (await http.get("/v1/models/tiny")).json() == {**model, "max_model_len": 64}
    response = await http.get("/v1/models/who/else")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bug_is_told_to_the_log_and_not_to_the_client(
    doors: FrontDoors,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(doors.dispatcher, "submit", broken)
    response = await http.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert (response.status_code, error_of(response)["message"]) == (500, "internal error of the server")
    assert "ZeroDivisionError: secret" in caplog.text


async def test_the_server_can_be_stopped_with_a_client_still_reading() -> None:
    with front_doors() as doors:
        doors.dispatcher.finish = None
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        async with http_door(doors) as url:
            asking = asyncio.create_task(client.post(f"{url}{COMPLETIONS}", json={"prompt": "a", "stream": True}))
            await doors.dispatcher.until_running()
        assert doors.dispatcher.running[0].cancelled
        with pytest.raises(httpx.HTTPError):
            await asking

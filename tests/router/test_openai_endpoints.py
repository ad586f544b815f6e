"""What the HTTP door answers besides generating, and what it tells of usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from core.errors import InvalidRequestError
from router.info import ClusterInfo
from router.openai_http import read_body
from tests.router.front_doors import WAIT_S, FrontDoors, front_doors, http_app, http_door, http_routes

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


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
    return doors


@pytest.fixture
async def http(server: tuple[FrontDoors, str], doors: FrontDoors) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server[1], timeout=WAIT_S) as client:
        yield client


async def chunks_of(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await http.post(path, json={**body, "stream": True})
    return [json.loads(frame.removeprefix("data: ")) for frame in response.text.split("\n\n")[:-2]]


async def test_tokens_of_a_text(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", json={"model": "tiny", "prompt": "the pipe"})
    token_ids = doors.tokenizer.encode("the pipe")
    assert response.json() == {"count": len(token_ids), "max_model_len": 128, "tokens": token_ids, "token_strs": None}


async def test_tokens_of_a_chat_and_their_names(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    body = {"messages": HI, "add_generation_prompt": False, "return_token_strs": True}
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == doors.tokenizer.encode("<|user|>user:hi</s>")
    assert answer["token_strs"][0] == "<|user|>"
    assert len(answer["token_strs"]) == answer["count"]


async def test_text_of_tokens_with_the_names_of_special_ones(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    token_ids = doors.tokenizer.encode("<|user|>水門 ist groß</s>")
    assert (await http.post("/detokenize", json={"tokens": token_ids})).json() == {
        "prompt": "<|user|>水門 ist groß</s>"
    }
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HI, "frob": 1}, "frob"),
        ("/detokenize", {"tokens": [99999]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_a_bad_body_is_refused_by_name(http: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model_is_not_found(http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(
        path, json={"model": "gpt", "prompt": "a"} if path == "/tokenize" else {"model": "gpt", "tokens": []}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_load_counts_what_runs_and_waits(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    doors.dispatcher.cluster = ClusterInfo((), (), num_queued=3, num_running=4)
    assert (await http.get("/load")).json() == {"server_load": 7}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_ping_is_health(doors: FrontDoors, http: httpx.AsyncClient, method: str) -> None:
    assert (await http.request(method, "/ping")).status_code == 200
    doors.dispatcher.can_serve = False
    assert (await http.request(method, "/ping")).status_code == 503


async def test_usage_tells_what_the_cache_held(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    doors.dispatcher.num_cached_tokens = 3
    answer = (await http.post(COMPLETIONS, json={"prompt": ["the pipe", "a"], "n": 2})).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_usage_so_far_in_every_chunk(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chunks_of(http, CHAT, {"messages": HI, "stream_options": options})
    num_tokens = len(doors.tokenizer.encode("the pipe"))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[-1] == counts[-2] == num_tokens
    assert counts == sorted(counts)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {
        len(doors.dispatcher.running[0].request.prompt_token_ids)
    }


async def test_continuous_usage_is_nothing_without_usage(http: httpx.AsyncClient) -> None:
    chunks = await chunks_of(http, CHAT, {"messages": HI, "stream_options": {"continuous_usage_stats": True}})
    assert not any("usage" in chunk for chunk in chunks)


async def test_token_ids_for_who_asks(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    told = {"return_token_ids": True}
    answer = (await http.post(COMPLETIONS, json={"prompt": "a", **told})).json()
    prompt, output = doors.tokenizer.encode("a"), doors.tokenizer.encode("the pipe")
    assert (answer["choices"][0]["prompt_token_ids"], answer["choices"][0]["token_ids"]) == (prompt, output)
    answer = (await http.post(CHAT, json={"messages": HI, **told})).json()
    assert answer["prompt_token_ids"] == doors.dispatcher.running[-1].request.prompt_token_ids
    chunks = await chunks_of(http, CHAT, {"messages": HI, **told})
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == output


async def test_tokens_go_by_their_ids_for_who_asks(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True}
    told = (await http.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
    assert told["tokens"] == [f"token_id:{token_id}" for token_id in doors.tokenizer.encode("the pipe")]


async def test_a_body_that_does_not_end_is_refused() -> None:
    async def receive() -> Any:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": True}
        await asyncio.Event().wait()
        return {}

    parts = [b"{"]
    with pytest.raises(InvalidRequestError, match="body: got '1 bytes and no end'"):
        await read_body(Request({"type": "http", "method": "POST", "headers": []}, receive), timeout_s=0.05)


async def test_a_request_goes_by_the_id_its_client_chose(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    answer = (await http.post(COMPLETIONS, json={"prompt": "a", "request_id": "mine"})).json()
    assert answer["id"] == "cmpl-mine"
    assert doors.dispatcher.running[0].request.request_id == "mine"


async def test_priority_and_user_reach_the_queue(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    await http.post(COMPLETIONS, json={"prompt": "a", "priority": 7, "user": "ann"})
    request = doors.dispatcher.running[0].request
    assert (request.priority, request.user) == (7, "ann")


async def test_the_trace_of_the_call_goes_on_in_its_requests(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c"
    await http.post(COMPLETIONS, json={"prompt": ["a", "b"]}, headers={"traceparent": f"{trace}-b7ad6b7169203331-01"})
    spans = [running.request.traceparent for running in doors.dispatcher.running]
    assert [span.startswith(trace) for span in spans] == [True, True]
    assert len(set(spans)) == 2


async def test_a_prompt_is_cut_at_its_beginning(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    await http.post(COMPLETIONS, json={"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2})
    assert doors.dispatcher.running[0].request.prompt_token_ids == [7, 8]


async def test_the_last_message_is_gone_on_with(doors: FrontDoors, http: httpx.AsyncClient) -> None:
    turns = [*HI, {"role": "assistant", "content": "the pi"}]
    await http.post(CHAT, json={"messages": turns, "continue_final_message": True})
    prompt = doors.tokenizer.decode(doors.dispatcher.running[0].request.prompt_token_ids)
    assert prompt == "user:hiassistant:the pi"


async def test_the_openapi_document_has_every_route_and_no_other(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    with front_doors() as doors:
        routes = {(route.path, method) for route in http_routes(doors) for method in route.methods}
    told = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert {(path.replace("{name:path}", "{model}"), method) for path, method in routes} == told | {
        ("/openapi.json", "GET")
    }


@pytest.mark.parametrize("value", [0, 1, "", [True]])
async def test_what_only_equals_a_harmless_value_is_not_one(http: httpx.AsyncClient, value: Any) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": "a", "echo": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "echo")


async def test_no_origin_is_allowed_unless_it_was_asked_for(http: httpx.AsyncClient) -> None:
    response = await http.get("/version", headers={"origin": "https://chat.example.com"})
    assert "access-control-allow-origin" not in response.headers


async def test_an_origin_that_was_asked_for_is_allowed() -> None:
    with front_doors() as doors:
        app = http_app(doors, allowed_origins=["https://chat.example.com"])
        asking = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")
        async with asking as http:
            for origin, allowed in (
                ("https://chat.example.com", "https://chat.example.com"),
                ("https://else.org", None),
            ):
                response = await http.get("/version", headers={"origin": origin})
                assert response.headers.get("access-control-allow-origin") == allowed
            asked = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}
            assert (await http.options(CHAT, headers=asked)).status_code == 200

"""What a call of `generate` puts on the wire, and what it refuses to put there."""

from __future__ import annotations

import math
from typing import Any

import pytest

from penstock import Client, InvalidRequestError, Message
from penstock.v1 import inference_pb2 as pb
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import FakeServer, says


def sent(sdk: Sdk, server: FakeServer, prompt: str | None = "hi", **options: Any) -> pb.GenerateRequest:
    server.play(says("x"))
    sdk.text(sdk.generate(prompt, **options))
    return server.requests[-1]


def test_what_is_not_given_stays_unset(sdk: Sdk, server: FakeServer) -> None:
    assert sent(sdk, server) == pb.GenerateRequest(prompt="hi")


def test_zero_is_a_value(sdk: Sdk, server: FakeServer) -> None:
    request = sent(sdk, server, temperature=0, seed=0, top_k=0, min_tokens=0, ignore_eos=False)
    for field in ("temperature", "seed", "top_k", "min_tokens", "ignore_eos"):
        assert request.sampling.HasField(field)


def test_every_option_arrives_under_its_own_name(sdk: Sdk, server: FakeServer) -> None:
    request = sent(
        sdk,
        server,
        model="tiny",
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=-1,
        seed=2**64 - 1,
        min_tokens=2,
        stop=["\n", "水"],
        stop_token_ids=(4, 5),
        ignore_eos=True,
        min_p=0.5,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={7: 2.5},
        bad_words=["no"],
        allowed_token_ids=[8, 9],
        logprobs=3,
        prompt_logprobs=0,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        timeout_s=30,
        request_id="mine",
        cache_salt="ours",
        kv_wire_dtype="int8",
    )
    sampling = pb.SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=-1,
        seed=2**64 - 1,
        min_tokens=2,
        stop=["\n", "水"],
        stop_token_ids=[4, 5],
        ignore_eos=True,
        min_p=0.5,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias=[pb.TokenBias(token_id=7, bias=2.5)],
        bad_words=["no"],
        allowed_token_ids=[8, 9],
        logprobs=3,
        prompt_logprobs=0,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert request == pb.GenerateRequest(
        prompt="hi",
        model="tiny",
        request_id="mine",
        timeout_s=30,
        cache_salt="ours",
        kv_wire_dtype="int8",
        sampling=sampling,
    )


@pytest.mark.parametrize(
    ("option", "value", "wire"),
    [
        ("json_schema", {"type": "object"}, {"json_schema": '{"type": "object"}'}),
        ("json_schema", '{"type": "string"}', {"json_schema": '{"type": "string"}'}),
        ("json_object", True, {"json_object": True}),
        ("regex", "a+", {"regex": "a+"}),
        ("choice", ["a", "b"], {"choice": pb.Choices(texts=["a", "b"])}),
        ("grammar", "start: /a/", {"grammar": "start: /a/"}),
    ],
)
def test_each_structure_has_its_field(sdk: Sdk, server: FakeServer, option: str, value: object, wire: Any) -> None:
    options: Any = {option: value}
    assert sent(sdk, server, **options).sampling == pb.SamplingParams(**wire)


def test_two_structures_or_an_unknown_option_are_refused(sdk: Sdk, server: FakeServer) -> None:
    with pytest.raises(InvalidRequestError, match="regex: must be left out where json_object is given"):
        sent(sdk, server, json_object=True, regex="a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        sent(sdk, server, temprature=1)


def test_one_stop_string_needs_no_list(sdk: Sdk, server: FakeServer) -> None:
    assert list(sent(sdk, server, stop="end").sampling.stop) == ["end"]


def test_an_empty_prompt_is_a_prompt(sdk: Sdk, server: FakeServer) -> None:
    assert sent(sdk, server, "").WhichOneof("input") == "prompt"


@pytest.mark.parametrize("token_ids", [[], (1, 2, 2**32 - 1), range(5)])
def test_token_ids_go_as_they_are(sdk: Sdk, server: FakeServer, token_ids: Any) -> None:
    request = sent(sdk, server, None, token_ids=token_ids)
    assert request.WhichOneof("input") == "token_ids"
    assert list(request.token_ids.ids) == list(token_ids)


def test_messages_may_be_ours_or_mappings(sdk: Sdk, server: FakeServer) -> None:
    chat = [Message("system", "Be brief."), {"role": "user", "content": "水?"}]
    wire = sent(sdk, server, None, messages=chat).messages.messages
    assert [(m.role, m.content) for m in wire] == [("system", "Be brief."), ("user", "水?")]


def test_the_timeout_is_a_deadline_of_the_call_as_well(connect: Connect, server: FakeServer) -> None:
    sent(connect(), server, timeout_s=30)
    sent(connect(timeout_s=50), server)
    sent(connect(), server, timeout_s=math.inf)
    for_call, of_client, none = server.remaining_s
    assert for_call is not None
    assert 20 < for_call < 35
    assert of_client is not None
    assert 40 < of_client < 55
    assert none is None or none > 1e6
    assert not server.requests[2].HasField("timeout_s")


def test_metadata_goes_with_every_call(connect: Connect, server: FakeServer) -> None:
    sent(connect(metadata=[("authorization", "Bearer secret")]), server)
    assert server.metadata[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "prompt"),
        ({"token_ids": [1], "messages": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [2**32]}, "token_ids"),
        ({"token_ids": "12"}, "token_ids"),
        ({"token_ids": 5}, "token_ids"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": 5}, "messages"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "stop": 1}, "stop"),
        ({"prompt": "a", "model": 7}, "model"),
        ({"prompt": "a", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "a", "timeout_s": math.nan}, "timeout_s"),
        ({"prompt": "a", "timeout_s": "10"}, "timeout_s"),
    ],
)
def test_what_cannot_be_sent_is_refused_here_and_names_the_field(
    sdk: Sdk, server: FakeServer, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        sdk.generate(**{"prompt": None, **options})
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)
    assert server.requests == []


def test_refusal_of_a_long_value_stays_short(sdk: Sdk) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sdk.generate(None, token_ids=[*range(100_000), -1])
    assert len(str(caught.value)) < 200


def test_unknown_option_is_a_type_error(sdk: Sdk) -> None:
    with pytest.raises(TypeError, match="temprature"):
        sdk.generate("a", temprature=1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target": ""}, "target"),
        ({"target": "http://127.0.0.1:50051"}, "target"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_retries": -1}, "max_retries"),
        ({"keepalive_s": 0}, "keepalive_s"),
        ({"max_message_bytes": 0}, "max_message_bytes"),
    ],
)
def test_client_refuses_options_that_make_no_sense(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Client(**options)

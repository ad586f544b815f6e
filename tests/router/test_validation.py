from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequestError, UnknownModelError
from core.model_info import SamplingDefaults
from core.sampling import SamplingParams
from router.validation import GenerateInput, Prompt, SamplingFields, ValidRequest
from tests.router.front_doors import END_OF_TEXT, FrontDoors, front_doors
from text.chat_template import Chat, ChatMessage
from text.grammar import Structure

REGEX = Structure("regex", "a+", "regex")


@pytest.fixture(scope="module")
def doors() -> Iterator[FrontDoors]:
    with front_doors() as doors:
        yield doors


def validate(
    doors: FrontDoors, prompt: Prompt = "the pipe", max_model_len: int | None = None, **wanted: Any
) -> ValidRequest:
    """Keywords are fields of GenerateInput or of SamplingFields."""
    ours = {
        name: wanted.pop(name)
        for name in ("model", "request_id", "timeout_s", "default_max_tokens", "cache_salt", "kv_wire_dtype")
        if name in wanted
    }
    request = GenerateInput(prompt, SamplingFields(**wanted), **ours)
    doors.validator.check(request)
    return doors.validator.finish(request, doors.validator.tokenize(prompt), max_model_len)


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in turns))


@pytest.mark.parametrize(
    ("field", "fix", "wanted"),
    [
        ("temperature", "finite number >= 0", {"temperature": -0.1}),
        ("temperature", "finite number >= 0", {"temperature": float("nan")}),
        ("temperature", "at most 100", {"temperature": 1e6}),
        ("top_p", r"in \(0, 1\]", {"top_p": 0.0}),
        ("top_p", r"in \(0, 1\]", {"top_p": 1.5}),
        ("top_k", "0 or -1 for no limit", {"top_k": -2}),
        ("seed", "2\\*\\*64", {"seed": -1}),
        ("seed", "2\\*\\*64", {"seed": 2**64}),
        ("max_tokens", ">= 1", {"max_tokens": 0}),
        (
            "max_tokens",
            "at most 126: the prompt has 2 tokens and max_model_len is 128",
            {"max_tokens": 127, "prompt": (5, 6)},
        ),
        ("min_tokens", r"\[0, max_tokens = 4\]", {"max_tokens": 4, "min_tokens": 5}),
        ("min_p", r"in \[0, 1\]", {"min_p": 1.5}),
        ("repetition_penalty", r"in \(0, 10.0\]", {"repetition_penalty": 0.0}),
        ("frequency_penalty", r"in \[-2, 2\]", {"frequency_penalty": 2.5}),
        ("presence_penalty", r"in \[-2, 2\]", {"presence_penalty": float("nan")}),
        ("logit_bias", r"in \[-100, 100\]", {"logit_bias": ((3, 101.0),)}),
        ("logit_bias[0]", "must be a token id below", {"logit_bias": ((10**6, 1.0),)}),
        ("allowed_token_ids[0]", "must be a token id below", {"allowed_token_ids": (10**6,)}),
        ("bad_words[0]", "must not be empty", {"bad_words": ("",)}),
        ("logprobs", r"in \[0, 20\]", {"logprobs": 21}),
        ("prompt_logprobs", r"in \[0, 20\]", {"prompt_logprobs": -1}),
        ("ignore_eos", "must be false with structured output", {"structure": REGEX, "ignore_eos": True}),
        ("min_tokens", "must be 0 with structured output", {"structure": REGEX, "min_tokens": 1}),
        ("stop[1]", "must not be empty", {"stop": ("a", "")}),
        ("stop", "must be at most 16", {"stop": tuple("abcdefghijklmnopq")}),
        ("stop[0]", "lone surrogate at character 1", {"stop": ("a\ud800",)}),
        ("stop_token_ids[1]", "must be a token id below", {"stop_token_ids": (1, 10**6)}),
        ("prompt", "must not be empty", {"prompt": ""}),
        ("prompt", "lone surrogate at character 3", {"prompt": "the\udfff"}),
        ("prompt", "room for one output token within max_model_len = 128", {"prompt": (5,) * 128}),
        ("token_ids", "at least one token id", {"prompt": ()}),
        ("token_ids[2]", "must be a token id below", {"prompt": (1, 2, -3)}),
        ("token_ids[0]", "must be a token id below", {"prompt": (10**9,)}),
        ("messages", "at least one message", {"prompt": chat()}),
        ("messages[1].content", "lone surrogate", {"prompt": chat(("user", "a"), ("user", "\ud83d"))}),
        ("messages[0].role", "lone surrogate", {"prompt": chat(("\ud83d", "a"))}),
        ("messages", "a user must begin", {"prompt": chat(("assistant", "a"))}),
        ("timeout_s", "seconds > 0", {"timeout_s": 0.0}),
        ("timeout_s", "seconds > 0", {"timeout_s": float("inf")}),
        ("request_id", "at most 128 characters", {"request_id": "x" * 129}),
        ("request_id", "lone surrogate", {"request_id": "\ud800"}),
        ("cache_salt", "at most 128 characters", {"cache_salt": "x" * 129}),
        ("cache_salt", "lone surrogate", {"cache_salt": "\ud800"}),
        ("kv_wire_dtype", "must be one of auto, int8", {"kv_wire_dtype": "int4"}),
    ],
)
def test_what_can_never_succeed_is_refused_by_field_and_fix(
    doors: FrontDoors, field: str, fix: str, wanted: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match=fix) as error:
        validate(doors, **wanted)
    assert error.value.field == field
    error.value.message.encode()  # it can be sent


def test_an_unknown_model_is_refused_by_the_names_there_are(doors: FrontDoors) -> None:
    with pytest.raises(UnknownModelError, match="got 'gpt', must be one of 'tiny'"):
        validate(doors, model="gpt")
    assert validate(doors, model="tiny").request.prompt_token_ids == validate(doors).request.prompt_token_ids


def test_a_chat_without_a_template_is_refused() -> None:
    with front_doors(chat=False) as doors, pytest.raises(InvalidRequestError, match="no chat template"):
        validate(doors, chat(("user", "a")))


def test_a_chat_becomes_the_templates_prompt_without_further_special_tokens(doors: FrontDoors) -> None:
    prompt = validate(doors, chat(("user", "the pipe"))).request.prompt_token_ids
    assert prompt == doors.tokenizer.encode("<|user|>user:the pipe</s><|user|>assistant:")


def test_what_the_client_leaves_unset_is_plain_sampling_to_the_models_length(doors: FrontDoors) -> None:
    valid = validate(doors, (5, 6))
    assert replace(valid.request.sampling, seed=0) == SamplingParams(max_tokens=126, stop_token_ids=(END_OF_TEXT,))
    assert (valid.stop, valid.timeout_s) == ((), None)


def test_the_checkpoints_defaults_come_before_ours_and_after_the_clients() -> None:
    with front_doors(defaults=SamplingDefaults(temperature=0.5, top_p=0.75, top_k=20)) as doors:
        silent = validate(doors).request.sampling
        assert (silent.temperature, silent.top_p, silent.top_k) == (0.5, 0.75, 20)
        told = validate(doors, temperature=0.0, top_p=1.0, top_k=-1).request.sampling
        assert (told.temperature, told.top_p, told.top_k) == (0.0, 1.0, 0)


@pytest.mark.parametrize(("given", "taken"), [(-1, 0), (0, 0), (7, 7), (2**40, None)])
def test_top_k_without_a_limit_is_zero_and_never_more_than_the_vocabulary(
    doors: FrontDoors, given: int, taken: int | None
) -> None:
    assert validate(doors, top_k=given).request.sampling.top_k == (doors.model.vocab_size if taken is None else taken)


def test_numbers_too_small_for_single_precision_keep_their_meaning(doors: FrontDoors) -> None:
    sampling = validate(doors, temperature=1e-300, top_p=1e-300).request.sampling
    assert sampling.greedy
    assert 0 < struct.unpack("f", struct.pack("f", sampling.top_p))[0] < 1e-5


def test_workers_that_hold_less_than_the_model_set_the_limit(doors: FrontDoors) -> None:
    assert validate(doors, (5, 6), max_model_len=32).request.sampling.max_tokens == 30
    assert validate(doors, (5, 6), max_model_len=10**6).request.sampling.max_tokens == 126
    with pytest.raises(InvalidRequestError, match="max_model_len is 32"):
        validate(doors, (5, 6), max_model_len=32, max_tokens=31)


def test_a_default_of_max_tokens_gives_way_to_the_models_length(doors: FrontDoors) -> None:
    assert validate(doors, (5,) * 100, default_max_tokens=16).request.sampling.max_tokens == 16
    assert validate(doors, (5,) * 120, default_max_tokens=16).request.sampling.max_tokens == 8
    assert validate(doors, (5,) * 100, default_max_tokens=16, max_tokens=20).request.sampling.max_tokens == 20


def test_stop_tokens_are_the_clients_and_the_models(doors: FrontDoors) -> None:
    assert validate(doors, stop_token_ids=(7, END_OF_TEXT)).request.sampling.stop_token_ids == (7, END_OF_TEXT)
    assert validate(doors, stop_token_ids=(7,), ignore_eos=True).request.sampling.stop_token_ids == (7,)


def test_a_seed_and_an_id_are_drawn_where_none_is_given() -> None:
    with front_doors() as doors:
        one, other = validate(doors).request, validate(doors).request
        assert one.sampling.seed != other.sampling.seed
        assert one.request_id != other.request_id
        given = validate(doors, seed=0, request_id="mine", cache_salt="ours").request
        assert (given.sampling.seed, given.request_id, given.cache_salt) == (0, "mine", "ours")


@pytest.mark.parametrize(("said", "travels"), [("", "int8"), ("auto", "auto"), ("int8", "int8")])
def test_a_request_that_does_not_say_travels_as_the_router_is_configured(said: str, travels: str) -> None:
    with front_doors(kv_wire_dtype="int8") as doors:
        assert validate(doors, kv_wire_dtype=said).request.kv_wire_dtype == travels


@settings(deadline=None)
@given(
    st.builds(
        SamplingFields,
        temperature=st.none() | st.floats(),
        top_p=st.none() | st.floats(),
        top_k=st.none() | st.integers(),
        seed=st.none() | st.integers(),
        max_tokens=st.none() | st.integers(),
        min_tokens=st.none() | st.integers(),
        stop=st.lists(st.text(), max_size=20).map(tuple),
        stop_token_ids=st.lists(st.integers(), max_size=3).map(tuple),
    ),
    st.text() | st.lists(st.integers()).map(tuple),
)
def test_any_input_is_either_refused_by_field_or_fits_the_wire(
    doors: FrontDoors, sampling: SamplingFields, prompt: str | tuple[int, ...]
) -> None:
    wanted = GenerateInput(prompt, sampling)
    try:
        doors.validator.check(wanted)
        request = doors.validator.finish(wanted, doors.validator.tokenize(prompt), None).request
    except InvalidRequestError:
        return
    assert request.num_tokens + request.sampling.max_tokens <= 128
    assert all(0 <= token_id < doors.model.vocab_size for token_id in request.prompt_token_ids)
    assert 0 <= request.sampling.top_k < 2**31


def test_bad_words_are_forbidden_at_the_start_and_after_a_space(doors: FrontDoors) -> None:
    words = validate(doors, bad_words=("pipe",)).request.sampling.bad_words
    encode = doors.tokenizer.encode
    assert set(words) == {tuple(encode(text, add_special_tokens=False)) for text in ("pipe", " pipe")}

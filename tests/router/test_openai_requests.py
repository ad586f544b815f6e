from __future__ import annotations

import json
from typing import Any

import pytest

from core.errors import InvalidRequestError
from core.sampling import MAX_SEED
from router.openai_requests import NO_EFFECT, ChatBody, CompletionBody, parse_body
from router.validation import GenerateInput, SamplingFields
from text.chat_template import Chat, ChatMessage, ToolCall

HI = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> list[GenerateInput]:
    return parse_body(CompletionBody, json.dumps({"prompt": "a", **fields}).encode()).inputs()


def chat(**fields: Any) -> list[GenerateInput]:
    return parse_body(ChatBody, json.dumps({"messages": HI, **fields}).encode()).inputs()


def test_every_sampling_field_reaches_the_neutral_input() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 3,
        "seed": 4,
        "max_tokens": 5,
        "min_tokens": 2,
    }
    fields |= {"stop": ["x", "y"], "stop_token_ids": [8, 9], "ignore_eos": True}
    fields |= {"min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.4}
    fields |= {"logit_bias": {"7": 2}, "bad_words": ["no"], "allowed_token_ids": [5, 6], "prompt_logprobs": 1}
    fields |= {"skip_special_tokens": False, "include_stop_str_in_output": True}
    expected = SamplingFields(
        0.5,
        0.75,
        3,
        4,
        5,
        2,
        ("x", "y"),
        (8, 9),
        ignore_eos=True,
        min_p=0.1,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.4,
        logit_bias=((7, 2),),
        bad_words=("no",),
        allowed_token_ids=(5, 6),
        prompt_logprobs=1,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert completion(model="m", **fields) == [GenerateInput("a", expected, "m", default_max_tokens=16)]
    assert chat(**fields) == [GenerateInput(Chat((ChatMessage("user", "hi"),)), expected)]


def test_null_is_unset() -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "stream", "seed", "max_tokens", "stream_options"])
    assert completion(**nulls) == completion()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ([[]], [()]),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_several_of_either(prompt: object, prompts: list[object]) -> None:
    assert [wanted.prompt for wanted in completion(prompt=prompt)] == prompts


@pytest.mark.parametrize("prompt", [None, [], 5, {}, ["a", 1], [True], [1.5], [[1], "a"], [["a"]]])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt: got .* must be a string or an array of token ids"):
        completion(prompt=prompt)


def test_choices_of_one_prompt_follow_each_other_with_seeds_of_their_own() -> None:
    inputs = completion(prompt=["a", "b"], n=2, seed=MAX_SEED)
    assert [(wanted.prompt, wanted.sampling.seed) for wanted in inputs] == [
        ("a", MAX_SEED),
        ("a", 0),
        ("b", MAX_SEED),
        ("b", 0),
    ]


def test_salt_and_wire_hold_for_all_choices() -> None:
    inputs = completion(prompt=["a", "b"], n=2, cache_salt="ours", kv_wire_dtype="int8")
    assert [(wanted.cache_salt, wanted.kv_wire_dtype) for wanted in inputs] == [("ours", "int8")] * 4


def test_a_bad_seed_is_not_made_good() -> None:
    assert completion(seed=-1, n=2)[0].sampling.seed == -1


@pytest.mark.parametrize(("n", "prompt"), [(0, "a"), (-1, "a"), (129, "a"), (65, ["a", "b"])])
def test_too_many_or_too_few_choices_are_refused(n: int, prompt: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^n: got .* at most 128"):
        completion(n=n, prompt=prompt)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert completion(stop="x")[0].sampling.stop == ("x",)


def test_max_completion_tokens_is_what_a_chat_calls_max_tokens() -> None:
    assert chat(max_completion_tokens=7)[0].sampling.max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=9)[0].sampling.max_tokens == 7
    assert chat()[0].default_max_tokens is None


@pytest.mark.parametrize(
    ("role", "content", "message"),
    [
        ("user", "a", ChatMessage("user", "a")),
        ("developer", "a", ChatMessage("system", "a")),
        ("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], ChatMessage("user", "ab")),
    ],
)
def test_a_messages_text_may_come_in_parts(role: str, content: object, message: ChatMessage) -> None:
    assert chat(messages=[{"role": role, "content": content}])[0].prompt == Chat((message,))


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "name": "x",
    }
    assert chat(messages=[*HI, answer])[0].prompt == Chat(
        (ChatMessage("user", "hi"), ChatMessage("assistant", "b", "x"))
    )


def test_calls_and_results_are_messages_too() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    prompt = chat(messages=turns)[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.messages[1:] == (
        ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "f", '{"x": 1}'),)),
        ChatMessage("tool", "rain", tool_call_id="c1"),
    )


def test_what_a_template_is_given_besides() -> None:
    documents = [{"title": "naïf", "text": "x"}]
    told = {"documents": documents, "chat_template_kwargs": {"enable_thinking": False}}
    assert chat(**told, add_generation_prompt=False)[0].prompt == Chat(
        (ChatMessage("user", "hi"),),
        documents=('{"title": "naïf", "text": "x"}',),
        variables='{"enable_thinking": false}',
        add_generation_prompt=False,
    )
    continued = chat(continue_final_message=True)[0].prompt
    assert isinstance(continued, Chat)
    assert (continued.continue_last, continued.add_generation_prompt) == (True, False)


def test_who_asks_and_how_urgently_goes_to_the_queue() -> None:
    wanted = completion(user="ann", priority=-3, truncate_prompt_tokens=5, add_special_tokens=False)[0]
    assert (wanted.user, wanted.priority, wanted.truncate_prompt_tokens, wanted.add_special_tokens) == (
        "ann",
        -3,
        5,
        False,
    )


def test_each_choice_is_a_request_with_an_id() -> None:
    assert [each.request_id for each in completion(request_id="mine")] == ["mine"]
    assert [each.request_id for each in completion(request_id="mine", prompt=["a", "b"], n=2)] == [
        "mine-0",
        "mine-1",
        "mine-2",
        "mine-3",
    ]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "messages: got 'hi', must be an array"),
        (["hi"], r"messages\[0\]: got 'hi', must be an object"),
        ([{"content": "a"}], r"messages\[0\]\.role: got None, must be one of system, developer"),
        ([{"role": "function", "content": "a"}], r"messages\[0\]\.role: got 'function'"),
        ([{"role": "user", "content": "a", "tool_call_id": "b"}], r"messages\[0\]\.tool_call_id: .* role user"),
        ([{"role": "user"}], r"messages\[0\]\.content: got None, must be a string or an array"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content: got \[\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]\.type: got 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]: got .* 'text': a string"),
        (
            [*HI, {"role": "assistant", "content": "", "tool_calls": [{}]}],
            r"messages\[1\]\.tool_calls\[0\]: got {}, must be {'id'",
        ),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role: got \['user'\]"),
    ],
)
def test_a_bad_message_is_refused_by_its_path(messages: object, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        chat(messages=messages)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": "5"}, "max_tokens: got '5', input should be a valid integer"),
        ({"max_tokens": 5.5}, "max_tokens: got 5.5, input should be a valid integer"),
        ({"temperature": True}, "temperature: got True, input should be a valid number"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"stop": [1]}, r"stop\[0\]: got 1, input should be a valid string"),
        ({"stop": 1}, "stop: got 1"),
        ({"stream": "yes"}, "stream: got 'yes'"),
        ({"model": 5}, "model: got 5"),
        ({"stop_token_ids": [1, "2"]}, r"stop_token_ids\[1\]: got '2'"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage: got 1"),
        ({"stream_options": {"includ_usage": True}, "stream": True}, "stream_options.includ_usage: got True"),
        ({"stream_options": {}}, "stream_options: got 'options', must be left out unless stream is true"),
        ({"max_token": 5}, "max_token: got 5, is no field of this request: did you mean 'max_tokens'?"),
        ({"zzz": None}, "zzz: got None, is no field of this request"),
    ],
)
def test_a_wrong_type_or_unknown_field_is_named(fields: dict[str, object], says: str) -> None:
    for parse in (completion, chat):
        with pytest.raises(InvalidRequestError, match=says):
            parse(**fields)


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_what_has_no_effect_is_accepted(name: str) -> None:
    assert completion(**{name: {"any": "thing"}}) == completion()
    assert chat(**{name: True}) == chat()


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_what_would_change_the_output_is_refused_by_name_unless_it_is_set_to_change_nothing(
    kind: type[CompletionBody | ChatBody],
) -> None:
    parse = completion if kind is CompletionBody else chat
    for name, harmless in kind.not_yet.items():
        for value in harmless:
            assert parse(**{name: value}) == parse()
        for value in (2, {"type": "json_object"}, ["x"], "x"):
            with pytest.raises(InvalidRequestError, match=f"^{name}: got .* is not supported yet: leave it out$"):
                parse(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "parse"),
    [
        ("echo", True, completion),
        ("best_of", 2, completion),
        ("suffix", "x", completion),
        ("functions", [{"name": "f"}], chat),
    ],
)
def test_known_features_that_are_missing_are_refused(name: str, value: object, parse: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}: .* not supported yet"):
        parse(**{name: value})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "must be JSON in UTF-8"),
        (b"{", "must be JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "must be JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "must be JSON in UTF-8"),
        (b"[" * 100_000, "must be JSON in UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "must be JSON in UTF-8"),
        (b'["prompt"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as error:
        parse_body(CompletionBody, raw)
    assert error.value.field == "body"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="prompt: got None, field required"):
        parse_body(CompletionBody, b"{}")
    with pytest.raises(InvalidRequestError, match="messages: got None, field required"):
        parse_body(ChatBody, b"{}")


def test_log_probabilities_are_asked_for_as_each_endpoint_has_it() -> None:
    def asked(inputs: list[GenerateInput]) -> int | None:
        return inputs[0].sampling.logprobs

    assert [asked(completion()), asked(completion(logprobs=0)), asked(completion(logprobs=3))] == [None, 0, 3]
    assert [asked(chat(logprobs=False)), asked(chat(logprobs=True))] == [None, 0]
    assert asked(chat(logprobs=True, top_logprobs=4)) == 4
    with pytest.raises(InvalidRequestError, match="top_logprobs: got 4, must be left out unless logprobs is true"):
        chat(top_logprobs=4)
    with pytest.raises(InvalidRequestError, match="prompt_logprobs: got 1, must be left out where stream is true"):
        completion(prompt_logprobs=1, stream=True)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "json_schema", SCHEMA),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_grammar": "start: /a/"}, "grammar", "start: /a/"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, "regex", "a+"),
    ],
)
def test_structured_output_may_be_asked_for_in_many_ways(fields: dict[str, Any], kind: str, text: object) -> None:
    for parse in (completion, chat):
        structure = parse(**fields)[0].sampling.structure
        assert structure is not None
        assert structure.kind == kind
        assert structure.text == text or json.loads(structure.text) == text


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"guided_json": None}]
)
def test_plain_text_is_no_structure(fields: dict[str, Any]) -> None:
    assert chat(**fields)[0].sampling.structure is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
    ],
)
def test_what_is_asked_for_in_no_known_way_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        chat(**fields)
    assert error.value.field == field

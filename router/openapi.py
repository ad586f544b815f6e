"""The OpenAPI document: bodies from the types that read them, limits from what checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.sampling import MAX_LOGPROBS, MAX_REPETITION_PENALTY, MAX_SEED
from router.access.guards import OPEN_PATHS
from router.openai_logprobs import Json
from router.openai_requests import MAX_CHOICES, MAX_DOCUMENTS, ChatBody, CompletionBody, Fields
from router.openai_tokens import DetokenizeBody, TokenizeBody, TokenizeChatBody
from router.validation import MAX_BAD_WORDS, MAX_NAME_LEN, MAX_PRIORITY, MAX_TEMPERATURE, MAX_TOKEN_IDS

_NAME: Json = {"maxLength": MAX_NAME_LEN}
_TOKEN_IDS: Json = {"maxItems": MAX_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}
LIMITS: Mapping[str, Json] = {
    "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "seed": {"minimum": 0, "maximum": MAX_SEED},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": MAX_REPETITION_PENALTY},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "truncate_prompt_tokens": {"minimum": 1},
    "priority": {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    "bad_words": {"maxItems": MAX_BAD_WORDS, "items": {"type": "string", "minLength": 1}},
    "stop_token_ids": _TOKEN_IDS,
    "allowed_token_ids": _TOKEN_IDS,
    "tokens": {"items": {"type": "integer", "minimum": 0}},
    "guided_choice": {"minItems": 1, "items": {"type": "string", "minLength": 1}},
    "documents": {"maxItems": MAX_DOCUMENTS},
    "user": _NAME,
    "request_id": _NAME,
    "cache_salt": _NAME,
    "kv_wire_dtype": {"enum": ["auto", "int8", ""]},
    "disaggregate": {"enum": ["require", "prefer", "local", ""]},
    "logit_bias": {
        "maxProperties": MAX_TOKEN_IDS,
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
}
"""What a field's values are bound by, where its type does not say; null is none of them."""

ERROR = "Error"
STREAM = "text/event-stream"
_INTEGER, _STRING, _NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}


def openapi(version: str) -> Json:
    """Of version 3.1."""
    schemas: Json = {ERROR: _error_schema(), "Usage": _usage_schema()}
    completions = _body(CompletionBody, schemas)
    chat = _body(ChatBody, schemas)
    tokenize = {"anyOf": [_body(TokenizeBody, schemas), _body(TokenizeChatBody, schemas)]}
    detokenize = _body(DetokenizeBody, schemas)
    health = _operation("Whether anything can be served", _object(status=_STRING), {503: _object(status=_STRING)})
    named = [_path_parameter("model", "The model's name")]
    request = [_path_parameter("request_id", "As its client chose it, or was told")]
    text = _choice_schema({"text": _STRING})
    message = _choice_schema({"message": {"type": "object", "required": ["role", "content"]}})
    paths: Json = {
        "/v1/completions": {"post": _generation("Go on with a text", completions, "text_completion", text)},
        "/v1/chat/completions": {"post": _generation("Answer in a chat", chat, "chat.completion", message)},
        "/v1/models": {"get": _operation("The models served", _list_of(_model_schema()))},
        "/v1/models/{model}": {"get": _operation("One model", _model_schema(), parameters=named)},
        "/tokenize": {"post": _operation("Tokens of a text or a chat", _tokens_schema(), body=tokenize)},
        "/detokenize": {"post": _operation("Text of tokens", _object(prompt=_STRING), body=detokenize)},
        "/ping": {"get": health, "post": health},
        "/health": {"get": health},
        "/load": {"get": _operation("Requests that run or wait", _object(server_load=_INTEGER))},
        "/version": {"get": _operation("Of the server", _object(version=_STRING))},
        "/metrics": {"get": _metrics()},
        "/requests/{request_id}/trace": {
            "get": _operation("Where a request's time went", {"type": "object"}, parameters=request)
        },
    }
    for path, methods in paths.items():
        if path not in OPEN_PATHS:
            for operation in methods.values():
                _ask_for_key(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"ApiKey": {"type": "http", "scheme": "bearer"}}},
    }


def _ask_for_key(operation: Json) -> None:
    """Where the router has API keys, it needs one."""
    error = {"application/json": {"schema": _ref(ERROR)}}
    operation["security"] = [{}, {"ApiKey": []}]
    told = {"401": "No key, or one that is unknown", "403": "This key may not", "429": "Over the quota of the key"}
    for status, description in told.items():
        operation["responses"].setdefault(status, _response(description, error))


def _body(kind: type[Fields], schemas: Json) -> Json:
    """A reference to the schema of a body, which joins `schemas`."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    properties: Json = schema["properties"]
    for name, limits in LIMITS.items():
        if name in properties:
            _bound(properties[name], limits)
    if "logprobs" in properties and kind is CompletionBody:
        _bound(properties["logprobs"], {"minimum": 0, "maximum": MAX_LOGPROBS})
    properties |= {name: {} for name in sorted(kind.no_effect)}
    properties |= {name: {"enum": list(values)} for name, values in kind.not_yet.items()}
    schemas[kind.__name__] = schema
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _bound(schema: Json, limits: Json) -> None:
    """Of several types, all but null are bound."""
    for part in schema.get("anyOf", [schema]):
        if part != _NULL:
            part.update(limits)


def _operation(
    summary: str,
    answer: Json,
    others: Mapping[int, Json] | None = None,
    *,
    body: Json | None = None,
    parameters: list[Json] | None = None,
) -> Json:
    responses: Json = {"200": _response("As asked", {"application/json": {"schema": answer}})}
    for code, schema in (others or {}).items():
        responses[str(code)] = _response("As asked", {"application/json": {"schema": schema}})
    operation: Json = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if body or parameters:
        error = _response("What is wrong, and with which field", {"application/json": {"schema": _ref(ERROR)}})
        for status in (["400"] if body else []) + ["404"]:
            responses[status] = error
    return operation


def _generation(summary: str, body: Json, kind: str, choice: Json) -> Json:
    """Whole, or as server-sent events, whose data are chunks, an error or `[DONE]`."""
    answer = _object(
        id=_STRING,
        object={"const": kind},
        created=_INTEGER,
        model=_STRING,
        system_fingerprint=_STRING,
        choices={"type": "array", "items": choice, "minItems": 1},
        usage=_ref("Usage"),
    )
    operation = _operation(summary, answer, body=body)
    operation["responses"]["200"]["content"][STREAM] = {"schema": _object(data=_STRING)}
    error = {"application/json": {"schema": _ref(ERROR)}}
    overloaded = _response("Refused now: try again after Retry-After", error)
    overloaded["headers"] = {"Retry-After": {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
    operation["responses"] |= {
        "429": overloaded,
        "499": _response("The request was cancelled", error),
        "503": _response("No worker can serve it", error),
        "504": _response("Its deadline was over", error),
    }
    return operation


def _metrics() -> Json:
    exposition = _response("In Prometheus' format", {"text/plain": {"schema": _STRING}})
    return {"summary": "What the router counts and measures", "responses": {"200": exposition}}


def _response(description: str, content: Json) -> Json:
    headers = {"X-Request-Id": {"description": "The client's own, or one that was drawn", "schema": _STRING}}
    return {"description": description, "headers": headers, "content": content}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(items: Json) -> Json:
    return _object(object={"const": "list"}, data={"type": "array", "items": items})


def _path_parameter(name: str, description: str) -> Json:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def _error_schema() -> Json:
    nullable: Json = {"type": ["string", "null"]}
    return _object(error=_object(message=_STRING, type=_STRING, param=nullable, code=nullable))


def _usage_schema() -> Json:
    usage = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
    usage["properties"]["prompt_tokens_details"] = _object(cached_tokens=_INTEGER)
    return usage


def _choice_schema(content: Mapping[str, Any]) -> Json:
    reasons: Json = {"enum": ["stop", "length", "tool_calls"]}
    return _object(index=_INTEGER, **content, logprobs={"type": ["object", "null"]}, finish_reason=reasons)


def _model_schema() -> Json:
    return _object(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING, max_model_len=_INTEGER)


def _tokens_schema() -> Json:
    names: Json = {"type": ["array", "null"], "items": _STRING}
    token_ids: Json = {"type": "array", "items": _INTEGER}
    return _object(count=_INTEGER, max_model_len=_INTEGER, tokens=token_ids, token_strs=names)

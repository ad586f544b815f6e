"""How the OpenAI API, and vLLM's additions to it, ask for structured output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from core.errors import InvalidRequestError
from text.grammar import JSON_OBJECT, Structure

Kind = Literal["json_schema", "regex", "choice", "grammar"]

_KINDS: Mapping[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""vLLM's names: fields of `structured_outputs`, and behind `guided_`."""

_SCHEMA = {"type": "object"}
_NON_EMPTY = {"type": "string", "minLength": 1}
RESPONSE_FORMAT_SCHEMA = {
    "anyOf": [
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": _SCHEMA}},
            },
        },
        {"type": "null"},
    ]
}
STRUCTURED_OUTPUTS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "json": {"anyOf": [_NON_EMPTY, _SCHEMA, {"type": "null"}]},
                "regex": {"anyOf": [_NON_EMPTY, {"type": "null"}]},
                "choice": {"anyOf": [{"type": "array", "minItems": 1, "items": _NON_EMPTY}, {"type": "null"}]},
                "grammar": {"anyOf": [_NON_EMPTY, {"type": "null"}]},
                "json_object": {"type": ["boolean", "null"]},
            },
            "additionalProperties": {"type": "null"},
        },
        {"type": "null"},
    ]
}
"""These two are for the OpenAPI document; that only one may be set is told by the answer."""


class Asking(Protocol):
    """The fields of a body that may ask for it, of which one at most does."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: str | dict[str, Any] | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


def structure_of(body: Asking) -> Structure | None:
    """`InvalidRequestError` where several fields ask, or one that is not understood."""
    found = [_guided(f"guided_{name}", kind, getattr(body, f"guided_{name}")) for name, kind in _KINDS.items()]
    found += [_response_format(body.response_format), _structured_outputs(body.structured_outputs)]
    asked = [structure for structure in found if structure is not None]
    if len(asked) > 1:
        first, second = asked[0].field, asked[1].field
        raise InvalidRequestError(second, asked[1].text, f"must be left out where {first} asks for another structure")
    return asked[0] if asked else None


def _guided(field: str, kind: Kind, value: object) -> Structure | None:
    match kind, value:
        case _, None:
            return None
        case (("json_schema" | "regex" | "grammar"), str()):
            return Structure(kind, value, field)
        case "json_schema", dict():
            return Structure(kind, json.dumps(value), field)
        case "choice", list() if all(isinstance(item, str) for item in value):
            return Structure(kind, json.dumps(value), field)
        case _:
            must = {"json_schema": "a JSON schema", "choice": "an array of strings"}.get(kind, "a string")
            raise InvalidRequestError(field, value, f"must be {must}")


def _response_format(value: dict[str, Any] | None) -> Structure | None:
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Structure("json_schema", JSON_OBJECT, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return Structure("json_schema", json.dumps(schema), "response_format.json_schema.schema")
        case {"type": "json_schema"}:
            fix = "must be an object with the schema under 'schema'"
            raise InvalidRequestError("response_format.json_schema", value.get("json_schema"), fix)
        case _:
            fix = "must be 'text', 'json_object' or 'json_schema'"
            raise InvalidRequestError("response_format.type", value.get("type"), fix)


def _structured_outputs(value: dict[str, Any] | None) -> Structure | None:
    given = {name: item for name, item in (value or {}).items() if item is not None}
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError("structured_outputs", sorted(given), "must have one field")
    [(name, item)] = given.items()
    field = f"structured_outputs.{name}"
    if name == "json_object":
        if not isinstance(item, bool):
            raise InvalidRequestError(field, item, "must be true or false")
        return Structure("json_schema", JSON_OBJECT, field) if item else None
    if name not in _KINDS:
        raise InvalidRequestError(field, item, f"must be one of {', '.join(_KINDS)} and json_object")
    return _guided(field, _KINDS[name], item)

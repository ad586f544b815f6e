"""Seeded protobuf messages: sound ones, odd ones, and bytes that are none."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MAX_DEPTH = 4
_LIKELY = frozenset(
    (
        *("prompt", "requests", "ids", "token_ids", "messages", "content"),
        *("worker_id", "incarnation", "request_id", "address", "role", "policy"),
    )
)
"""Fields without which a request says nothing."""
_STRINGS = (
    "",
    "a",
    "the pipe",
    "tiny",
    "auto",
    "int8",
    "user",
    "assistant",
    "system",
    "mixed-0",
    "\x00",
    "水門" * 9,
    "x" * 200,
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-9, 1e30, float("inf"), float("-inf"), float("nan"))
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Fuzzer:
    """Equal seeds give equal bytes."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tame = self._random.random() < 0.5
        """Whether this request may well be served: small numbers, texts that mean something, few options."""

    def request(self, kind: type[Message]) -> bytes:
        """Mostly messages of this kind; some are damaged, some never were any."""
        draw = self._random.random()
        if draw < 0.03:
            return self._random.randbytes(self._random.randrange(64))
        message = kind()
        self.fill(message)
        data = bytearray(message.SerializeToString())
        if draw < 0.15 and data:
            for _ in range(self._random.randrange(1, 4)):
                data[self._random.randrange(len(data))] = self._random.randrange(256)
            del data[self._random.randrange(len(data) + 1) :]
        return bytes(data)

    def fill(self, message: Message, depth: int = 0) -> None:
        """Some of the fields, with values in and out of their bounds."""
        chance = 0.1 if self._tame else self._random.choice((0.1, 0.3, 0.6)) if depth else 0.5
        oneofs: Any = message.DESCRIPTOR.oneofs
        chosen = {self._random.choice(oneof.fields).name for oneof in oneofs}
        for field in message.DESCRIPTOR.fields:
            if field.containing_oneof is not None and field.name not in chosen:
                continue
            wanted = 0.9 if field.name in _LIKELY and depth < 3 else chance
            if self._random.random() > wanted or depth > MAX_DEPTH:
                continue
            if field.is_repeated:
                self._fill_repeated(message, field, depth)
            elif field.message_type is not None:
                part = getattr(message, field.name)
                part.SetInParent()
                self.fill(part, depth + 1)
            else:
                setattr(message, field.name, self._value(field))

    def _fill_repeated(self, message: Message, field: Any, depth: int) -> None:
        values = getattr(message, field.name)
        for _ in range(self._random.choice((0, 1, 1, 2, 3, 20) if depth else (1, 1, 2, 3))):
            if field.message_type is not None:
                self.fill(values.add(), depth + 1)
            else:
                values.append(self._value(field))

    def _value(self, field: Any) -> Any:
        draw = self._random
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                if field.type == FieldDescriptor.TYPE_BYTES:
                    return draw.randbytes(draw.randrange(32))
                return self._string(field.name)
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE if self._tame:
                return draw.uniform(0.1, 1)
            case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64 if (
                self._tame
            ):
                return draw.randrange(1, 20)
            case FieldDescriptor.CPPTYPE_BOOL:
                return draw.random() < 0.5
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return draw.choice((*_FLOATS, draw.random(), draw.uniform(-3, 3)))
            case FieldDescriptor.CPPTYPE_ENUM:
                return draw.choice((0, 1, 2, 3))
            case kind:
                low, high = _BOUNDS[kind]
                small = draw.randrange(0, 300), draw.randrange(0, 4), 1
                return draw.choice((*small, *small, low, high, draw.randint(low, high)))

    def _string(self, name: str) -> str:
        draw = self._random
        sound = {
            "json_schema": ('{"type": "object"}', '{"type": "string", "maxLength": 3}', '{"type": 5}', "[]"),
            "regex": ("[0-9]+", "(", "(a|b)*c"),
            "grammar": ('start: "a"', "start: /[ab]+/", 'root ::= "a"', "start: b"),
            "model": ("", "", "", "tiny", "gpt"),
            "disaggregate": ("", "prefer", "local", "require"),
            "prompt": ("the pipe", "a", "水門", "", "x" * 500),
            "role": ("user", "user", "system", "assistant", "tool"),
            "policy": ("round_robin", "least_loaded", "prefix_aware", "", "best"),
        }.get(name)
        if sound and draw.random() < (1.0 if self._tame else 0.8):
            return draw.choice(sound[:3] if self._tame else sound)
        if self._tame:
            return draw.choice({"kv_wire_dtype": ("", "auto", "int8")}.get(name, _STRINGS[:2]))
        if draw.random() < 0.7:
            return draw.choice(_STRINGS)
        return "".join(
            chr(draw.choice((draw.randrange(1, 128), draw.randrange(0x100, 0xD800)))) for _ in range(draw.randrange(30))
        )

"""Services whose handlers also see what can't be read: it is then answered with what is wrong, and not with UNKNOWN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from core.errors import InvalidRequestError

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Any]
"""Takes a message, or the error to answer with."""


def add_service(
    server: grpc.aio.Server,
    name: str,
    unary: Mapping[str, tuple[Handler, type[Message]]],
    streaming: Mapping[str, tuple[Handler, type[Message]]] | None = None,
    *,
    known_only: bool = True,
) -> None:
    """Methods by name, with the types of their requests; `streaming` ones answer with a stream."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method, (handler, kind) in unary.items():
        read = reader(kind, known_only=known_only)
        methods[method] = grpc.unary_unary_rpc_method_handler(handler, read, to_bytes)
    for method, (handler, kind) in (streaming or {}).items():
        read = reader(kind, known_only=known_only)
        methods[method] = grpc.unary_stream_rpc_method_handler(handler, read, to_bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def readable(received: M | InvalidRequestError) -> M:
    if isinstance(received, InvalidRequestError):
        raise received
    return received


def to_bytes(message: Message) -> bytes:
    return message.SerializeToString()


def reader(message_type: type[M], *, known_only: bool = True) -> Callable[[bytes], M | InvalidRequestError]:
    """Parses a request. One that can't be read becomes an error for its handler; with `known_only`, so does one with
    fields that nobody would heed."""

    def read(data: bytes) -> M | InvalidRequestError:
        message = message_type()
        try:
            message.ParseFromString(data)
        except DecodeError:
            name = message_type.DESCRIPTOR.full_name
            return InvalidRequestError("request", data[:20], f"must be a {name}, with all strings in UTF-8")
        for path in _unknown_fields(message) if known_only else ():
            where, _, number = path.rpartition(".")
            return InvalidRequestError(
                path, "a value", f"must be left out: {where or message_type.DESCRIPTOR.name} has no field {number}"
            )
        return message

    return read


def _unknown_fields(message: Message) -> Iterator[str]:
    """Paths of fields that are not in the schema, or not of the type it says: names, then the field's number."""
    unknown = UnknownFieldSet(message)
    for i in range(len(unknown)):
        yield str(unknown[i].field_number)
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if isinstance(value, Message):
            yield from (f"{descriptor.name}.{path}" for path in _unknown_fields(value))
        else:
            for i, item in enumerate(value):
                yield from (f"{descriptor.name}[{i}].{path}" for path in _unknown_fields(item))

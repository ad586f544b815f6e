"""Between wire types and ours. Generated types go no further than here and `status`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableSequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message as WireMessage

from penstock.cluster import ClusterChange, ClusterLoad, Tokens, WorkerLoad
from penstock.errors import InvalidRequestError
from penstock.traces import AttemptTrace, Forecast, RequestTrace, Span
from penstock.types import (
    Delta,
    FinishReason,
    Message,
    ModelDescription,
    PairInfo,
    ServerInfo,
    Stats,
    TokenLogprobs,
    Usage,
    WorkerInfo,
    WorkerRole,
)
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import trace_pb2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    D = TypeVar("D", bound=DataclassInstance)

_FINISH_REASONS = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}
_ROLES = {
    pb.WORKER_ROLE_PREFILL: WorkerRole.PREFILL,
    pb.WORKER_ROLE_DECODE: WorkerRole.DECODE,
    pb.WORKER_ROLE_MIXED: WorkerRole.MIXED,
}


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a generation: what the server settled."""

    request_id: str
    model: str
    seed: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a generation."""

    finish_reason: FinishReason
    usage: Usage
    stats: Stats


Event = Started | Delta | Finished


def generate_request(
    inputs: Mapping[str, Any], header: Mapping[str, Any], sampling: Mapping[str, Any]
) -> pb.GenerateRequest:
    """All three go by the names of the wire. What is None stays unset, so that the server's defaults hold.

    `inputs` has `prompt`, `token_ids` (ints) and `messages` (`Message`, or mappings of role and content), of which one
    is not None. Raises `InvalidRequestError` where a value does not fit the wire; what it means, the server judges.
    """
    request = pb.GenerateRequest()
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise InvalidRequestError(f"prompt: give one of prompt, token_ids and messages, got {got}", "prompt")
    match given[0]:
        case "prompt":
            _set(request, "prompt", inputs["prompt"])
        case "token_ids":
            request.token_ids.SetInParent()
            _set(request.token_ids, "ids", inputs["token_ids"], name="token_ids")
        case "messages":
            _set_messages(request.messages, inputs["messages"])
    for wire, values in ((request, header), (request.sampling, sampling)):
        for field, value in values.items():
            if value is not None:
                _set(wire, field, _wire_value(field, value))
    return request


def resumed(
    request: pb.GenerateRequest, request_id: str, seed: int | None, token_ids: Iterable[int], num_characters: int
) -> pb.GenerateRequest:
    """A copy that asks a server to go on behind these tokens."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.request_id = request_id
    if seed is not None:
        again.sampling.seed = seed
    again.resume.SetInParent()
    again.resume.token_ids.extend(token_ids)
    again.resume.num_characters = num_characters
    return again


def _set_messages(wire: pb.Messages, messages: object) -> None:
    wire.SetInParent()
    for message in messages if isinstance(messages, Iterable) else [messages]:
        turn = {"role": message.role, "content": message.content} if isinstance(message, Message) else message
        if not isinstance(turn, Mapping) or turn.keys() != {"role", "content"}:
            fix = "must be a Message, or a mapping of 'role' and 'content' alone"
            raise InvalidRequestError(f"messages: got {_shorten(message)}, {fix}", "messages")
        added = wire.messages.add()
        for key, value in turn.items():
            _set(added, key, value, name="messages")


def _wire_value(field: str, value: Any) -> Any:
    """Python's form of a field that has a message type of its own on the wire."""
    try:
        match field:
            case "logit_bias":
                return [pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in dict(value).items()]
            case "choice":
                return pb.Choices(texts=value)
            case "json_schema":
                return value if isinstance(value, str) else json.dumps(value)
            case _:
                return value
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field}: got {_shorten(value)}: {error}", field) from error


def _set(wire: WireMessage, field: str, value: Any, name: str | None = None) -> None:
    try:
        if isinstance(getattr(wire, field), MutableSequence):
            getattr(wire, field).extend(value)
        elif isinstance(value, WireMessage):
            getattr(wire, field).CopyFrom(value)
        else:
            setattr(wire, field, value)
    except (TypeError, ValueError) as error:
        name = name or field
        raise InvalidRequestError(f"{name}: got {_shorten(value)}: {error}", name) from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}...{text[-7:]}"


def event_of(response: pb.GenerateResponse) -> Event | None:
    """None for an event that this version of the SDK does not know."""
    match response.WhichOneof("event"):
        case "delta":
            wire_delta = response.delta
            told = _logprobs(wire_delta.logprobs), _logprobs(wire_delta.prompt_logprobs)
            return Delta(tuple(wire_delta.token_ids), wire_delta.text, *told)
        case "started":
            return _read(response.started, Started)
        case "finished":
            wire = response.finished
            reason = _FINISH_REASONS.get(wire.finish_reason, FinishReason.OTHER)
            return Finished(reason, _read(wire, Usage), _read(wire.stats, Stats))
        case _:
            return None


def _logprobs(wire: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(t.token_id, t.logprob, t.rank, tuple(zip(t.top_token_ids, t.top_logprobs, strict=False)))
        for t in wire
    )


def tokenize_request(inputs: Mapping[str, Any], header: Mapping[str, Any]) -> pb.TokenizeRequest:
    """As `generate_request`."""
    request = pb.TokenizeRequest()
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "neither"
        raise InvalidRequestError(f"prompt: give one of prompt and messages, got {got}", "prompt")
    if given == ["messages"]:
        _set_messages(request.messages, inputs["messages"])
    else:
        _set(request, "prompt", inputs["prompt"])
    for field, value in header.items():
        if value is not None:
            _set(request, field, value)
    return request


def batch_request(requests: Iterable[pb.GenerateRequest]) -> pb.GenerateBatchRequest:
    return pb.GenerateBatchRequest(requests=requests)


def tokens(wire: pb.TokenizeResponse) -> Tokens:
    return _read(wire, Tokens)


def cluster_load(wire: pb.GetLoadResponse) -> ClusterLoad:
    return _read(wire, ClusterLoad, workers=tuple(_read(worker, WorkerLoad) for worker in wire.workers))


def cluster_change(wire: pb.WatchClusterResponse) -> ClusterChange:
    return ClusterChange(
        workers=tuple(_worker(worker) for worker in wire.workers),
        pairs=tuple(_read(pair, PairInfo) for pair in wire.pairs),
        gone_workers=tuple(wire.gone_workers),
        gone_pairs=tuple((pair.prefill_worker, pair.decode_worker) for pair in wire.gone_pairs),
    )


def _worker(wire: pb.WorkerInfo) -> WorkerInfo:
    return _read(wire, WorkerInfo, role=_ROLES.get(wire.role, WorkerRole.OTHER))


def model_description(wire: pb.GetModelResponse) -> ModelDescription:
    return _read(wire, ModelDescription)


def server_info(wire: pb.GetServerInfoResponse) -> ServerInfo:
    workers = [_worker(worker) for worker in wire.workers]
    pairs = [_read(pair, PairInfo) for pair in wire.pairs]
    return _read(wire, ServerInfo, workers=tuple(workers), pairs=tuple(pairs))


def request_trace(wire: trace_pb2.GetRequestTraceResponse) -> RequestTrace | None:
    if not wire.HasField("trace"):
        return None
    attempts = tuple(_read(attempt, AttemptTrace, forecast=_forecast(attempt)) for attempt in wire.trace.attempts)
    spans = tuple(_read(span, Span) for span in wire.trace.spans)
    return _read(wire.trace, RequestTrace, attempts=attempts, spans=spans)


def _forecast(wire: trace_pb2.AttemptTrace) -> Forecast | None:
    return _read(wire.forecast, Forecast) if wire.HasField("forecast") else None


def _read(wire: WireMessage, kind: type[D], **converted: object) -> D:
    """A `kind` from the fields of `wire` that bear the same names; None where an optional one is unset."""
    values = {f.name: _value(wire, f.name) for f in fields(kind) if f.name not in converted}
    return kind(**values, **converted)


def _value(wire: WireMessage, field: str) -> object:
    descriptor = wire.DESCRIPTOR.fields_by_name[field]
    if descriptor.has_presence and not wire.HasField(field):
        return None
    value = getattr(wire, field)
    return tuple(value) if descriptor.is_repeated else value

"""The public API's messages to and from our own types."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from core.errors import InvalidRequestError
from core.logprobs import TokenLogprobs
from core.request import FinishReason
from core.stats import RequestStats
from penstock.v1 import details_pb2
from penstock.v1 import inference_pb2 as pb
from router.errors import packed_status
from router.generation import Done, Started, TextDelta
from router.validation import GenerateInput, Prompt, Resume, SamplingFields
from text.chat_template import Chat, ChatMessage
from text.grammar import JSON_OBJECT, Structure

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_OPTIONAL_SAMPLING = (
    *("temperature", "top_p", "top_k", "seed", "max_tokens", "min_tokens", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logprobs", "prompt_logprobs"),
    "skip_special_tokens",
)


def generate_input(request: pb.GenerateRequest, time_remaining_s: float | None, traceparent: str = "") -> GenerateInput:
    """`time_remaining_s` is what the call's own deadline leaves, `traceparent` the call's trace context."""
    timeouts = [request.timeout_s] if request.HasField("timeout_s") else []
    if time_remaining_s is not None:
        timeouts.append(time_remaining_s)
    return GenerateInput(
        prompt=prompt_of(request),
        sampling=_sampling(request.sampling),
        model=request.model,
        request_id=request.request_id,
        timeout_s=min(timeouts, default=None),
        cache_salt=request.cache_salt,
        kv_wire_dtype=request.kv_wire_dtype,
        disaggregate=request.disaggregate,
        priority=request.priority,
        user=request.user,
        resume=Resume(tuple(request.resume.token_ids), request.resume.num_characters)
        if request.HasField("resume")
        else None,
        traceparent=traceparent,
    )


def prompt_of(request: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            return request.prompt
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return tuple(request.token_ids.ids)
        case "messages":
            return Chat(tuple(ChatMessage(m.role, m.content) for m in request.messages.messages))
        case _:
            others = "token_ids or messages" if isinstance(request, pb.GenerateRequest) else "messages"
            raise InvalidRequestError("prompt", None, f"must be set, or else {others}")


def _sampling(sampling: pb.SamplingParams) -> SamplingFields:
    given: dict[str, Any] = {name: getattr(sampling, name) for name in _OPTIONAL_SAMPLING if sampling.HasField(name)}  # type: ignore[arg-type]
    return SamplingFields(
        **given,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logit_bias=tuple((bias.token_id, bias.bias) for bias in sampling.logit_bias),
        bad_words=tuple(sampling.bad_words),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        structure=_structure(sampling),
    )


def _structure(sampling: pb.SamplingParams) -> Structure | None:
    match kind := sampling.WhichOneof("structured_output"):
        case "json_schema" | "regex" | "grammar":
            return Structure(kind, getattr(sampling, kind), kind)
        case "json_object":
            return Structure("json_schema", JSON_OBJECT, kind) if sampling.json_object else None
        case "choice":
            return Structure(kind, json.dumps(list(sampling.choice.texts)), kind)
        case _:
            return None


def to_started(started: Started) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=started.request_id,
            model=started.model,
            seed=started.seed,
            num_prompt_tokens=started.num_prompt_tokens,
        )
    )


def to_response(event: TextDelta | Done) -> pb.GenerateResponse:
    if isinstance(event, TextDelta):
        told = {"logprobs": map(_logprobs, event.logprobs), "prompt_logprobs": map(_logprobs, event.prompt_logprobs)}
        return pb.GenerateResponse(delta=pb.Delta(token_ids=event.token_ids, text=event.text, **told))
    return pb.GenerateResponse(
        finished=pb.Finished(
            finish_reason=_FINISH_REASONS[event.finish_reason],
            num_prompt_tokens=event.num_prompt_tokens,
            num_output_tokens=event.num_output_tokens,
            stats=to_stats(event.stats),
        )
    )


def to_batch_response(index: int, came: TextDelta | Done | Exception, request_id: str) -> pb.GenerateBatchResponse:
    """An error becomes what a call of its own would have ended with."""
    if isinstance(came, Exception):
        status = details_pb2.Status.FromString(packed_status(came, request_id))
        return pb.GenerateBatchResponse(index=index, error=status)
    return pb.GenerateBatchResponse(index=index, response=to_response(came))


def _logprobs(told: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=told.token_id,
        logprob=told.logprob,
        rank=told.rank,
        top_token_ids=[token_id for token_id, _ in told.top],
        top_logprobs=[logprob for _, logprob in told.top],
    )


def to_stats(stats: RequestStats) -> pb.RequestStats:
    """Stages that did not happen stay unset. The message has no `first_decode_step_s`."""
    known = pb.RequestStats.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name in known}
    return pb.RequestStats(**{name: value for name, value in values.items() if value is not None})

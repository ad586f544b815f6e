"""Request traces on the wire, and the service that answers with them: `penstock.v1.Traces`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict

from core.clock import Clock
from core.errors import InvalidRequestError
from penstock.v1 import trace_pb2 as pb
from router.errors import aborting
from router.rpc_handlers import Context, add_service, readable
from router.traces import AttemptTrace, RequestTrace, TraceRecorder, spans_of

SERVICE = "penstock.v1.Traces"


class TraceService:
    """Both front doors' view of what `recorder` keeps."""

    def __init__(self, recorder: TraceRecorder, clock: Clock) -> None:
        self._recorder = recorder
        self._clock = clock

    async def get_request_trace(
        self, received: pb.GetRequestTraceRequest | InvalidRequestError, context: Context
    ) -> pb.GetRequestTraceResponse:
        async with aborting(context):
            request = readable(received)
            if not request.request_id:
                raise InvalidRequestError("request_id", "", "must name a request")
            return pb.GetRequestTraceResponse(trace=self._find(request.request_id))

    def as_json(self, request_id: str) -> dict[str, Any] | None:
        """None where nothing is known of the request."""
        wire = self._find(request_id)
        if wire is None:
            return None
        return MessageToDict(wire, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_service(server, SERVICE, {"GetRequestTrace": (self.get_request_trace, pb.GetRequestTraceRequest)})

    def _find(self, request_id: str) -> pb.RequestTrace | None:
        trace = self._recorder.find(request_id)
        return None if trace is None else trace_to_wire(trace, self._clock())


def trace_to_wire(trace: RequestTrace, now_s: float) -> pb.RequestTrace:
    start_s = trace.arrived_s
    return pb.RequestTrace(
        request_id=trace.request_id,
        arrived_unix_s=trace.arrived_unix_s,
        elapsed_s=trace.elapsed_s(now_s),
        outcome=trace.outcome,
        detail=trace.detail,
        num_prompt_tokens=trace.num_prompt_tokens,
        num_output_tokens=trace.num_output_tokens,
        longest_gap_s=trace.longest_gap_s,
        longest_gap_at_s=trace.longest_gap_at_s - start_s if trace.longest_gap_s else 0.0,
        attempts=[_attempt_to_wire(attempt, start_s) for attempt in trace.attempts],
        num_forgotten_attempts=trace.num_forgotten_attempts,
        spans=[
            pb.Span(
                name=span.name,
                attempt=span.attempt,
                worker=span.worker,
                start_s=span.start_s - start_s,
                end_s=None if span.end_s is None else span.end_s - start_s,
                slack_s=span.slack_s,
            )
            for span in spans_of(trace)
        ],
    )


def _attempt_to_wire(attempt: AttemptTrace, start_s: float) -> pb.AttemptTrace:
    wire = pb.AttemptTrace(
        attempt=attempt.attempt,
        placed_s=attempt.placed_s - start_s,
        prefill_worker=attempt.prefill_worker,
        decode_worker=attempt.decode_worker,
        reasons=attempt.reasons,
        num_tokens=attempt.num_tokens,
        outcome=attempt.outcome,
        detail=attempt.detail,
        policy=attempt.policy,
        forecast=pb.Forecast(**asdict(attempt.forecast)),
        first_token_s=None if attempt.first_token_s is None else attempt.first_token_s - start_s,
        waited_for=attempt.waited_for,
    )
    if attempt.transfer:
        wire.kv_bytes = attempt.transfer.num_bytes
        wire.transfer_s = attempt.transfer.transfer_s
        wire.transfer_exposed_s = attempt.transfer.exposed_s
    return wire

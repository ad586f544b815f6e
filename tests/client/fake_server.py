"""A real gRPC server on 127.0.0.1 whose answers are scripted, one script a call.

server.play(says("Hello"), refuses(grpc.StatusCode.UNAVAILABLE, "no worker"))
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from penstock.status import ErrorDetails, pack_details
from penstock.v1 import admin_pb2, trace_pb2
from penstock.v1 import inference_pb2 as pb
from penstock.v1.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from penstock.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from penstock.v1.trace_pb2_grpc import TracesServicer, add_TracesServicer_to_server

DEADLINE_S = 20.0
DETAILS_KEY = "grpc-status-details-bin"

Script = Callable[[pb.GenerateRequest, Any], Iterator[pb.GenerateResponse]]
BatchScript = Callable[[pb.GenerateBatchRequest, Any], Iterator[pb.GenerateBatchResponse]]


def started(request_id: str = "req-1", seed: int = 7, num_prompt_tokens: int = 3) -> pb.GenerateResponse:
    settled = pb.Started(request_id=request_id, model="tiny", seed=seed, num_prompt_tokens=num_prompt_tokens)
    return pb.GenerateResponse(started=settled)


def delta(text: str, *token_ids: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(token_ids=token_ids, text=text))


def finished(
    num_output_tokens: int, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP, **stats: Any
) -> pb.GenerateResponse:
    end = pb.Finished(finish_reason=reason, num_prompt_tokens=3, num_output_tokens=num_output_tokens)
    end.stats.CopyFrom(pb.RequestStats(prefill_worker="p0", decode_worker="d0", num_attempts=1, **stats))
    return pb.GenerateResponse(finished=end)


def streams(*responses: pb.GenerateResponse) -> Script:
    """These messages as they are, then status OK."""

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield from responses

    return script


def says(*texts: str) -> Script:
    """A whole generation, one delta a text; the token ids are 0, 1, 2, ..."""
    deltas = [delta(text, token_id) for token_id, text in enumerate(texts)]
    return streams(started(), *deltas, finished(len(texts)))


def refuses(
    code: grpc.StatusCode, message: str, details: bytes | None = None, after: tuple[pb.GenerateResponse, ...] = ()
) -> Script:
    """Ends with an error, after the messages `after`."""

    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield from after
        if details is not None:
            context.set_trailing_metadata(((DETAILS_KEY, details),))
        context.abort(code, message)

    return script


class FakeServer:
    """Records every request, and who went away; contexts are those of gRPC's threaded server."""

    def __init__(self, port: int = 0) -> None:
        self.arrived: queue.Queue[str] = queue.Queue()
        """Prompts, as they come in."""
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.remaining_s: list[float | None] = []
        self.cancelled: queue.Queue[str] = queue.Queue()
        """Prompts of held generations that the client gave up."""
        self.answers = Answers()
        self.batches: queue.Queue[BatchScript] = queue.Queue()
        self.asked: list[Any] = []
        """Requests of the unary calls that are recorded."""
        self._scripts: queue.Queue[Script] = queue.Queue()
        self._server = grpc.server(ThreadPoolExecutor(16))
        add_InferenceServicer_to_server(_Servicer(self), self._server)
        add_TracesServicer_to_server(_Traces(self), self._server)
        add_AdminServicer_to_server(_Admin(self), self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def play(self, *scripts: Script) -> None:
        for script in scripts:
            self._scripts.put(script)

    def next_script(self) -> Script:
        return self._scripts.get(timeout=DEADLINE_S)

    def holds(self, *responses: pb.GenerateResponse) -> Script:
        """These messages, then silence until the client goes away, which `cancelled` tells."""

        def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
            gone = threading.Event()

            def on_gone() -> None:
                self.cancelled.put(request.prompt)
                gone.set()

            if not context.add_callback(on_gone):
                on_gone()
            yield from responses
            gone.wait(DEADLINE_S)

        return script

    def stop(self) -> None:
        """At once: what is running is cut off."""
        assert self._server.stop(None).wait(DEADLINE_S)


class Answers:
    """What the unary calls answer."""

    def __init__(self) -> None:
        self.running = {"req-1"}
        self.model = pb.GetModelResponse(name="tiny", architecture="Qwen3MoeForCausalLM", max_model_len=2048)
        self.traces: dict[str, trace_pb2.RequestTrace] = {}
        self.load = pb.GetLoadResponse(num_queued=1, num_running=2)
        self.changes: list[pb.WatchClusterResponse] = []
        self.server = pb.GetServerInfoResponse(version="0.1.0", model="tiny", uptime_s=1.5)


class _Servicer(InferenceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._fake = server

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self._fake.requests.append(request)
        self._fake.metadata.append(dict(context.invocation_metadata()))
        self._fake.remaining_s.append(context.time_remaining())
        self._fake.arrived.put(request.prompt)
        yield from self._fake.next_script()(request, context)

    def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:  # noqa: N802
        return pb.CancelResponse(found=request.request_id in self._fake.answers.running)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        if request.model not in ("", self._fake.answers.model.name):
            context.abort(grpc.StatusCode.NOT_FOUND, f"model: got {request.model!r}, must be one of 'tiny'")
        return self._fake.answers.model

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        return self._fake.answers.server

    def GenerateBatch(  # noqa: N802
        self, request: pb.GenerateBatchRequest, context: Any
    ) -> Iterator[pb.GenerateBatchResponse]:
        self._fake.asked.append(request)
        self._fake.metadata.append(dict(context.invocation_metadata()))
        yield from self._fake.batches.get(timeout=DEADLINE_S)(request, context)

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        self._fake.asked.append(request)
        return pb.TokenizeResponse(token_ids=[1, 2], token_strs=["a", "b"], max_model_len=2048)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        return pb.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[self._fake.answers.model])

    def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:  # noqa: N802
        return self._fake.answers.load

    def WatchCluster(  # noqa: N802
        self, request: pb.WatchClusterRequest, context: Any
    ) -> Iterator[pb.WatchClusterResponse]:
        gone = threading.Event()

        def end() -> None:  # who cancels between two changes is not asked for the next: nothing below runs then
            self._fake.cancelled.put("watch")
            gone.set()

        if not context.add_callback(end):
            end()
        yield from self._fake.answers.changes
        gone.wait(DEADLINE_S)


class _Admin(AdminServicer):
    def __init__(self, server: FakeServer) -> None:
        self._fake = server

    def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:  # noqa: N802
        self._fake.asked.append(request)
        if request.worker_id != "w0":
            message = f"worker_id: got {request.worker_id!r}, must be one of 'w0'"
            packed = pack_details(grpc.StatusCode.NOT_FOUND, message, ErrorDetails(field="worker_id"))
            context.set_trailing_metadata(((DETAILS_KEY, packed),))
            context.abort(grpc.StatusCode.NOT_FOUND, message)
        return admin_pb2.DrainResponse()

    def SetPolicy(  # noqa: N802
        self, request: admin_pb2.SetPolicyRequest, context: Any
    ) -> admin_pb2.SetPolicyResponse:
        return admin_pb2.SetPolicyResponse(previous=f"before {request.policy}")

    def FlushPrefixCache(  # noqa: N802
        self, request: admin_pb2.FlushPrefixCacheRequest, context: Any
    ) -> admin_pb2.FlushPrefixCacheResponse:
        names = [request.worker_id] if request.worker_id else ["w0", "w1"]
        flushed = [admin_pb2.FlushedCache(worker_id=name, num_blocks=i) for i, name in enumerate(names, start=5)]
        return admin_pb2.FlushPrefixCacheResponse(workers=flushed)


class _Traces(TracesServicer):
    def __init__(self, server: FakeServer) -> None:
        self._fake = server

    def GetRequestTrace(  # noqa: N802
        self, request: trace_pb2.GetRequestTraceRequest, context: Any
    ) -> trace_pb2.GetRequestTraceResponse:
        return trace_pb2.GetRequestTraceResponse(trace=self._fake.answers.traces.get(request.request_id))


def main() -> None:
    """For tests that kill a server's process: prints the target, holds every generation after two tokens."""
    server = FakeServer()
    for _ in range(8):
        server.play(server.holds(started(), delta("a", 1), delta("b", 2)))
    print(server.target, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc

from penstock.base import ClientBase, GenerationBase
from penstock.progress import Progress
from penstock.rpc import event_of, model_description, request_trace, server_info
from penstock.traces import RequestTrace
from penstock.types import Delta, ModelDescription, ServerInfo
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import trace_pb2
from penstock.v1.inference_pb2_grpc import InferenceStub
from penstock.v1.trace_pb2_grpc import TracesStub


class Call(Iterator[pb.GenerateResponse], Protocol):
    """What the stub's `Generate` returns."""

    def cancel(self) -> bool: ...


Req = TypeVar("Req")
Res = TypeVar("Res")


class Generation(GenerationBase):
    """An iterator over what a model writes, as it comes.

    Closing it, or letting go of it before its end (a `break` out of `for delta in client.generate(...)`), cancels the
    request on the server. `close` may be called from any thread; whoever reads gets `RequestCancelledError`.
    """

    def __init__(self, progress: Progress, start: Callable[[], Call], sleep: Callable[[float], None]) -> None:
        super().__init__(progress)
        self._start = start
        self._sleep = sleep
        self._call = start()

    @property
    def text(self) -> str:
        """All of the text: runs to the end. Raises what iterating raises."""
        for _ in self:
            pass
        return "".join(self._progress.texts)

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while self._progress.open():
            response = self._read()
            if response is None:
                self._progress.end()
            elif (delta := self._progress.take(event_of(response))) is not None:
                return delta
        raise StopIteration

    def _read(self) -> pb.GenerateResponse | None:
        while True:
            try:
                return next(self._call, None)
            except grpc.RpcError as failure:
                delay_s = self._progress.fail(failure)
            if delay_s is None:
                return None
            self._sleep(delay_s)
            self._call = self._start()
            if self._progress.closed:  # meanwhile, by another thread
                self._call.cancel()

    def close(self) -> None:
        """Cancel what has not come yet. Idempotent."""
        self._progress.close()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client(ClientBase[Generation]):
    """Penstock's client; threads may share one.

    ```python
    with Client("127.0.0.1:50051") as client:
        for delta in client.generate("def __init__(self", max_tokens=64):
            print(delta, end="", flush=True)
    ```
    """

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.target, self._options)
        else:
            self._channel = grpc.secure_channel(self.target, self._credentials, self._options)
        self._stub, self._traces = InferenceStub(self._channel), TracesStub(self._channel)

    def _generation(self, request: pb.GenerateRequest, progress: Progress) -> Generation:
        def start() -> Call:
            return self._stub.Generate(request, **self._call_options(progress.remaining_s()))

        return Generation(progress, start, self._sleep or time.sleep)

    def cancel(self, request_id: str) -> bool:
        """Stop a generation, anybody's. False where the server knows of none that is running."""
        return self._ask(self._stub.Cancel, pb.CancelRequest(request_id=request_id), request_id).found

    def model(self, name: str = "") -> ModelDescription:
        """The model of this name; "" is the one that is served. Raises `ModelNotFoundError`."""
        return model_description(self._ask(self._stub.GetModel, pb.GetModelRequest(model=name)))

    def server_info(self) -> ServerInfo:
        """What the server is, how busy, and on which workers."""
        return server_info(self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    def request_trace(self, request_id: str) -> RequestTrace | None:
        """Where the time of a request went and why it went where it did, while it runs and for some time after. None
        where the server knows of none of this id, or no longer does."""
        wire = trace_pb2.GetRequestTraceRequest(request_id=request_id)
        return request_trace(self._ask(self._traces.GetRequestTrace, wire, request_id))

    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Req, Res], request: Req, request_id: str | None = None) -> Res:
        try:
            return method(request, **self._control_options())
        except grpc.RpcError as failure:
            raise self._error(failure, request_id) from failure

    def close(self) -> None:
        """Cancel what is running and let go of the connection. Idempotent."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from penstock.base import ClientBase, GenerationBase, Metadata
from penstock.batch import Batch, BatchCall, BatchProgress
from penstock.cluster import ClusterChange, ClusterLoad, Tokens
from penstock.progress import Progress
from penstock.rpc import (
    cluster_change,
    cluster_load,
    event_of,
    model_description,
    request_trace,
    server_info,
    tokenize_request,
    tokens,
)
from penstock.traces import RequestTrace
from penstock.types import Delta, Message, ModelDescription, ServerInfo
from penstock.v1 import admin_pb2, trace_pb2
from penstock.v1 import inference_pb2 as pb
from penstock.v1.admin_pb2_grpc import AdminStub
from penstock.v1.inference_pb2_grpc import InferenceStub
from penstock.v1.trace_pb2_grpc import TracesStub

if TYPE_CHECKING:
    from typing import Self


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


class Client(ClientBase[Generation, Batch]):
    """Penstock's client; threads may share one.

    ```python
    with Client("127.0.0.1:50051") as client:
        for delta in client.generate("def __init__(self", max_tokens=64):
            print(delta, end="", flush=True)
    ```
    """

    def _connect(self) -> None:
        self._channels = [self._channel_to(target) for target in self.targets]
        self._stubs = [(InferenceStub(each), TracesStub(each), AdminStub(each)) for each in self._channels]

    def _channel_to(self, target: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(target, self._options)
        return grpc.secure_channel(target, self._credentials, self._options)

    @property
    def _stub(self) -> InferenceStub:
        return self._stubs[self._at][0]

    @property
    def _traces(self) -> TracesStub:
        return self._stubs[self._at][1]

    @property
    def _admin(self) -> AdminStub:
        return self._stubs[self._at][2]

    def _generation(self, request: pb.GenerateRequest, progress: Progress, metadata: Metadata) -> Generation:
        def start() -> Call:
            self._retarget(progress)
            return self._stub.Generate(progress.again(request), **self._call_options(progress.remaining_s(), metadata))

        return Generation(progress, start, self._sleep or time.sleep)

    def _batch(self, request: pb.GenerateBatchRequest, progress: BatchProgress, metadata: Metadata) -> Batch:
        def start() -> BatchCall:
            self._retarget(progress)
            return self._stub.GenerateBatch(request, **self._call_options(progress.remaining_s(), metadata))

        return Batch(progress, start, self._sleep or time.sleep)

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

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        model: str = "",
        add_special_tokens: bool | None = None,
        return_token_strs: bool = False,
    ) -> Tokens:
        """The tokens of a prompt, or of a chat by the model's template, as `generate` would see them."""
        header = {
            "model": model,
            "add_special_tokens": add_special_tokens,
            "return_token_strs": return_token_strs,
        }
        request = tokenize_request({"prompt": prompt, "messages": messages}, header)
        return tokens(self._ask(self._stub.Tokenize, request))

    def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """The text of tokens, special ones by their names."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._ask(self._stub.Detokenize, request).text

    def models(self) -> tuple[ModelDescription, ...]:
        """All models that are served."""
        answer = self._ask(self._stub.ListModels, pb.ListModelsRequest())
        return tuple(map(model_description, answer.models))

    def load(self) -> ClusterLoad:
        """How busy the server and its workers are; cheap, made to be asked often."""
        return cluster_load(self._ask(self._stub.GetLoad, pb.GetLoadRequest()))

    def watch_cluster(self) -> Generator[ClusterChange]:
        """The workers and pairs that there are, then every change of them, until the generator is closed or the server
        goes away (`UnavailableError`). Load is no change: see `load`."""
        call = self._stub.WatchCluster(pb.WatchClusterRequest(), **self._call_options(None))
        try:
            for change in call:
                yield cluster_change(change)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure
        finally:
            call.cancel()

    def drain(self, worker_id: str, *, deadline_s: float | None = None) -> None:
        """Give a worker no more work, and end it when what it has is over, or after `deadline_s` (30 by default).
        Raises `WorkerNotFoundError`. `watch_cluster` tells when it is gone."""
        self._ask(self._admin.Drain, admin_pb2.DrainRequest(worker_id=worker_id, deadline_s=deadline_s))

    def set_policy(self, policy: str) -> str:
        """Have requests placed by another policy, until the router restarts; which one it was before."""
        return self._ask(self._admin.SetPolicy, admin_pb2.SetPolicyRequest(policy=policy)).previous

    def flush_prefix_cache(self, worker_id: str = "") -> dict[str, int]:
        """Forget the cached prefixes that no running request holds, of one worker or of all. Tells how many blocks, by
        worker. Raises `WorkerNotFoundError`."""
        request = admin_pb2.FlushPrefixCacheRequest(worker_id=worker_id)
        answer = self._ask(self._admin.FlushPrefixCache, request)
        return {worker.worker_id: worker.num_blocks for worker in answer.workers}

    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Req, Res], request: Req, request_id: str | None = None) -> Res:
        try:
            return method(request, **self._control_options())
        except grpc.RpcError as failure:
            raise self._error(failure, request_id, leave=True) from failure

    def close(self) -> None:
        """Cancel what is running and let go of the connection. Idempotent."""
        self._closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

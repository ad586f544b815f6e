"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

import grpc

from penstock.aio_batch import AsyncBatch
from penstock.base import ClientBase, GenerationBase, Metadata
from penstock.batch import BatchProgress
from penstock.cluster import ClusterChange, ClusterLoad, Tokens
from penstock.compat import being_cancelled
from penstock.errors import RequestCancelledError
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

    from penstock.aio_batch import BatchCall
    from penstock.v1.admin_pb2_grpc import AdminAsyncStub
    from penstock.v1.inference_pb2_grpc import InferenceAsyncStub
    from penstock.v1.trace_pb2_grpc import TracesAsyncStub

    Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]

Req = TypeVar("Req")
Res = TypeVar("Res")


class AsyncGeneration(GenerationBase):
    """An asynchronous iterator over what a model writes, as it comes.

    Closing it, cancelling the task that reads it, or letting go of it before its end (a `break` out of
    `async for delta in client.generate(...)`), cancels the request on the server.
    """

    def __init__(
        self, progress: Progress, start: Callable[[], Call], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        super().__init__(progress)
        self._start = start
        self._sleep = sleep
        self._loop = asyncio.get_running_loop()
        self._call = start()

    async def text(self) -> str:
        """All of the text: runs to the end. Raises what iterating raises."""
        async for _ in self:
            pass
        return "".join(self._progress.texts)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while self._progress.open():
            response = await self._read()
            if response is None:
                self._progress.end()
            elif (delta := self._progress.take(event_of(response))) is not None:
                return delta
        raise StopAsyncIteration

    async def _read(self) -> pb.GenerateResponse | None:
        while True:
            try:
                response = await self._call.read()
                return response if isinstance(response, pb.GenerateResponse) else None  # else: grpc.aio.EOF
            except asyncio.CancelledError:
                closed = self._progress.closed
                await self.aclose()
                if not being_cancelled(closed=closed):
                    self._progress.open()
                raise
            except grpc.RpcError as failure:
                delay_s = self._progress.fail(failure)
            if delay_s is None:
                return None
            await self._sleep(delay_s)
            self._call = self._start()
            if self._progress.closed:  # meanwhile, by another task
                self._call.cancel()

    async def aclose(self) -> None:
        """Cancel what has not come yet. Idempotent."""
        self._progress.close()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The call is not cancelled here: a garbage collection may come in any thread.
        call: Call | None = getattr(self, "_call", None)
        if call is not None and not call.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call.cancel)


class AsyncClient(ClientBase[AsyncGeneration, AsyncBatch]):
    """Penstock's client for asyncio, to be used in one event loop; it may be made before the loop runs.

    ```python
    async with AsyncClient("127.0.0.1:50051") as client:
        async for delta in client.generate("def __init__(self", max_tokens=64):
            print(delta, end="", flush=True)
    ```
    """

    def _connect(self) -> None:
        self._channels: list[grpc.aio.Channel] = []  # belong to a loop: made when one runs
        self._generations: WeakSet[AsyncGeneration | AsyncBatch] = WeakSet()

    @property
    def _stub(self) -> InferenceAsyncStub:
        return self._stubs[0]

    @property
    def _stubs(self) -> tuple[InferenceAsyncStub, TracesAsyncStub, AdminAsyncStub]:
        if not self._channels:
            self._channels = [self._channel_to(target) for target in self.targets]
            self._made = [(InferenceStub(each), TracesStub(each), AdminStub(each)) for each in self._channels]
        return self._made[self._at]

    def _channel_to(self, target: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, self._options)
        return grpc.aio.secure_channel(target, self._credentials, self._options)

    def _generation(self, request: pb.GenerateRequest, progress: Progress, metadata: Metadata) -> AsyncGeneration:
        def start() -> Call:
            self._retarget(progress)
            return self._stub.Generate(progress.again(request), **self._call_options(progress.remaining_s(), metadata))

        generation = AsyncGeneration(progress, start, self._sleep or asyncio.sleep)
        self._generations.add(generation)
        return generation

    def _batch(self, request: pb.GenerateBatchRequest, progress: BatchProgress, metadata: Metadata) -> AsyncBatch:
        def start() -> BatchCall:
            self._retarget(progress)
            return self._stub.GenerateBatch(request, **self._call_options(progress.remaining_s(), metadata))

        batch = AsyncBatch(progress, start, self._sleep or asyncio.sleep)
        self._generations.add(batch)
        return batch

    async def cancel(self, request_id: str) -> bool:
        """Stop a generation, anybody's. False where the server knows of none that is running."""
        return (await self._ask(self._stub.Cancel, pb.CancelRequest(request_id=request_id), request_id)).found

    async def model(self, name: str = "") -> ModelDescription:
        """The model of this name; "" is the one that is served. Raises `ModelNotFoundError`."""
        return model_description(await self._ask(self._stub.GetModel, pb.GetModelRequest(model=name)))

    async def server_info(self) -> ServerInfo:
        """What the server is, how busy, and on which workers."""
        return server_info(await self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    async def request_trace(self, request_id: str) -> RequestTrace | None:
        """Where the time of a request went and why it went where it did, while it runs and for some time after. None
        where the server knows of none of this id, or no longer does."""
        wire = trace_pb2.GetRequestTraceRequest(request_id=request_id)
        return request_trace(await self._ask(self._stubs[1].GetRequestTrace, wire, request_id))

    async def tokenize(
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
        return tokens(await self._ask(self._stub.Tokenize, request))

    async def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """The text of tokens, special ones by their names."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._ask(self._stub.Detokenize, request)).text

    async def models(self) -> tuple[ModelDescription, ...]:
        """All models that are served."""
        answer = await self._ask(self._stub.ListModels, pb.ListModelsRequest())
        return tuple(map(model_description, answer.models))

    async def load(self) -> ClusterLoad:
        """How busy the server and its workers are; cheap, made to be asked often."""
        return cluster_load(await self._ask(self._stub.GetLoad, pb.GetLoadRequest()))

    async def watch_cluster(self) -> AsyncGenerator[ClusterChange]:
        """The workers and pairs that there are, then every change of them, until the generator is closed or the server
        goes away (`UnavailableError`). Load is no change: see `load`."""
        call = self._stub.WatchCluster(pb.WatchClusterRequest(), **self._call_options(None))
        try:
            async for change in call:
                yield cluster_change(change)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure
        finally:
            call.cancel()

    async def drain(self, worker_id: str, *, deadline_s: float | None = None) -> None:
        """Give a worker no more work, and end it when what it has is over, or after `deadline_s` (30 by default).
        Raises `WorkerNotFoundError`. `watch_cluster` tells when it is gone."""
        await self._ask(self._stubs[2].Drain, admin_pb2.DrainRequest(worker_id=worker_id, deadline_s=deadline_s))

    async def set_policy(self, policy: str) -> str:
        """Have requests placed by another policy, until the router restarts; which one it was before."""
        return (await self._ask(self._stubs[2].SetPolicy, admin_pb2.SetPolicyRequest(policy=policy))).previous

    async def flush_prefix_cache(self, worker_id: str = "") -> dict[str, int]:
        """Forget the cached prefixes that no running request holds, of one worker or of all. Tells how many blocks, by
        worker. Raises `WorkerNotFoundError`."""
        request = admin_pb2.FlushPrefixCacheRequest(worker_id=worker_id)
        answer = await self._ask(self._stubs[2].FlushPrefixCache, request)
        return {worker.worker_id: worker.num_blocks for worker in answer.workers}

    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Req, Res], request: Req, request_id: str | None = None
    ) -> Res:
        try:
            return await method(request, **self._control_options())
        except asyncio.CancelledError:
            if being_cancelled(closed=self._closed):
                raise
            raise RequestCancelledError("this client was closed") from None
        except grpc.RpcError as failure:
            raise self._error(failure, request_id, leave=True) from failure

    async def close(self) -> None:
        """Cancel what is running and let go of the connection. Idempotent."""
        self._closed = True
        for generation in list(self._generations):  # older gRPC leaves calls alone that nobody reads just now
            await generation.aclose()
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

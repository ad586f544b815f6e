"""The gRPC front door: `penstock.v1.Inference`."""

from __future__ import annotations

from contextlib import aclosing

import grpc

from core.clock import Clock
from core.errors import InvalidRequestError
from core.model_info import ModelInfo
from penstock.v1 import inference_pb2 as pb
from router.cluster_watch import ClusterWatch
from router.errors import aborting
from router.generation import Generator
from router.merging import merge, start_all
from router.rpc_cluster import to_change, to_load, to_model, to_server_info
from router.rpc_handlers import Context, add_service, readable
from router.rpc_inference import generate_input, prompt_of, to_batch_response, to_response, to_started
from router.stream import RequestDispatcher
from router.validation import Validator, ValidRequest
from text.tokenizer import Tokenizer

SERVICE = "penstock.v1.Inference"
MAX_BATCH = 256
"""Requests in one GenerateBatch."""


class InferenceService:
    """Answers each call; a call that ends early, for whatever reason, cancels its request.

    Requests come as `rpc_handlers.reader` gives them: a message, or the error to answer with.
    """

    def __init__(
        self,
        *,
        model: ModelInfo,
        tokenizer: Tokenizer,
        validator: Validator,
        generator: Generator,
        dispatcher: RequestDispatcher,
        watch: ClusterWatch,
        clock: Clock,
        version: str,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._validator = validator
        self._generator = generator
        self._dispatcher = dispatcher
        self._watch = watch
        self._clock = clock
        self._started_s = clock()
        self._version = version

    async def generate(self, received: pb.GenerateRequest | InvalidRequestError, context: Context) -> None:
        request_id = "" if isinstance(received, InvalidRequestError) else received.request_id
        async with aborting(context, request_id):
            wanted = generate_input(readable(received), context.time_remaining(), traceparent_of(context))
            generation = self._generator.start(await self._generator.prepare(wanted))
            try:
                await context.write(to_started(generation.started))
                async for event in generation:
                    await context.write(to_response(event))
            finally:
                generation.close()

    async def generate_batch(self, received: pb.GenerateBatchRequest | InvalidRequestError, context: Context) -> None:
        async with aborting(context):
            valids = await self._prepare_batch(readable(received), context)
            generations = start_all(self._generator, valids)
            try:
                for index, generation in enumerate(generations):
                    await context.write(pb.GenerateBatchResponse(index=index, response=to_started(generation.started)))
                async with aclosing(merge(generations)) as events:
                    async for index, came in events:
                        await context.write(to_batch_response(index, came, valids[index].request.request_id))
            finally:
                for generation in generations:
                    generation.close()

    async def _prepare_batch(self, request: pb.GenerateBatchRequest, context: Context) -> list[ValidRequest]:
        """All are valid, or the first that is not is refused."""
        if not 1 <= len(request.requests) <= MAX_BATCH:
            raise InvalidRequestError("requests", f"{len(request.requests)} requests", f"must be 1 to {MAX_BATCH}")
        remaining_s, traceparent = context.time_remaining(), traceparent_of(context)
        valids = []
        for index, each in enumerate(request.requests):
            try:
                valids.append(await self._generator.prepare(generate_input(each, remaining_s, traceparent)))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"requests[{index}].{error.field}", error.value, error.fix) from error
        return valids

    async def tokenize(
        self, received: pb.TokenizeRequest | InvalidRequestError, context: Context
    ) -> pb.TokenizeResponse:
        async with aborting(context):
            request = readable(received)
            self._validator.check_model(request.model)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else None
            token_ids = await self._generator.tokenize(prompt_of(request), special)
            names = map(self._generator.token_text, token_ids) if request.return_token_strs else ()
            return pb.TokenizeResponse(token_ids=token_ids, token_strs=names, max_model_len=self._max_model_len)

    async def detokenize(
        self, received: pb.DetokenizeRequest | InvalidRequestError, context: Context
    ) -> pb.DetokenizeResponse:
        async with aborting(context):
            request = readable(received)
            self._validator.check_model(request.model)
            return pb.DetokenizeResponse(text=await self._generator.detokenize(request.token_ids, "token_ids"))

    async def list_models(
        self, received: pb.ListModelsRequest | InvalidRequestError, context: Context
    ) -> pb.ListModelsResponse:
        async with aborting(context):
            readable(received)
            return pb.ListModelsResponse(models=[self._model_response()])

    async def get_load(self, received: pb.GetLoadRequest | InvalidRequestError, context: Context) -> pb.GetLoadResponse:
        async with aborting(context):
            readable(received)
            return to_load(self._dispatcher.info())

    async def watch_cluster(self, received: pb.WatchClusterRequest | InvalidRequestError, context: Context) -> None:
        async with aborting(context):
            readable(received)
            async with aclosing(self._watch.changes()) as changes:
                async for change in changes:
                    await context.write(to_change(change))

    async def cancel(self, received: pb.CancelRequest | InvalidRequestError, context: Context) -> pb.CancelResponse:
        async with aborting(context):
            request = readable(received)
            if not request.request_id:
                raise InvalidRequestError("request_id", "", "must name a request")
            return pb.CancelResponse(found=self._generator.cancel(request.request_id))

    async def get_model(
        self, received: pb.GetModelRequest | InvalidRequestError, context: Context
    ) -> pb.GetModelResponse:
        async with aborting(context):
            self._validator.check_model(readable(received).model)
            return self._model_response()

    async def get_server_info(
        self, received: pb.GetServerInfoRequest | InvalidRequestError, context: Context
    ) -> pb.GetServerInfoResponse:
        async with aborting(context):
            readable(received)
            return to_server_info(
                self._dispatcher.info(),
                version=self._version,
                model=self._model.name,
                uptime_s=self._clock() - self._started_s,
            )

    @property
    def _max_model_len(self) -> int:
        return min(self._dispatcher.max_model_len or self._model.max_model_len, self._model.max_model_len)

    def _model_response(self) -> pb.GetModelResponse:
        return to_model(
            self._model,
            max_model_len=self._max_model_len,
            has_chat_template=self._tokenizer.has_chat_template,
        )


def traceparent_of(context: Context) -> str:
    """The caller's W3C trace context; empty where it sent none."""
    metadata = context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == "traceparent"), "")


def add_to_server(service: InferenceService, server: grpc.aio.Server) -> None:
    unary = {
        "Cancel": (service.cancel, pb.CancelRequest),
        "GetModel": (service.get_model, pb.GetModelRequest),
        "GetServerInfo": (service.get_server_info, pb.GetServerInfoRequest),
        "Tokenize": (service.tokenize, pb.TokenizeRequest),
        "Detokenize": (service.detokenize, pb.DetokenizeRequest),
        "ListModels": (service.list_models, pb.ListModelsRequest),
        "GetLoad": (service.get_load, pb.GetLoadRequest),
    }
    streaming = {
        "Generate": (service.generate, pb.GenerateRequest),
        "GenerateBatch": (service.generate_batch, pb.GenerateBatchRequest),
        "WatchCluster": (service.watch_cluster, pb.WatchClusterRequest),
    }
    add_service(server, SERVICE, unary, streaming)

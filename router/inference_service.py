"""The gRPC front door: `penstock.v1.Inference`."""

from __future__ import annotations

from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from core.clock import Clock
from core.errors import InvalidRequestError
from core.model_info import ModelInfo
from penstock.v1 import inference_pb2 as pb
from router.errors import aborting
from router.generation import Generator
from router.rpc_inference import generate_input, reader, to_model, to_response, to_server_info, to_started
from router.stream import RequestDispatcher
from router.validation import Validator
from text.tokenizer import Tokenizer

SERVICE = "penstock.v1.Inference"

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class InferenceService:
    """Answers each call; a call that ends early, for whatever reason, cancels its request.

    Requests come as `rpc_inference.reader` gives them: a message, or the error to answer with.
    """

    def __init__(
        self,
        *,
        model: ModelInfo,
        tokenizer: Tokenizer,
        validator: Validator,
        generator: Generator,
        dispatcher: RequestDispatcher,
        clock: Clock,
        version: str,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._validator = validator
        self._generator = generator
        self._dispatcher = dispatcher
        self._clock = clock
        self._started_s = clock()
        self._version = version

    async def generate(self, received: pb.GenerateRequest | InvalidRequestError, context: Context) -> None:
        request_id = "" if isinstance(received, InvalidRequestError) else received.request_id
        async with aborting(context, request_id):
            wanted = generate_input(readable(received), context.time_remaining())
            generation = self._generator.start(await self._generator.prepare(wanted))
            try:
                await context.write(to_started(generation.started))
                async for event in generation:
                    await context.write(to_response(event))
            finally:
                generation.close()

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
            limit = self._dispatcher.max_model_len or self._model.max_model_len
            return to_model(
                self._model,
                max_model_len=min(limit, self._model.max_model_len),
                has_chat_template=self._tokenizer.has_chat_template,
            )

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


def readable(received: M | InvalidRequestError) -> M:
    if isinstance(received, InvalidRequestError):
        raise received
    return received


def _to_bytes(message: Message) -> bytes:
    return message.SerializeToString()


def add_to_server(service: InferenceService, server: grpc.aio.Server) -> None:
    """As the generated `add_InferenceServicer_to_server`, but a request that can't be read reaches its handler."""
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": stream(service.generate, reader(pb.GenerateRequest), _to_bytes),
        "Cancel": unary(service.cancel, reader(pb.CancelRequest), _to_bytes),
        "GetModel": unary(service.get_model, reader(pb.GetModelRequest), _to_bytes),
        "GetServerInfo": unary(service.get_server_info, reader(pb.GetServerInfoRequest), _to_bytes),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

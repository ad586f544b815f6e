"""The HTTP front door: the OpenAI API, vLLM's additions to it, and what operators ask of a server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import ErrorCode, InvalidRequestError, PenstockError
from core.model_info import ModelInfo
from router.errors import HttpError, InternalServerError, http_error, openai_error
from router.generation import Generator
from router.openai_choices import Choice
from router.openai_logprobs import Json
from router.openai_requests import Body, ChatBody, CompletionBody, parse_body
from router.openai_responses import CHAT, COMPLETION, Format, Writer, model_object
from router.openai_stream import Answer, Choices, StreamedAnswer, WholeAnswer, to_json
from router.openai_tokens import DetokenizeBody, TokenizeChatBody, parse_tokenize
from router.openai_tools import ToolCalling, ToolUse
from router.openapi import openapi
from router.stream import RequestDispatcher
from router.validation import GenerateInput, Validator
from telemetry.metrics import CONTENT_TYPE

BODY_TIMEOUT_S = 60.0
"""For all of a request to arrive."""
MAX_BODY_BYTES = 16 * 1024 * 1024

Renamed = Mapping[str, str]
_PATH = re.compile(r"\w+")


class OpenAIApi:
    """`wall_clock` is seconds since 1970; `draw_bits(k)` gives k random bits, for ids; `metrics` is an exposition,
    `trace` what is known of a request by its id.

    Browsers of pages from `allowed_origins` may read the answers; without any, none may.
    """

    def __init__(
        self,
        *,
        model: ModelInfo,
        validator: Validator,
        generator: Generator,
        dispatcher: RequestDispatcher,
        metrics: Callable[[], bytes],
        trace: Callable[[str], Json | None],
        wall_clock: Callable[[], float],
        draw_bits: Callable[[int], int],
        version: str,
        tools: ToolCalling,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self._tools = tools
        self._allowed_origins = tuple(allowed_origins)
        self._model = model
        self._validator = validator
        self._generator = generator
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._trace = trace
        self._wall_clock = wall_clock
        self._draw_bits = draw_bits
        self._version = version
        self._created_s = int(wall_clock())

    def app(self) -> ASGIApp:
        app = FastAPI(title="Penstock", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.one_model, methods=["GET"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        app.add_api_route("/ping", self.health, methods=["GET", "POST"])
        app.add_api_route("/load", self.load, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/version", self.version, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        app.add_api_route("/requests/{request_id}/trace", self.request_trace, methods=["GET"])
        app.add_exception_handler(PenstockError, _on_error)
        app.add_exception_handler(HTTPException, _on_error)
        app.add_exception_handler(ClientDisconnect, _on_error)
        app.add_exception_handler(Exception, _on_error)
        if self._allowed_origins:
            app.add_middleware(
                CORSMiddleware, allow_origins=self._allowed_origins, allow_methods=["*"], allow_headers=["*"]
            )
        return RequestIds(app, lambda: f"{self._draw_bits(128):032x}")

    # ---- generating

    async def completions(self, request: Request) -> Response:
        body = parse_body(CompletionBody, await read_body(request))
        return await self._answer(request, body, body.inputs(), COMPLETION, {"token_ids": "prompt"}, None)

    async def chat_completions(self, request: Request) -> Response:
        body = parse_body(ChatBody, await read_body(request))
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        self._validator.check_model(body.model or "")
        tools = self._tools.offered(body.tools, body.tool_choice)
        use = self._tools.use(body, tools)
        return await self._answer(request, body, body.inputs(tools, use), CHAT, names, use)

    async def _answer(
        self,
        request: Request,
        body: Body,
        inputs: list[GenerateInput],
        form: Format,
        names: Renamed,
        use: ToolUse | None,
    ) -> Answer:
        """All inputs are valid, or none is queued. `names` are the fields' names in this body."""
        if traceparent := request.headers.get("traceparent"):
            inputs = [replace(each, traceparent=traceparent) for each in inputs]
        with renamed(names):
            valids = await self._generator.prepare_all(inputs)
        writer = Writer(
            form,
            f"{form.id_prefix}{body.request_id or valids[0].request.request_id}",
            self._model,
            int(self._wall_clock()),
            body.num_per_prompt,
            token_id_bytes if body.return_tokens_as_token_ids else self._generator.token_bytes,
            continuous_usage=body.continuous_usage,
            token_ids=bool(body.return_token_ids),
        )

        def make_choice(num_prompt_tokens: int, keep: bool) -> Choice:
            return Choice(num_prompt_tokens, use, lambda: f"call_{self._draw_bits(128):032x}", keep)

        def start() -> Choices:
            with renamed(names):
                return Choices(self._generator, valids, make_choice)

        if body.stream:
            return StreamedAnswer(start, writer, include_usage=body.include_usage)
        return WholeAnswer(start, writer)

    # ---- tokens

    async def tokenize(self, request: Request) -> Response:
        body = parse_tokenize(await read_body(request))
        self._validator.check_model(body.model or "")
        tools = self._tools.offered(body.tools) if isinstance(body, TokenizeChatBody) else ()
        with renamed({"prompt": "messages"} if isinstance(body, TokenizeChatBody) else {}):
            token_ids = await self._generator.tokenize(body.as_prompt(tools), body.add_special_tokens)
        strings = [self._generator.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        told = {"count": len(token_ids), "max_model_len": self._max_model_len, "tokens": token_ids}
        return json_response({**told, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        body = parse_body(DetokenizeBody, await read_body(request))
        self._validator.check_model(body.model or "")
        return json_response({"prompt": await self._generator.detokenize(body.tokens, "tokens")})

    # ---- asking

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model_object()]})

    async def one_model(self, name: str) -> Response:
        self._validator.check_model(name)
        return json_response(self._model_object())

    async def health(self) -> Response:
        """200 where something can serve, else 503: for load balancers."""
        serving = self._dispatcher.can_serve
        return json_response({"status": "ok" if serving else "unavailable"}, 200 if serving else 503)

    async def version(self) -> Response:
        return json_response({"version": self._version})

    async def metrics(self) -> Response:
        return Response(self._metrics(), media_type=CONTENT_TYPE)

    async def request_trace(self, request_id: str) -> Response:
        """As `penstock trace --json` prints it; 404 where nothing is known of the request."""
        trace = self._trace(request_id)
        if trace is None:
            message = f"request_id: got {request_id!r}, which this router never had, or has forgotten"
            return json_response(openai_error(message, ErrorCode.NOT_FOUND.openai_type, "request_id"), 404)
        return json_response(trace)

    async def openapi(self) -> Response:
        return json_response(openapi(self._version))

    async def load(self) -> Response:
        """How many requests are running or waiting."""
        info = self._dispatcher.info()
        return json_response({"server_load": info.num_running + info.num_queued})

    @property
    def _max_model_len(self) -> int:
        return min(self._dispatcher.max_model_len or self._model.max_model_len, self._model.max_model_len)

    def _model_object(self) -> Json:
        return model_object(self._model, self._max_model_len, self._created_s)


class RequestIds:
    """Gives every response an X-Request-Id: the client's own, or one that is drawn."""

    def __init__(self, app: ASGIApp, draw_id: Callable[[], str]) -> None:
        self.inner = app
        self._draw_id = draw_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        usable = 0 < len(given) <= 128 and given.isascii() and given.decode("latin-1").isprintable()
        request_id = given if usable else self._draw_id().encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        await self.inner(scope, receive, send_with_id)


async def read_body(request: Request, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """`InvalidRequestError` as soon as it is too long, or takes too long."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    fix = f"must be at most {MAX_BODY_BYTES} bytes"
                    raise InvalidRequestError("body", f"over {MAX_BODY_BYTES} bytes", fix)
    except TimeoutError:
        size = f"{len(body)} bytes and no end"
        raise InvalidRequestError("body", size, f"must arrive within {timeout_s:g} s") from None
    return bytes(body)


def token_id_bytes(token_id: int) -> bytes:
    """How vLLM names a token where its text might not be valid."""
    return f"token_id:{token_id}".encode()


@contextmanager
def renamed(names: Renamed) -> Iterator[None]:
    """Errors name fields as this API's clients know them."""
    try:
        yield
    except InvalidRequestError as error:
        field = _PATH.sub(lambda match: names.get(match[0], match[0]), error.field, count=1)
        raise InvalidRequestError(field, error.value, error.fix) from error


def json_response(value: Json, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def _on_error(_request: Request, error: Exception) -> Response:
    match error:
        case PenstockError():
            told = http_error(error)
        case HTTPException():
            told = HttpError(error.status_code, _no_such_route(error), error.headers or {})
        case ClientDisconnect():
            told = HttpError(ErrorCode.CANCELLED.http_status, {}, {})  # nobody is there to read it
        case _:
            told = http_error(InternalServerError())
    return Response(to_json(told.body), told.status, dict(told.headers), media_type="application/json")


def _no_such_route(error: HTTPException) -> dict[str, Any]:
    kind = ErrorCode.NOT_FOUND if error.status_code == 404 else ErrorCode.INVALID_ARGUMENT
    return openai_error(error.detail, kind.openai_type)

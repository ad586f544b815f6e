"""Front doors over a dispatcher in memory: what they do with tokens, whoever computes them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc.aio
from starlette.types import ASGIApp

from core.clock import ManualClock
from core.errors import PenstockError, RequestCancelledError
from core.kv_layout import WireDtype
from core.logprobs import TokenLogprobs
from core.model_info import ModelInfo, SamplingDefaults
from core.request import FinishReason, Request
from core.stats import RequestStats
from router.cluster_watch import ClusterWatch
from router.generation import Generator
from router.http_server import HttpServer
from router.inference_service import InferenceService, add_to_server
from router.info import ClusterInfo
from router.openai_http import OpenAIApi
from router.openai_tools import ToolCalling
from router.stream import RequestStream
from router.validation import Validator
from tests.text.conftest import byte_level
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

WAIT_S = 10.0
END_OF_TEXT = 1
CHAT_TEMPLATE = (
    "{%- if tools -%}tools:{{ tools | map(attribute='function.name') | join(',') }};{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and loop.first -%}{{- raise_exception('a user must begin') -}}{%- endif -%}"
    "<|user|>{{ m.role }}:{{ m.content }}"
    "{%- for c in m.tool_calls -%}{{ c.function.name }}({{ c.function.arguments | tojson }}){%- endfor -%}"
    "{%- if m.tool_call_id -%}[{{ m.tool_call_id }}]{%- endif -%}</s>"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|user|>assistant:{%- endif -%}"
)


def make_tokenizer(*, chat: bool = True) -> Tokenizer:
    template = ChatTemplate(CHAT_TEMPLATE, origin="test", special_tokens={}, now=datetime.now) if chat else None
    return Tokenizer(byte_level(), {"eos_token": "</s>"}, template)


@dataclass
class Running:
    """A request that was submitted, and what became of it."""

    request: Request
    stream: RequestStream
    timeout_s: float | None
    cancelled: bool = False
    stopped: bool = False

    def push(self, *token_ids: int, finish: FinishReason | None = None) -> None:
        assert self.stream.push(token_ids, finish)


@dataclass
class ScriptedDispatcher:
    """Answers every request with the tokens of `reply`, then with `finish`, `error`, or, with neither, nothing more."""

    tokenizer: Tokenizer
    reply: str = "the pipe"
    finish: FinishReason | None = FinishReason.LENGTH
    error: PenstockError | None = None
    refusal: PenstockError | None = None
    can_serve: bool = True
    max_model_len: int | None = None
    num_cached_tokens: int | None = None
    cluster: ClusterInfo = field(default_factory=lambda: ClusterInfo((), (), 0, 0))
    running: list[Running] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, request: Request, *, timeout_s: float | None) -> RequestStream:
        self._changed.set()
        if self.refusal:
            raise self.refusal
        stats = RequestStats("prefill-0", "decode-0", num_attempts=1, queue_s=0.25, ttft_s=0.5, e2e_s=1.0, kv_bytes=512)
        stats.num_cached_tokens = self.num_cached_tokens
        stream = RequestStream(
            request.request_id,
            max_buffered_tokens=1000,
            on_cancel=lambda: self._cancel(running),
            on_stop=lambda: self._stop(running),
            stats=stats,
        )
        running = Running(request, stream, timeout_s)
        self.running.append(running)
        prompt = [TokenLogprobs(token_id, -3.0, 9) for token_id in request.prompt_token_ids[1:]]
        for token_id in self.tokenizer.encode(self.reply):
            told = TokenLogprobs(token_id, -0.5, 2, ((5, -0.25), (token_id, -0.5))[: request.sampling.logprobs])
            stream.push(
                (token_id,),
                logprobs=[told] if request.sampling.logprobs is not None else [],
                prompt_logprobs=prompt if request.sampling.prompt_logprobs is not None else [],
            )
            prompt = []
        if self.error:
            stream.fail(self.error)
        elif self.finish:
            running.push(finish=self.finish)
        return stream

    def cancel(self, request_id: str) -> bool:
        for running in self.running:
            if running.request.request_id == request_id and not running.cancelled:
                self._cancel(running)
                return True
        return False

    def info(self) -> ClusterInfo:
        return self.cluster

    def reset(self) -> None:
        """As new, for the next test on the same server."""
        vars(self).update(vars(ScriptedDispatcher(self.tokenizer)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a submit, cancel or stop brings about."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_running(self, count: int = 1) -> Running:
        await self.until(lambda: len(self.running) >= count)
        return self.running[count - 1]

    async def until_cancelled(self, count: int = 1) -> None:
        await self.until(lambda: sum(running.cancelled for running in self.running) >= count)

    def _cancel(self, running: Running) -> None:
        running.cancelled = True
        running.stream.fail(RequestCancelledError("the request was cancelled"))
        self._changed.set()

    def _stop(self, running: Running) -> None:
        running.stopped = True
        self._changed.set()


@dataclass
class FrontDoors:
    """Everything in front of the dispatcher. Drawn bits count up from 1000: request ids and seeds are known."""

    dispatcher: ScriptedDispatcher
    tokenizer: Tokenizer
    model: ModelInfo
    validator: Validator
    generator: Generator
    draw_bits: Callable[[int], int]
    clock: ManualClock
    refusals: list[PenstockError]
    watch: ClusterWatch


@contextmanager
def front_doors(
    *, chat: bool = True, defaults: SamplingDefaults | None = None, kv_wire_dtype: WireDtype = "auto"
) -> Iterator[FrontDoors]:
    tokenizer = make_tokenizer(chat=chat)
    defaults = defaults or SamplingDefaults()
    model = ModelInfo("tiny", "TinyForCausalLM", "f00d", tokenizer.vocab_size, 128, (END_OF_TEXT,), defaults)
    bits = itertools.count(1000)
    dispatcher = ScriptedDispatcher(tokenizer)
    validator = Validator(model, tokenizer, lambda _: next(bits), kv_wire_dtype)
    refusals: list[PenstockError] = []
    with ThreadPoolExecutor(1) as executor:
        generator = Generator(
            model=model.name,
            dispatcher=dispatcher,
            validator=validator,
            tokenizer=tokenizer,
            executor=executor,
            on_refusal=refusals.append,
        )
        yield FrontDoors(
            dispatcher,
            tokenizer,
            model,
            validator,
            generator,
            lambda _: next(bits),
            ManualClock(5.0),
            refusals,
            ClusterWatch(dispatcher.info),
        )


@asynccontextmanager
async def grpc_door(doors: FrontDoors) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server with the Inference service."""
    server = grpc.aio.server()
    service = InferenceService(
        model=doors.model,
        tokenizer=doors.tokenizer,
        validator=doors.validator,
        generator=doors.generator,
        dispatcher=doors.dispatcher,
        watch=doors.watch,
        clock=doors.clock,
        version="1.2.3",
    )
    add_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        doors.watch.stop()
        await server.stop(None)


def http_app(doors: FrontDoors, *, allowed_origins: Sequence[str] = ()) -> ASGIApp:
    """The HTTP API by itself."""
    return OpenAIApi(
        model=doors.model,
        validator=doors.validator,
        generator=doors.generator,
        dispatcher=doors.dispatcher,
        metrics=lambda: b"penstock_up 1\n",
        trace=lambda request_id: {"request_id": request_id} if request_id == "known" else None,
        wall_clock=lambda: 1_700_000_000.5,
        draw_bits=doors.draw_bits,
        version="1.2.3",
        tools=ToolCalling(doors.tokenizer, "hermes"),
        allowed_origins=allowed_origins,
    ).app()


def http_routes(doors: FrontDoors) -> list[Any]:
    app: Any = http_app(doors)
    routes: list[Any] = app.inner.routes
    return routes


@asynccontextmanager
async def http_door(doors: FrontDoors) -> AsyncIterator[str]:
    """The base URL of a uvicorn server with the OpenAI API."""
    server = HttpServer(http_app(doors), "127.0.0.1", 0)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.stop(1.0)

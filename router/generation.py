"""One request, from what a client wrote to the text it reads: the pipeline that both front doors share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from core.errors import PenstockError
from core.logprobs import TokenLogprobs
from core.request import FinishReason
from core.stats import RequestStats
from router.access.access import CALLER, Caller
from router.stream import RequestDispatcher, RequestStream, TokenDelta
from router.validation import GenerateInput, Prompt, Resume, Validator, ValidRequest
from text.chat_template import Chat
from text.grammar import Structure
from text.stop_strings import StopMatcher, StopOutput
from text.tokenizer import Tokenizer

_INLINE_CHARACTERS = 2_000
"""Tokenizing so much takes about as long as handing it to a thread and back; longer prompts would stall the others."""


@dataclass(frozen=True, slots=True)
class Started:
    """Resolved: the seed and the id are those drawn where the client gave none."""

    request_id: str
    model: str
    seed: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens, and the characters they complete; `text` may lag behind, and either may be empty."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    stats: RequestStats


class Generation:
    """A request on its way: any number of TextDelta, then one Done.

    Whoever reads it owns it: `close` it in every case. Closed before its end, the request is cancelled and both
    workers let go of it. Iterating raises a `PenstockError` where the request fails.
    """

    def __init__(
        self,
        valid: ValidRequest,
        model: str,
        tokenizer: Tokenizer,
        stream: RequestStream,
        caller: Caller | None = None,
    ) -> None:
        """Output tokens go off the caller's quota as they come."""
        request = valid.request
        self.started = Started(request.request_id, model, request.sampling.seed, request.num_prompt_tokens)
        self._sampling = request.sampling
        self._stream = stream
        self.caller = caller
        self._detokenizer = tokenizer.detokenizer(
            request.prompt_token_ids, skip_special_tokens=valid.skip_special_tokens
        )
        self._include_stop = valid.include_stop
        self._stops = StopMatcher(valid.stop)
        self._has_stops = bool(valid.stop)
        self._num_output_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._told: TextDelta | None = None
        self._closed = False
        if valid.resume and valid.resume.token_ids:
            self._catch_up(valid.resume, request.finish_reason)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TextDelta | Done:
        if self._closed:
            raise StopAsyncIteration
        if self._told:
            told, self._told = self._told, None
            return told
        if self._finish_reason:
            self._closed = True
            counts = self.started.num_prompt_tokens, self._num_output_tokens
            return Done(self._finish_reason, *counts, self._stream.stats)
        return self._read(await anext(self._stream))

    def close(self) -> None:
        """Idempotent. Cancels what has not ended."""
        self._closed = True
        if not self._finish_reason:
            self._stream.cancel()

    def _catch_up(self, resume: Resume, finish_reason: FinishReason | None) -> None:
        """As if the tokens had come here. Text that they had let out and that did not reach the client comes first."""
        come = self._text_of(TokenDelta(resume.token_ids, finish_reason)).text
        if missing := come[resume.num_characters :]:
            self._told = TextDelta((), missing)

    def _read(self, delta: TokenDelta) -> TextDelta:
        if self.caller:
            self.caller.spend(len(delta.token_ids))
        return self._text_of(delta)

    def _text_of(self, delta: TokenDelta) -> TextDelta:
        """Text of a delta. Of the tokens after a stop string nothing is told: they were drawn in vain."""
        text = ""
        for num_read, token_id in enumerate(delta.token_ids, start=1):
            self._num_output_tokens += 1
            shown, stopped = self._read_token(token_id)
            text += shown
            if stopped:
                self._stream.stop()
                self._finish_reason = FinishReason.STOP
                return TextDelta(delta.token_ids[:num_read], text, delta.logprobs[:num_read], delta.prompt_logprobs)
        if delta.finish_reason:
            rest = self._stops.push(self._detokenizer.flush())
            text += self._shown(rest) if rest.stop else rest.text + self._stops.flush()
            self._finish_reason = FinishReason.STOP if rest.stop else delta.finish_reason
        return TextDelta(delta.token_ids, text, delta.logprobs, delta.prompt_logprobs)

    def _read_token(self, token_id: int) -> tuple[str, bool]:
        """The text that a token lets out, and whether a stop string is complete.

        A token that ends the request has no text, unless it was asked for. Stop strings count only after `min_tokens`
        tokens.
        """
        past_minimum = self._num_output_tokens > self._sampling.min_tokens
        if past_minimum and token_id in self._sampling.stop_token_ids:
            return self._detokenizer.push((token_id,)) if self._include_stop else "", False
        text = self._detokenizer.push((token_id,))
        if not (self._has_stops and past_minimum):
            return text, False
        output = self._stops.push(text)
        return self._shown(output), output.stop is not None

    def _shown(self, output: StopOutput) -> str:
        return output.text + (output.stop or "") if self._include_stop else output.text


class Generator:
    """Turns inputs into running generations."""

    def __init__(
        self,
        *,
        model: str,
        dispatcher: RequestDispatcher,
        validator: Validator,
        tokenizer: Tokenizer,
        executor: Executor,
        on_refusal: Callable[[PenstockError], None],
    ) -> None:
        """`executor` tokenizes long prompts, so that the loop goes on serving. `on_refusal` is told why a request was
        not let in."""
        self._model = model
        self._dispatcher = dispatcher
        self._validator = validator
        self._tokenizer = tokenizer
        self._executor = executor
        self._on_refusal = on_refusal
        self._owned: WeakValueDictionary[str, Generation] = WeakValueDictionary()

    async def prepare(self, wanted: GenerateInput) -> ValidRequest:
        """Validates and tokenizes; nothing is queued yet. `InvalidRequestError`, `UnknownModelError`."""
        return (await self.prepare_all([wanted]))[0]

    async def prepare_all(self, wanted: Sequence[GenerateInput]) -> list[ValidRequest]:
        """All are valid, or the first that is not is refused. Equal prompts are tokenized once."""
        with self._noting_refusals():
            for each in wanted:
                self._validator.check(each)
            prompts = dict.fromkeys((each.prompt, each.add_special_tokens) for each in wanted)
            token_ids = {prompt: await self.tokenize(*prompt) for prompt in prompts}
            structures = dict.fromkeys(each.sampling.structure for each in wanted)
            grammars = {structure: await self._compile(structure) for structure in structures}
            limit = self._dispatcher.max_model_len
            return [
                self._validator.finish(
                    each,
                    [*token_ids[each.prompt, each.add_special_tokens]],
                    limit,
                    grammars[each.sampling.structure],
                )
                for each in wanted
            ]

    def start(self, valid: ValidRequest) -> Generation:
        """Queues it. `OverloadedError` where there is no room, or the caller's quota is used up.

        One that is tried again takes over from the call before it, which may not have noticed yet that nobody listens.
        """
        caller = CALLER.get()
        if valid.resume is not None:
            self.cancel(valid.request.request_id)
            if valid.request.finish_reason is not None:
                return Generation(valid, self._model, self._tokenizer, _nothing_more(valid), caller)
        if caller is None:
            with self._noting_refusals():
                stream = self._dispatcher.submit(valid.request, timeout_s=valid.timeout_s)
            return Generation(valid, self._model, self._tokenizer, stream)
        valid.request.tenant, num_tokens = caller.tenant, valid.request.num_tokens
        with self._noting_refusals():
            caller.check_tokens(num_tokens)
            stream = self._dispatcher.submit(valid.request, timeout_s=valid.timeout_s)
        caller.spend(num_tokens)
        generation = Generation(valid, self._model, self._tokenizer, stream, caller)
        self._owned[valid.request.request_id] = generation
        return generation

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool | None = None) -> list[int]:
        """As `Validator.tokenize`, without stalling other requests."""
        if _num_characters(prompt) <= _INLINE_CHARACTERS:
            return self._validator.tokenize(prompt, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._validator.tokenize, prompt, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], field: str) -> str:
        """The text of tokens, special ones by their names. `field` is what the client calls them."""
        self._validator.check_token_ids(field, token_ids)
        if len(token_ids) <= _INLINE_CHARACTERS:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._tokenizer.decode(token_ids, skip_special_tokens=False)
        )

    async def _compile(self, structure: Structure | None) -> str:
        if structure is None:
            return ""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._validator.compile, structure)

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except PenstockError as error:
            self._on_refusal(error)
            raise

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, or part of a character's; a special token's name."""
        return self._tokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The token as the tokenizer names it."""
        return self._tokenizer.token_text(token_id)

    def cancel(self, request_id: str) -> bool:
        """False where no request of this id is running; others' requests are none for a caller who is no admin."""
        caller = CALLER.get()
        if caller is not None and not caller.record.admin:
            generation = self._owned.get(request_id)
            if generation is None or generation.caller is None or generation.caller.tenant != caller.tenant:
                return False
        return self._dispatcher.cancel(request_id)


def _nothing_more(valid: ValidRequest) -> RequestStream:
    """Of a request all of whose tokens have come elsewhere: there is nothing to compute, nor to cancel."""

    def ignore() -> None: ...

    return RequestStream(valid.request.request_id, max_buffered_tokens=1, on_cancel=ignore, on_stop=ignore)


def _num_characters(prompt: Prompt) -> int:
    """Those that must be tokenized."""
    match prompt:
        case str():
            return len(prompt)
        case Chat(messages, tools, documents):
            return sum(len(message.content) for message in messages) + sum(map(len, (*tools, *documents)))
        case _:
            return 0

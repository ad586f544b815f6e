"""What a client asked for, checked before anything is queued.

Both front doors speak the same neutral input. Whatever can never succeed is refused here, once, by an
`InvalidRequestError` that names the field, the value and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from core.errors import InvalidRequestError, UnknownModelError
from core.kv_layout import WireDtype, wire_dtype
from core.model_info import ModelInfo
from core.request import Disaggregation, FinishReason, Request, disaggregation
from core.sampling import SamplingParams
from core.trace_context import child_of
from text.chat_template import Chat
from text.grammar import GrammarCompiler, Structure
from text.tokenizer import Tokenizer

T = TypeVar("T")

MAX_STOPS = 16
MAX_BAD_WORDS = 256
MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-5
"""Below this, sampling is greedy."""
MIN_TOP_P = 1e-6
"""Below this, `top_p` leaves one token as well."""
MAX_NAME_LEN = 128
MAX_PRIORITY = 2**31 - 1
MAX_TOKEN_IDS = 4096
"""In each of the lists that say which tokens may come, or end the text."""


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """Sampling as a client writes it; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structure: Structure | None = None


Prompt = str | tuple[int, ...] | Chat
"""Text, token ids, or messages for the model's chat template."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What a client that tries again has of the answer: its tokens, and so many characters of text."""

    token_ids: tuple[int, ...] = ()
    num_characters: int = 0


@dataclass(frozen=True, slots=True)
class GenerateInput:
    """One request as it came. An empty `model` means the served one; an empty `request_id` is drawn; an empty
    `kv_wire_dtype` or `disaggregate` is the router's.

    `default_max_tokens` holds where `max_tokens` is unset, as far as the model's length leaves so much. `priority` is
    for the queue: lower goes first. `user` is whom the client asks for. `traceparent` is ignored where
    it makes no sense. Of a prompt longer than `truncate_prompt_tokens` its end is taken.
    """

    prompt: Prompt
    sampling: SamplingFields = SamplingFields()
    model: str = ""
    request_id: str = ""
    timeout_s: float | None = None
    default_max_tokens: int | None = None
    cache_salt: str = ""
    kv_wire_dtype: str = ""
    disaggregate: str = ""
    priority: int = 0
    user: str = ""
    traceparent: str = ""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that may be queued. The router makes the text and applies the stop strings, the workers all else."""

    request: Request
    stop: tuple[str, ...]
    timeout_s: float | None
    skip_special_tokens: bool = True
    include_stop: bool = False
    resume: Resume | None = None


class Validator:
    """Checks requests for one served model.

    `draw_bits(k)` is the source of randomness: k random bits as an integer. It makes seeds and request ids.
    `kv_wire_dtype` and `disaggregate` are those of requests which don't say.
    """

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer,
        draw_bits: Callable[[int], int],
        kv_wire_dtype: WireDtype = "auto",
        disaggregate: Disaggregation = "prefer",
    ) -> None:
        self._model, self._kv_wire_dtype, self._disaggregate = model, kv_wire_dtype, disaggregate
        self._tokenizer = tokenizer
        self._draw_bits = draw_bits
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)

    def check_model(self, name: str) -> None:
        if name and name != self._model.name:
            raise UnknownModelError(name, [self._model.name])

    def check(self, wanted: GenerateInput) -> None:
        """All that can be told without tokenizing, so that a bad request costs next to nothing."""
        self.check_model(wanted.model)
        self._sampling(wanted.sampling, max_tokens=self._model.max_model_len)
        _check_texts("stop", wanted.sampling.stop, MAX_STOPS)
        bias = [token_id for token_id, _ in wanted.sampling.logit_bias]
        for name, token_ids in (
            ("stop_token_ids", wanted.sampling.stop_token_ids),
            ("allowed_token_ids", wanted.sampling.allowed_token_ids),
            ("logit_bias", bias),
        ):
            if len(token_ids) > MAX_TOKEN_IDS:
                raise InvalidRequestError(name, f"{len(token_ids)} token ids", f"must be at most {MAX_TOKEN_IDS}")
            self.check_token_ids(name, token_ids)
        _check_texts("bad_words", wanted.sampling.bad_words, MAX_BAD_WORDS)
        _check_structure(wanted.sampling)
        for name in ("request_id", "cache_salt", "user"):
            text = getattr(wanted, name)
            _check_unicode(name, text)
            if len(text) > MAX_NAME_LEN:
                raise InvalidRequestError(name, text, f"must have at most {MAX_NAME_LEN} characters")
        if not -MAX_PRIORITY <= wanted.priority <= MAX_PRIORITY:
            raise InvalidRequestError("priority", wanted.priority, f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}]")
        if wanted.truncate_prompt_tokens is not None and wanted.truncate_prompt_tokens < 1:
            raise InvalidRequestError("truncate_prompt_tokens", wanted.truncate_prompt_tokens, "must be >= 1")
        wire_dtype(wanted.kv_wire_dtype or self._kv_wire_dtype)
        disaggregation(wanted.disaggregate or self._disaggregate)
        timeout_s = wanted.timeout_s
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InvalidRequestError("timeout_s", timeout_s, "must be a finite number of seconds > 0")

    def tokenize(self, prompt: Prompt, add_special_tokens: bool | None = None) -> list[int]:
        """The prompt's token ids. Special tokens go around text and not around a chat, whose template has written them,
        unless `add_special_tokens` says otherwise. May run in another thread: slow where the prompt is long."""
        match prompt:
            case Chat():
                _check_chat(prompt)
                text = self._tokenizer.chat_prompt(prompt)
                _check_unicode("messages", text)
                return self._tokenizer.encode(text, add_special_tokens=bool(add_special_tokens))
            case str():
                if not prompt:
                    raise InvalidRequestError("prompt", prompt, "must not be empty")
                _check_unicode("prompt", prompt)
                return self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens is not False)
            case _:
                if not prompt:
                    raise InvalidRequestError("token_ids", [], "must hold at least one token id")
                self.check_token_ids("token_ids", prompt)
                return list(prompt)

    def compile(self, structure: Structure | None) -> str:
        """The grammar of a structured output. May run in another thread: slow where it is large."""
        return self._grammars.compile(structure) if structure else ""

    def finish(
        self, wanted: GenerateInput, prompt_token_ids: list[int], max_model_len: int | None, grammar: str = ""
    ) -> ValidRequest:
        """Fits a checked, tokenized request into the model's length, or the workers' where they hold less."""
        limit = min(self._model.max_model_len, max_model_len or self._model.max_model_len)
        if wanted.truncate_prompt_tokens is not None:
            prompt_token_ids = prompt_token_ids[-wanted.truncate_prompt_tokens :]
        num_prompt = len(prompt_token_ids)
        if not num_prompt:
            raise InvalidRequestError("prompt", wanted.prompt, "must not be empty: it has no tokens")
        if num_prompt >= limit:
            fix = f"must leave room for one output token within max_model_len = {limit}"
            raise InvalidRequestError("prompt", f"{num_prompt} tokens", fix)
        left = limit - num_prompt
        max_tokens = wanted.sampling.max_tokens
        if max_tokens is not None and max_tokens > left:
            fix = f"must be at most {left}: the prompt has {num_prompt} tokens and max_model_len is {limit}"
            raise InvalidRequestError("max_tokens", max_tokens, fix)
        default = min(left, wanted.default_max_tokens or left)
        fields = wanted.sampling
        sampling = replace(
            self._sampling(fields, max_tokens=default), grammar=grammar, bad_words=self._bad_words(fields.bad_words)
        )
        request_id = wanted.request_id or f"{self._draw_bits(128):032x}"
        shown = fields.skip_special_tokens, fields.include_stop_str_in_output
        request = Request(
            request_id,
            prompt_token_ids,
            sampling,
            cache_salt=wanted.cache_salt,
            kv_wire_dtype=wire_dtype(wanted.kv_wire_dtype or self._kv_wire_dtype),
            disaggregate=disaggregation(wanted.disaggregate or self._disaggregate),
            priority=wanted.priority,
            user=wanted.user,
            traceparent=child_of(wanted.traceparent, self._draw_bits) if wanted.traceparent else "",
        )
        if wanted.resume is not None:
            self._resume(request, wanted.resume, fields, limit)
        return ValidRequest(request, fields.stop, wanted.timeout_s, *shown, wanted.resume)

    def _resume(self, request: Request, resume: Resume, fields: SamplingFields, limit: int) -> None:
        """The request as it stood when these tokens had come."""
        self.check_token_ids("resume.token_ids", resume.token_ids)
        num_tokens, sampling = len(resume.token_ids), request.sampling
        if not num_tokens:
            return
        if fields.seed is None and sampling.temperature > 0:
            raise InvalidRequestError("sampling.seed", None, "must be that of Started, where resume has tokens")
        room = min(sampling.max_tokens, limit - request.num_prompt_tokens)
        if num_tokens > room:
            raise InvalidRequestError("resume.token_ids", f"{num_tokens} tokens", f"must be at most {room}")
        request.output_token_ids.extend(resume.token_ids)
        request.sampling = replace(sampling, prompt_logprobs=None)  # they came with the first token
        if num_tokens == room:
            request.finish_reason = FinishReason.LENGTH
        if resume.token_ids[-1] in sampling.stop_token_ids and num_tokens > sampling.min_tokens:
            request.finish_reason = FinishReason.STOP

    def _sampling(self, fields: SamplingFields, *, max_tokens: int) -> SamplingParams:
        """The client's word, else generation_config.json's, else `max_tokens`, a drawn seed, and plain sampling."""
        defaults = self._model.defaults
        top_k = _first(fields.top_k, defaults.top_k, 0)
        eos = () if fields.ignore_eos else self._model.eos_token_ids
        params = SamplingParams(
            max_tokens=_first(fields.max_tokens, max_tokens),
            temperature=_first(fields.temperature, defaults.temperature, 1.0),
            top_p=_first(fields.top_p, defaults.top_p, 1.0),
            top_k=0 if top_k == -1 else top_k,
            seed=self._draw_bits(64) if fields.seed is None else fields.seed,
            min_tokens=_first(fields.min_tokens, 0),
            stop_token_ids=tuple(dict.fromkeys((*fields.stop_token_ids, *eos))),
            min_p=_first(fields.min_p, 0.0),
            repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
            frequency_penalty=_first(fields.frequency_penalty, 0.0),
            presence_penalty=_first(fields.presence_penalty, 0.0),
            logit_bias=fields.logit_bias,
            allowed_token_ids=fields.allowed_token_ids,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.prompt_logprobs,
        )
        if params.temperature > MAX_TEMPERATURE:
            raise InvalidRequestError("temperature", params.temperature, f"must be at most {MAX_TEMPERATURE}")
        # On their way these become single-precision numbers and 32-bit integers.
        return replace(
            params,
            temperature=0.0 if params.temperature < MIN_TEMPERATURE else params.temperature,
            top_p=max(params.top_p, MIN_TOP_P),
            top_k=min(params.top_k, self._model.vocab_size),
        )

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each as it begins a text, and as it follows a space."""
        texts = [text for word in words for text in (word, f" {word.lstrip(' ')}")]
        found = dict.fromkeys(tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return tuple(token_ids for token_ids in found if token_ids)

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        size = self._model.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            position = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < size)
            raise InvalidRequestError(f"{field}[{position}]", token_ids[position], f"must be a token id below {size}")


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def _check_texts(field: str, texts: Sequence[str], limit: int) -> None:
    if len(texts) > limit:
        raise InvalidRequestError(field, f"{len(texts)} strings", f"must be at most {limit}")
    for i, text in enumerate(texts):
        if not text:
            raise InvalidRequestError(f"{field}[{i}]", text, "must not be empty")
        _check_unicode(f"{field}[{i}]", text)


def _check_chat(chat: Chat) -> None:
    if not chat.messages:
        raise InvalidRequestError("messages", [], "must hold at least one message")
    for i, message in enumerate(chat.messages):
        _check_unicode(f"messages[{i}].role", message.role)
        _check_unicode(f"messages[{i}].content", message.content)


def _check_structure(fields: SamplingFields) -> None:
    """What would keep a structured output from its end."""
    if fields.structure is None:
        return
    _check_unicode(fields.structure.field, fields.structure.text)
    if fields.ignore_eos:
        raise InvalidRequestError("ignore_eos", True, "must be false with structured output, which ends itself")
    if fields.min_tokens:
        fix = "must be 0 with structured output, which ends itself"
        raise InvalidRequestError("min_tokens", fields.min_tokens, fix)


def _check_unicode(field: str, text: str) -> None:
    """Half of a surrogate pair is no character: JSON lets one through, UTF-8 has no bytes for it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fix = f"must be valid Unicode: there is a lone surrogate at character {error.start}"
        raise InvalidRequestError(field, text[error.start : error.start + 20], fix) from None

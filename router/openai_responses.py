"""Answers of the OpenAI API, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.logprobs import TokenLogprobs
from core.model_info import ModelInfo
from router.generation import Done, TextDelta
from router.openai_choices import Choice, Part
from router.openai_logprobs import Json, TokenBytes, chat_logprobs, completion_logprobs, prompt_logprobs


@dataclass(frozen=True, slots=True)
class Format:
    """Where the two endpoints differ. `whole` and `piece` hold a choice's text and calls, all of them or what is new.

    `logprobs` writes those of tokens after a number of characters. `prompt_in_choice`: what is told of prompts stands
    with each choice.
    """

    id_prefix: str
    whole_kind: str
    chunk_kind: str
    opening: Json | None
    """What a choice's stream begins with, before any text."""
    whole: Callable[[str, Sequence[Json]], Json]
    piece: Callable[[str, Sequence[Json]], Json]
    logprobs: Callable[[Sequence[TokenLogprobs], TokenBytes, int], Json]
    prompt_in_choice: bool


def _message(text: str, calls: Sequence[Json]) -> Json:
    """Content is null where there is nothing but calls."""
    message: Json = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    return {"message": message | ({"tool_calls": calls} if calls else {})}


COMPLETION = Format(
    id_prefix="cmpl-",
    whole_kind="text_completion",
    chunk_kind="text_completion",
    opening=None,
    whole=lambda text, _: {"text": text},
    piece=lambda text, _: {"text": text},
    logprobs=completion_logprobs,
    prompt_in_choice=True,
)
CHAT = Format(
    id_prefix="chatcmpl-",
    whole_kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    whole=_message,
    piece=lambda text, calls: {"delta": ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})},
    logprobs=lambda told, token_bytes, _: chat_logprobs(told, token_bytes),
    prompt_in_choice=False,
)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one answer. `created_s` is in seconds since 1970; `num_per_prompt` choices follow each other.

    With `continuous_usage` each chunk of a stream tells its choice's usage so far; with `token_ids` those are told too.
    """

    format: Format
    answer_id: str
    model: ModelInfo
    created_s: int
    num_per_prompt: int
    token_bytes: TokenBytes
    continuous_usage: bool = False
    token_ids: bool = False

    def whole(self, choices: Sequence[Choice], prompts: Sequence[Sequence[int]] = ()) -> Json:
        """`prompts` are the token ids of each choice's, for who wants them."""
        ended = [self._ended(i, choice) for i, choice in enumerate(choices)]
        more: Json = {"usage": self._usage(choices)}
        if choices[0].prompt_logprobs and not self.format.prompt_in_choice:
            more["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_logprobs, self.token_bytes)
        if self.token_ids and not self.format.prompt_in_choice:
            more["prompt_token_ids"] = list(prompts[0])
        elif self.token_ids:
            for choice, prompt in zip(ended, prompts, strict=True):
                choice["prompt_token_ids"] = list(prompt)
        return self._object(self.format.whole_kind, ended, **more)

    def _ended(self, index: int, choice: Choice) -> Json:
        logprobs = self._logprobs(choice.logprobs, 0)
        content = self.format.whole("".join(choice.texts), choice.calls)
        ended = _choice(index, content, choice.finish_reason, logprobs)
        if choice.prompt_logprobs and self.format.prompt_in_choice:
            ended["prompt_logprobs"] = prompt_logprobs(choice.prompt_logprobs, self.token_bytes)
        if self.token_ids:
            ended["token_ids"] = choice.token_ids
        return ended

    def _logprobs(self, told: Sequence[TokenLogprobs], first_offset: int) -> Json | None:
        return self.format.logprobs(told, self.token_bytes, first_offset) if told else None

    def num_characters(self, told: Sequence[TokenLogprobs]) -> int:
        """Of the tokens, each by itself."""
        return sum(len(self.token_bytes(t.token_id).decode(errors="replace")) for t in told)

    def opening(self, index: int, choice: Choice) -> Json | None:
        if self.format.opening is None:
            return None
        return self._chunk(choice, _choice(index, self.format.opening))

    def chunks(self, index: int, event: TextDelta | Done, part: Part, choice: Choice, first_offset: int) -> list[Json]:
        """None for tokens that complete nothing and have no log-probabilities."""
        chunks = []
        content = self.format.piece(part.text, part.calls)
        if isinstance(event, Done):
            if part.text or part.calls:
                chunks.append(self._chunk(choice, _choice(index, content)))
            ended = _choice(index, self.format.piece("", ()), choice.finish_reason)
            return [*chunks, self._chunk(choice, ended)]
        if not (part.text or part.calls or event.logprobs or self.token_ids):
            return []
        new = _choice(index, content, None, self._logprobs(event.logprobs, first_offset))
        if self.token_ids:
            new["token_ids"] = list(event.token_ids)
        return [self._chunk(choice, new)]

    def _chunk(self, choice: Choice, content: Json) -> Json:
        more: Json = {}
        if self.continuous_usage:
            more["usage"] = _usage(choice.num_prompt_tokens, choice.num_output_tokens)
        return self._object(self.format.chunk_kind, [content], **more)

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        return self._object(self.format.chunk_kind, [], usage=self._usage(choices))

    def _usage(self, choices: Sequence[Choice]) -> Json:
        """A prompt counts once, however many choices it has."""
        counts = [choice.done for choice in choices if choice.done]
        prompts = counts[:: self.num_per_prompt]
        num_prompt = sum(done.num_prompt_tokens for done in prompts)
        num_cached = sum(done.stats.num_cached_tokens or 0 for done in prompts)
        return _usage(num_prompt, sum(done.num_output_tokens for done in counts), num_cached)

    def _object(self, kind: str, choices: list[Json], **more: Json) -> Json:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "choices": choices,
            **more,
        }


def _usage(num_prompt: int, num_output: int, num_cached: int | None = None) -> Json:
    usage: Json = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    return usage if num_cached is None else {**usage, "prompt_tokens_details": {"cached_tokens": num_cached}}


def _choice(index: int, content: Json, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def model_object(model: ModelInfo, max_model_len: int, created_s: int) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": created_s,
        "owned_by": "penstock",
        "max_model_len": max_model_len,
    }

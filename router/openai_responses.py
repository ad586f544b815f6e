"""Answers of the OpenAI API, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.logprobs import TokenLogprobs
from core.model_info import ModelInfo
from router.generation import Done, TextDelta
from router.openai_logprobs import Json, TokenBytes, chat_logprobs, completion_logprobs, prompt_logprobs

__all__ = ["CHAT", "COMPLETION", "Choice", "Format", "Json", "Writer", "model_object"]


@dataclass(frozen=True, slots=True)
class Format:
    """Where the two endpoints differ. `whole` and `piece` hold a choice's text, all of it or what is new.

    `logprobs` writes those of tokens after a number of characters.
    """

    id_prefix: str
    whole_kind: str
    chunk_kind: str
    opening: Json | None
    """What a choice's stream begins with, before any text."""
    whole: Callable[[str], Json]
    piece: Callable[[str], Json]
    logprobs: Callable[[Sequence[TokenLogprobs], TokenBytes, int], Json]
    prompt_logprobs_in_choice: bool


COMPLETION = Format(
    id_prefix="cmpl-",
    whole_kind="text_completion",
    chunk_kind="text_completion",
    opening=None,
    whole=lambda text: {"text": text},
    piece=lambda text: {"text": text},
    logprobs=completion_logprobs,
    prompt_logprobs_in_choice=True,
)
CHAT = Format(
    id_prefix="chatcmpl-",
    whole_kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    piece=lambda text: {"delta": {"content": text} if text else {}},
    logprobs=lambda told, token_bytes, _: chat_logprobs(told, token_bytes),
    prompt_logprobs_in_choice=False,
)


@dataclass(slots=True)
class Choice:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    done: Done | None = None

    def take(self, event: TextDelta | Done) -> None:
        if isinstance(event, Done):
            self.done = event
        else:
            self.texts.append(event.text)
            self.logprobs += event.logprobs
            self.prompt_logprobs += event.prompt_logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.done.finish_reason.value if self.done else None


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one answer. `created_s` is in seconds since 1970; `num_per_prompt` choices follow each other."""

    format: Format
    answer_id: str
    model: ModelInfo
    created_s: int
    num_per_prompt: int
    token_bytes: TokenBytes

    def whole(self, choices: Sequence[Choice]) -> Json:
        ended = [self._ended(i, choice) for i, choice in enumerate(choices)]
        more: Json = {"usage": self._usage(choices)}
        if choices[0].prompt_logprobs and not self.format.prompt_logprobs_in_choice:
            more["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_logprobs, self.token_bytes)
        return self._object(self.format.whole_kind, ended, **more)

    def _ended(self, index: int, choice: Choice) -> Json:
        logprobs = self._logprobs(choice.logprobs, 0)
        ended = _choice(index, self.format.whole("".join(choice.texts)), choice.finish_reason, logprobs)
        if choice.prompt_logprobs and self.format.prompt_logprobs_in_choice:
            ended["prompt_logprobs"] = prompt_logprobs(choice.prompt_logprobs, self.token_bytes)
        return ended

    def _logprobs(self, told: Sequence[TokenLogprobs], first_offset: int) -> Json | None:
        return self.format.logprobs(told, self.token_bytes, first_offset) if told else None

    def num_characters(self, told: Sequence[TokenLogprobs]) -> int:
        """Of the tokens, each by itself."""
        return sum(len(self.token_bytes(t.token_id).decode(errors="replace")) for t in told)

    def opening(self, index: int) -> Json | None:
        if self.format.opening is None:
            return None
        return self._object(self.format.chunk_kind, [_choice(index, self.format.opening)])

    def chunk(self, index: int, event: TextDelta | Done, first_offset: int = 0) -> Json | None:
        """None for tokens that complete no character and have no log-probabilities."""
        if isinstance(event, Done):
            ended = _choice(index, self.format.piece(""), event.finish_reason.value)
            return self._object(self.format.chunk_kind, [ended])
        if not event.text and not event.logprobs:
            return None
        logprobs = self._logprobs(event.logprobs, first_offset)
        return self._object(self.format.chunk_kind, [_choice(index, self.format.piece(event.text), None, logprobs)])

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        return self._object(self.format.chunk_kind, [], usage=self._usage(choices))

    def _usage(self, choices: Sequence[Choice]) -> Json:
        """A prompt counts once, however many choices it has."""
        counts = [choice.done for choice in choices if choice.done]
        num_prompt = sum(done.num_prompt_tokens for done in counts[:: self.num_per_prompt])
        num_output = sum(done.num_output_tokens for done in counts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        }

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

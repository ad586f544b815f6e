"""Answers of the OpenAI API, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.model_info import ModelInfo
from router.generation import Done, TextDelta

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """Where the two endpoints differ. `whole` and `piece` hold a choice's text, all of it or what is new."""

    id_prefix: str
    whole_kind: str
    chunk_kind: str
    opening: Json | None
    """What a choice's stream begins with, before any text."""
    whole: Callable[[str], Json]
    piece: Callable[[str], Json]


COMPLETION = Format(
    id_prefix="cmpl-",
    whole_kind="text_completion",
    chunk_kind="text_completion",
    opening=None,
    whole=lambda text: {"text": text},
    piece=lambda text: {"text": text},
)
CHAT = Format(
    id_prefix="chatcmpl-",
    whole_kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    piece=lambda text: {"delta": {"content": text} if text else {}},
)


@dataclass(slots=True)
class Choice:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    done: Done | None = None

    def take(self, event: TextDelta | Done) -> None:
        if isinstance(event, Done):
            self.done = event
        else:
            self.texts.append(event.text)

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

    def whole(self, choices: Sequence[Choice]) -> Json:
        ended = [
            _choice(i, self.format.whole("".join(choice.texts)), choice.finish_reason)
            for i, choice in enumerate(choices)
        ]
        return self._object(self.format.whole_kind, ended, usage=self._usage(choices))

    def opening(self, index: int) -> Json | None:
        if self.format.opening is None:
            return None
        return self._object(self.format.chunk_kind, [_choice(index, self.format.opening)])

    def chunk(self, index: int, event: TextDelta | Done) -> Json | None:
        """None for tokens that complete no character."""
        if isinstance(event, Done):
            ended = _choice(index, self.format.piece(""), event.finish_reason.value)
            return self._object(self.format.chunk_kind, [ended])
        if not event.text:
            return None
        return self._object(self.format.chunk_kind, [_choice(index, self.format.piece(event.text))])

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


def _choice(index: int, content: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def model_object(model: ModelInfo, max_model_len: int, created_s: int) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": created_s,
        "owned_by": "penstock",
        "max_model_len": max_model_len,
    }

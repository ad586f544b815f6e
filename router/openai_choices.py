"""What has come of one choice of an answer: text, and the calls of tools in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from core.logprobs import TokenLogprobs
from core.request import FinishReason
from router.generation import Done, TextDelta
from router.openai_logprobs import Json
from router.openai_tools import ToolUse
from text.tools.calls import CallArguments, CallBegun, Piece, ToolCallParser


@dataclass(frozen=True, slots=True)
class Part:
    """What an event adds: text, and of calls what is new, as the API writes it in chunks."""

    text: str = ""
    calls: tuple[Json, ...] = ()


@dataclass(slots=True)
class Choice:
    """Reads the events of one choice; `new_call_id` draws the ids of calls. Keeps all, for a whole answer, or only
    counts, for one that is streamed."""

    num_prompt_tokens: int
    use: ToolUse | None
    new_call_id: Callable[[], str]
    keep: bool
    texts: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_output_tokens: int = 0
    has_calls: bool = False
    done: Done | None = None
    _parser: ToolCallParser | None = None

    def __post_init__(self) -> None:
        self._parser = self.use.parser() if self.use else None

    def take(self, event: TextDelta | Done) -> Part:
        if isinstance(event, Done):
            self.done = event
            part = self._part(self._parser.flush()) if self._parser else Part()
        else:
            self.num_output_tokens += len(event.token_ids)
            part = self._part(self._parser.push(event.text) if self._parser else [event.text])
        if self.keep:
            self._keep(event, part)
        return part

    def _part(self, pieces: Iterable[Piece]) -> Part:
        text, calls = "", dict[int, Json]()
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            elif self.use and self.use.single and piece.index:
                continue
            elif isinstance(piece, CallBegun):
                self.has_calls = True
                function = {"name": piece.name, "arguments": ""}
                head = {"index": piece.index, "id": self.new_call_id(), "type": "function"}
                calls[piece.index] = {**head, "function": function}
            elif isinstance(piece, CallArguments):
                call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += piece.text
        return Part(text, tuple(calls.values()))

    def _keep(self, event: TextDelta | Done, part: Part) -> None:
        self.texts.append(part.text)
        for call in part.calls:
            if "id" in call:
                self.calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                self.calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if isinstance(event, TextDelta):
            self.token_ids += event.token_ids
            self.logprobs += event.logprobs
            self.prompt_logprobs += event.prompt_logprobs

    @property
    def finish_reason(self) -> str | None:
        if self.done is None:
            return None
        called = self.has_calls and self.use is not None and self.use.reported
        return (
            "tool_calls" if called and self.done.finish_reason is FinishReason.STOP else self.done.finish_reason.value
        )

"""Commands to one worker that are not written yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from core.messages import Cancel, Command, Prefill, PromptPart, Reserve

Bulk = PromptPart | Reserve | Prefill


class Outbox:
    """Two queues: what carries prompts stays in order, everything else overtakes it.

    A Cancel may overtake the start of its own attempt, so it takes out of the queue what was not written of that: else
    the worker would begin afterwards what it was told to end.
    """

    def __init__(self) -> None:
        self._urgent: deque[Command] = deque()
        self._bulk: deque[Bulk] = deque()

    def __len__(self) -> int:
        return len(self._urgent) + len(self._bulk)

    def put(self, command: Command) -> None:
        if isinstance(command, Bulk):
            self._bulk.append(command)
            return
        if isinstance(command, Cancel):
            self._bulk = deque(bulk for bulk in self._bulk if bulk.ticket.key != command.ticket.key)
        self._urgent.append(command)

    def take(self, max_tokens: int) -> list[Command]:
        """The next message: all urgent commands, then bulk of up to `max_tokens` prompt tokens, but at least one."""
        return [*self._take_urgent(), *self._take_bulk(max_tokens)]

    def _take_urgent(self) -> Iterator[Command]:
        while self._urgent:
            yield self._urgent.popleft()

    def _take_bulk(self, max_tokens: int) -> Iterator[Command]:
        num_tokens = 0
        while self._bulk and (num_tokens == 0 or num_tokens + count_tokens(self._bulk[0]) <= max_tokens):
            command = self._bulk.popleft()
            num_tokens += count_tokens(command)
            yield command


def count_tokens(command: Bulk) -> int:
    return len(command.token_ids if isinstance(command, PromptPart) else command.work.token_ids)


def in_parts(command: Reserve | Prefill, max_tokens: int) -> Iterator[PromptPart | Reserve | Prefill]:
    """`command` with at most `max_tokens` tokens, after PromptParts that carry those before."""
    token_ids = command.work.token_ids
    offset = 0
    while len(token_ids) - offset > max_tokens:
        yield PromptPart(command.ticket, offset, token_ids[offset : offset + max_tokens])
        offset += max_tokens
    yield replace(command, work=replace(command.work, token_ids=token_ids[offset:], prompt_offset=offset))

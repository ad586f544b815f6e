"""The order in which commands go to a worker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.messages import Cancel, Command, Heartbeat, Prefill, PromptPart, Release, Reserve, Work
from core.sampling import SamplingParams
from core.ticket import Ticket
from router.outbox import Outbox, in_parts


def ticket(name: str = "t", attempt: int = 1) -> Ticket:
    return Ticket("r", attempt, name, "p", "d", 1)


def reserve(num_tokens: int, name: str = "t", attempt: int = 1) -> Reserve:
    return Reserve(ticket(name, attempt), Work(tuple(range(num_tokens)), 1, SamplingParams(max_tokens=1)))


def test_a_cancel_overtakes_prompts() -> None:
    outbox = Outbox()
    outbox.put(reserve(5000, "a"))
    outbox.put(reserve(5000, "b"))
    outbox.put(Cancel(ticket("c"), "why not"))
    assert outbox.take(4096) == [Cancel(ticket("c"), "why not"), reserve(5000, "a")]
    assert outbox.take(4096) == [reserve(5000, "b")]


def test_a_cancel_takes_back_what_was_not_sent_of_its_attempt_only() -> None:
    outbox = Outbox()
    outbox.put(PromptPart(ticket("a"), 0, (1, 2)))
    for command in (reserve(3, "a"), reserve(3, "b"), reserve(3, "a", attempt=2)):
        outbox.put(command)
    outbox.put(Cancel(ticket("a"), "gone"))
    assert outbox.take(100) == [Cancel(ticket("a"), "gone"), reserve(3, "b"), reserve(3, "a", attempt=2)]


def test_small_commands_keep_their_order() -> None:
    outbox = Outbox()
    commands: list[Command] = [Release(ticket("a")), Heartbeat(("b",)), Cancel(ticket("c"), "")]
    for command in commands:
        outbox.put(command)
    assert outbox.take(0) == commands
    assert len(outbox) == 0


def test_short_prompts_share_a_message_up_to_the_limit() -> None:
    outbox = Outbox()
    for name in "abcd":
        outbox.put(reserve(10, name))
    assert len(outbox.take(30)) == 3
    assert len(outbox.take(30)) == 1
    assert outbox.take(30) == []


@given(st.integers(1, 50), st.integers(1, 12))
def test_parts_put_together_are_the_prompt(num_tokens: int, max_tokens: int) -> None:
    command = reserve(num_tokens)
    *parts, rest = in_parts(command, max_tokens)
    assert isinstance(rest, Reserve)
    token_ids: list[int] = []
    for part in parts:
        assert isinstance(part, PromptPart)
        assert part.offset == len(token_ids)
        assert len(part.token_ids) == max_tokens
        token_ids.extend(part.token_ids)
    assert rest.work.prompt_offset == len(token_ids)
    assert 0 < len(rest.work.token_ids) <= max_tokens
    assert (*token_ids, *rest.work.token_ids) == command.work.token_ids


def test_what_is_short_is_not_taken_apart() -> None:
    command = Prefill(ticket(), Work((1, 2, 3), 3, SamplingParams(max_tokens=1)), num_skipped_tokens=2)
    assert list(in_parts(command, 3)) == [command]

"""Router and worker mean the same by the wire: what one end writes, the other reads as the equal value."""

from __future__ import annotations

import dataclasses
from enum import Enum
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import rpc
from core.errors import InvalidRequestError
from core.logprobs import TokenLogprobs
from core.messages import Command, Event, Load, SequenceTokens, StepTokens, WorkerHello, WorkerRole
from core.request import FinishReason
from core.sampling import SamplingParams
from penstock.v1 import worker_pb2 as pb
from router.rpc_commands import command_to_wire
from router.rpc_events import WorkerMessage, message_from_wire, role_from_wire

COMMANDS: tuple[type, ...] = get_args(Command)
EVENTS: tuple[type, ...] = get_args(Event)
SOME = settings(max_examples=30)
WIDE = {"checksum", "num_bytes", "num_preemptions", "num_prefix_queries", "num_prefix_hits"}
WIDE |= {f"num_{counted}" for counted in ("drafts", "draft_tokens", "accepted_tokens")}
"""Fields of 64 bits on the wire."""


def values(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Any value of the type that the wire can carry."""
    if hint is SamplingParams:
        return sampling_params()
    if hint is TokenLogprobs:
        number, token_id = st.floats(width=32, allow_nan=False), values(int)
        return st.builds(
            TokenLogprobs, token_id, number, token_id, st.lists(st.tuples(token_id, number), max_size=3).map(tuple)
        )
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        kind: Any = hint
        return st.builds(kind, **{f.name: values(hints[f.name], f.name) for f in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    if isinstance(hint, UnionType):
        return st.one_of([values(part) for part in get_args(hint)])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if parts[-1] is Ellipsis:
            return st.lists(values(parts[0]), max_size=4).map(tuple)
        return st.tuples(*map(values, parts))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 2**64 - 1 if name in WIDE else 2**32 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(),
        bytes: st.binary(),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[hint]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """All that are valid, with the single precision that the router leaves them."""
    max_tokens = draw(st.integers(1, 2**32 - 1))
    ids, tops = values(tuple[int, ...]), st.none() | st.integers(0, 20)
    grammar = draw(st.text(max_size=9))
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=draw(st.floats(0, 100, width=32)),
        top_p=draw(st.floats(0, 1, width=32, exclude_min=True)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
        min_tokens=0 if grammar else draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(ids),
        min_p=draw(st.floats(0, 1, width=32)),
        repetition_penalty=draw(st.floats(0, 10, width=32, exclude_min=True)),
        frequency_penalty=draw(st.floats(-2, 2, width=32)),
        presence_penalty=draw(st.floats(-2, 2, width=32)),
        logit_bias=draw(st.lists(st.tuples(values(int), st.floats(-100, 100, width=32)), max_size=3).map(tuple)),
        bad_words=draw(st.lists(ids.filter(bool), max_size=3).map(tuple)),
        allowed_token_ids=draw(ids),
        grammar=grammar,
        logprobs=draw(tops),
        prompt_logprobs=draw(tops),
    )


@pytest.mark.parametrize("kind", COMMANDS)
@SOME
@given(st.data())
def test_a_worker_reads_the_command_that_a_router_wrote(kind: type, data: st.DataObject) -> None:
    command = data.draw(values(kind))
    wire = command_to_wire(command).SerializeToString()
    assert rpc.command(pb.Command.FromString(wire)) == command


@pytest.mark.parametrize("kind", EVENTS)
@SOME
@given(st.data())
def test_a_router_reads_the_event_that_a_worker_wrote(kind: type, data: st.DataObject) -> None:
    event = data.draw(values(kind))
    assert read(rpc.worker_message([event], Load())).events == (event,)


@given(values(Load))
def test_a_router_reads_the_load_that_a_worker_wrote(load: Load) -> None:
    assert read(rpc.worker_message([], load)) == WorkerMessage(None, (), load)


@given(values(WorkerHello))
def test_a_router_reads_the_hello_that_a_worker_wrote(hello: WorkerHello) -> None:
    assert read(rpc.worker_hello_message(hello)) == WorkerMessage(hello, (), None)


def read(message: pb.WorkerMessage) -> WorkerMessage:
    return message_from_wire(pb.WorkerMessage.FromString(message.SerializeToString()))


def test_events_of_one_message_stay_in_order() -> None:
    events = [StepTokens((SequenceTokens((name, 1), (7,), FinishReason.STOP),)) for name in "abc"]
    assert [*read(rpc.worker_message(events, Load())).events] == events


@pytest.mark.parametrize("role", WorkerRole)
def test_roles_are_the_same_on_both_ends(role: WorkerRole) -> None:
    assert role_from_wire(rpc.ROLES[role]) is role


@pytest.mark.parametrize(
    "wire",
    [
        pb.Command(),
        pb.Command(reserve=pb.Reserve()),
        pb.Command(prefill=pb.Prefill(work=pb.Work(sampling=pb.EngineSampling(top_p=1, max_tokens=0)))),
        pb.Command(release=pb.Release(ticket=pb.Ticket(kv_wire_dtype="int4"))),
    ],
    ids=["unknown command", "no sampling", "max_tokens 0", "unknown wire dtype"],
)
def test_a_command_that_cannot_be_is_refused(wire: pb.Command) -> None:
    with pytest.raises(InvalidRequestError):
        rpc.command(wire)

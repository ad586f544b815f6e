"""Two workers, K and V rounded between them: how far the tokens are from exact ones, and who may find what came so."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from core.kv_layout import WireDtype
from core.messages import PairUp, Prefill, Prefilled, Release, Released, Reserve, Reserved, WorkerRole
from core.ticket import Ticket
from tests.cluster.running_worker import MODEL, Duo, Router, Running, begin, new_name, prompt_of, rest, work
from text.tokenizer import Tokenizer

NUM_OUTPUT = 32
MAX_GAP = 0.1
"""In nats. Tokens differ only where two are nearly as likely."""
MIN_AGREEMENT = 0.9
WIRE_DTYPES: tuple[WireDtype, ...] = ("auto", "int8")
TEXTS = (
    "def read(path):\n    with open(path) as file:\n        return ",
    "The license says that you may copy and distribute verbatim copies of",
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, name, size):\n        self.name = name\n",
    "# Returns the sum of all elements of a list of numbers, or zero\ndef total(numbers):\n",
    "In this chapter we describe how the module is used and what its functions return. The first",
)


@dataclass
class Trio:
    """One router's sessions with a prefill and a decode worker, and with one that does both."""

    duo: Duo
    prefill: Router
    decode: Router
    alone: Router

    def ticket(self, dtype: WireDtype) -> Ticket:
        return replace(self.duo.ticket(new_name()), kv_wire_dtype=dtype)

    def generate(self, prompt: tuple[int, ...], dtype: WireDtype, salt: str | None = None) -> tuple[int, ...]:
        ticket = self.ticket(dtype)
        first = begin(self.prefill, self.decode, ticket, work(prompt, NUM_OUTPUT, salt=salt))
        return first, *rest(self.decode, ticket.key)

    def gaps(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> list[float]:
        """How much less likely than the best each token is, in nats, by exact K and V of all before it."""
        ticket = Ticket("request", 1, new_name(), "m", "m", 0)
        self.alone.say(Prefill(ticket, work((*prompt, *output), 1, prompt_logprobs=1)))
        told = self.alone.next(Prefilled, ticket.key).prompt_logprobs[-len(output) :]
        assert tuple(token.token_id for token in told) == output
        return [token.top[0][1] - token.logprob for token in told]

    def skipped(self, prompt: tuple[int, ...], dtype: WireDtype, salt: str) -> int:
        """What decode has cached of a prompt already."""
        ticket = self.ticket(dtype)
        self.decode.say(Reserve(ticket, work(prompt, salt=salt)))
        reserved = self.decode.next(Reserved, ticket.key)
        self.decode.say(Release(ticket))
        self.decode.next(Released, ticket.key)
        return reserved.num_skipped_tokens


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    duo, alone = Duo(), Running("m", WorkerRole.MIXED)
    try:
        trio = Trio(duo, Router(duo.prefill), Router(duo.decode), Router(alone))
        for router in (trio.prefill, trio.decode):
            router.say(duo.connect)
        for router in (trio.prefill, trio.decode):
            assert router.next(PairUp) == PairUp("p", "d", 1, transport="shm")
        yield trio
    finally:  # threads left behind would fail the tests that count them
        duo.close()
        alone.close()


def prompts() -> list[tuple[int, ...]]:
    """Text as the model knows it, short and long, and tokens at random."""
    tokenizer, rng = Tokenizer.from_folder(MODEL), random.Random(0)
    texts = [tuple(tokenizer.encode(text)) for text in (*TEXTS, "\n\n".join(TEXTS * 2))]
    return texts + [tuple(rng.choices(range(8, 3000), k=num_tokens)) for num_tokens in (5, 60, 150)]


def test_greedy_tokens_are_those_of_exact_kv_or_nearly_as_likely(trio: Trio) -> None:
    num_equal = num_tokens = 0
    for prompt in prompts():
        exact, rounded = trio.generate(prompt, "auto"), trio.generate(prompt, "int8")
        gaps = trio.gaps(prompt, rounded)
        assert max(gaps) <= MAX_GAP, f"token {gaps.index(max(gaps))} after a prompt of {len(prompt)}"
        num_equal += sum(map(operator.eq, exact, rounded))
        num_tokens += len(exact)
    assert num_equal >= MIN_AGREEMENT * num_tokens, f"{num_equal} of {num_tokens} tokens are equal"


def test_log_probabilities_move_a_little(trio: Trio) -> None:
    """So K and V were rounded, and not much."""
    prompt, told = prompts()[5], []
    for dtype in WIRE_DTYPES:
        ticket = trio.ticket(dtype)
        begin(trio.prefill, trio.decode, ticket, work(prompt, NUM_OUTPUT, logprobs=0))
        told.append([one.logprob for sequence in trio.decode.tokens(ticket.key) for one in sequence.logprobs])
    exact, rounded = told
    assert 0 < max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) <= MAX_GAP


def test_what_came_rounded_is_found_by_no_request_that_must_be_exact(trio: Trio) -> None:
    prompt, salt = prompt_of(150), new_name()
    trio.generate(prompt, "int8", salt)
    assert trio.skipped(prompt, "auto", salt) == 0
    assert trio.skipped(prompt, "int8", salt) == 144

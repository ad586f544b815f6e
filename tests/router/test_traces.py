"""What is kept of a request, and the stages that are made of it; times are set by hand."""

from __future__ import annotations

import pytest

from core.errors import UnavailableError
from core.events import LifecycleEvent as Event
from core.messages import TransferStats
from core.request import FinishReason
from core.ticket import Ticket
from router.ledger import Failure
from router.policies.model import Forecast, Placement, Route
from router.traces import MAX_ATTEMPTS, RequestTrace, Span, TraceRecorder, spans_of
from tests.router.test_admission import entry

NAMES = {"p": "prefill-0", "d": "decode-0"}
SOON = Forecast(ttft_s=0.1, itl_s=0.01, finish_s=1.0)
PAIR = Placement(Route("p", "d", 1), ("disaggregated", "least_loaded"), "least_loaded", SOON)
ALONE = Placement(Route("d", "d"), ("local",), "least_loaded", SOON)


class Story:
    """One request of a recorder, told event by event."""

    def __init__(self, capacity: int = 4) -> None:
        self.now_s = 100.0
        self.recorder = TraceRecorder(
            capacity, clock=lambda: self.now_s, wall_clock=lambda: 5000.0, name_of=lambda name: NAMES[name]
        )
        self.entry = entry(0)
        self.tell(Event.ARRIVED, 100.0)

    def tell(self, event: Event, at_s: float) -> None:
        self.now_s = at_s
        self.recorder.on_event(self.entry, event, at_s)

    def place(self, at_s: float, placement: Placement = PAIR) -> None:
        self.entry.placement = placement
        self.tell(Event.PLACED, at_s)
        self.entry.num_attempts += 1

    def fail(self, at_s: float, reason: str) -> None:
        self.entry.failure = Failure(reason, "as scripted")
        self.tell(Event.RETRIED, at_s)

    def carry(self, transfer: TransferStats, attempt: int = 1) -> None:
        self.recorder.on_transfer(self.entry, Ticket("r", attempt, "t", "p", "d", 1), transfer)

    @property
    def trace(self) -> RequestTrace:
        found = self.recorder.find(self.entry.request.request_id)
        assert found is not None
        return found

    def spans(self) -> dict[str, Span]:
        return {span.name: span for span in spans_of(self.trace)}


@pytest.fixture
def story() -> Story:
    return Story()


def whole(story: Story) -> Story:
    """A disaggregated request from 100 to 110 s, its figures told at the end."""
    story.place(101.0)
    story.tell(Event.RESERVED, 102.0)
    story.tell(Event.PREFILL_SENT, 102.0)
    story.tell(Event.FIRST_TOKEN, 105.0)
    story.entry.stats.commit_wait_s = 0.25
    story.tell(Event.ACCEPTED, 106.0)
    story.tell(Event.FIRST_DECODE_TOKEN, 107.0)
    story.entry.finish_reason = FinishReason.LENGTH
    story.tell(Event.FINISHED, 110.0)
    return story


def test_stages_follow_each_other_without_a_gap(story: Story) -> None:
    spans = whole(story).spans()
    assert {name: (span.worker, span.start_s, span.end_s) for name, span in spans.items() if span.slack_s is None} == {
        "queue": ("router", 100.0, 101.0),
        "reserve": ("decode-0", 101.0, 102.0),
        "prefill": ("prefill-0", 102.0, 105.0),
        "commit": ("decode-0", 105.0, 106.0),
        "first_decode_step": ("decode-0", 106.0, 107.0),
        "decode": ("decode-0", 107.0, 110.0),
    }
    assert (story.trace.outcome, story.trace.elapsed_s(999.0)) == ("length", 10.0)


def test_a_workers_wait_is_as_long_as_it_told_and_says_how_much_room_there_is(story: Story) -> None:
    assert whole(story).spans()["commit_wait"] == Span("commit_wait", 1, "decode-0", 105.75, 106.0, 0.75)


def test_a_transfer_lies_around_the_end_of_computing(story: Story) -> None:
    whole(story).carry(TransferStats(4096, transfer_s=1.5, exposed_s=0.5))
    spans = story.spans()
    assert spans["transfer_hidden"] == Span("transfer_hidden", 1, "prefill-0", 104.0, 105.0, 2.0)
    assert spans["transfer_exposed"] == Span("transfer_exposed", 1, "prefill-0", 105.0, 105.5, 0.5)


def test_what_a_worker_tells_never_reaches_past_what_the_router_saw(story: Story) -> None:
    """Such as an exposed transfer longer than the time up to Accepted: the first token's message was slow."""
    whole(story).carry(TransferStats(4096, transfer_s=60.0, exposed_s=2.0))
    spans = story.spans()
    assert (spans["transfer_hidden"].start_s, spans["transfer_hidden"].slack_s) == (102.0, 0.0)
    assert (spans["transfer_exposed"].start_s, spans["transfer_exposed"].end_s) == (104.0, 106.0)


def test_a_stage_that_runs_has_no_end(story: Story) -> None:
    story.place(101.0)
    assert story.spans()["reserve"].end_s is None
    assert (story.trace.outcome, story.trace.elapsed_s(103.0)) == ("running", 3.0)


def test_a_local_request_has_neither_reservation_nor_handover(story: Story) -> None:
    story.place(101.0, ALONE)
    story.tell(Event.PREFILL_SENT, 101.0)
    story.tell(Event.FIRST_TOKEN, 102.0)
    story.tell(Event.FIRST_DECODE_TOKEN, 103.0)
    assert [*story.spans()] == ["queue", "prefill", "first_decode_step", "decode"]


def test_one_token_has_no_decode(story: Story) -> None:
    story.place(101.0)
    story.tell(Event.RESERVED, 102.0)
    story.tell(Event.PREFILL_SENT, 102.0)
    story.tell(Event.FIRST_TOKEN, 105.0)
    story.entry.finish_reason = FinishReason.STOP
    story.tell(Event.FINISHED, 105.0)
    assert [*story.spans()] == ["queue", "reserve", "prefill"]


def test_between_two_attempts_a_request_waits(story: Story) -> None:
    story.place(101.0)
    story.tell(Event.RESERVED, 102.0)
    story.tell(Event.PREFILL_SENT, 102.0)
    story.fail(104.0, "session_lost")
    assert story.trace.outcome == "queued"
    story.place(105.0)
    story.tell(Event.RESERVED, 106.0)
    story.tell(Event.PREFILL_SENT, 106.0)
    story.tell(Event.RESUMED, 107.0)
    spans = [(s.name, s.attempt, s.start_s, s.end_s) for s in spans_of(story.trace)]
    assert spans == [
        ("queue", 1, 100.0, 101.0),
        ("reserve", 1, 101.0, 102.0),
        ("prefill", 1, 102.0, 104.0),
        ("queue", 2, 104.0, 105.0),
        ("reserve", 2, 105.0, 106.0),
        ("prefill", 2, 106.0, 107.0),
        ("commit", 2, 107.0, None),
    ]
    first, second = story.trace.attempts
    assert (first.outcome, first.detail) == ("failed", "session_lost: as scripted")
    assert (second.outcome, second.reasons) == ("running", ("disaggregated", "least_loaded"))


def test_a_choice_is_kept_with_what_it_was_made_by_and_what_stood_in_its_way(story: Story) -> None:
    story.entry.waits_for = ("no_decode_blocks",)
    story.place(101.0)
    story.entry.waits_for = ()
    (attempt,) = story.trace.attempts
    assert (attempt.policy, attempt.forecast) == (PAIR.policy, PAIR.forecast)
    assert attempt.waited_for == ("no_decode_blocks",)


def test_figures_go_to_the_attempt_they_are_of(story: Story) -> None:
    story.place(101.0)
    story.fail(102.0, "pair_down")
    story.place(103.0)
    story.carry(TransferStats(1, 1.0, 0.0), attempt=1)
    assert [attempt.transfer for attempt in story.trace.attempts] == [TransferStats(1, 1.0, 0.0), None]


def test_a_request_that_never_had_a_worker_waited_to_its_end(story: Story) -> None:
    story.entry.error = UnavailableError("no worker")
    story.tell(Event.FAILED, 130.0)
    assert story.spans() == {"queue": Span("queue", 1, "router", 100.0, 130.0)}
    assert (story.trace.outcome, story.trace.detail) == ("unavailable", "no worker")


def test_the_longest_gap_is_kept_with_its_time(story: Story) -> None:
    for at_s, gap_s in ((103.0, 0.5), (106.0, 3.0), (107.0, 1.0)):
        story.now_s = at_s
        story.recorder.on_tokens(story.entry, 1, gap_s)
    assert (story.trace.longest_gap_s, story.trace.longest_gap_at_s) == (3.0, 106.0)


def test_a_request_is_found_by_the_ids_of_the_openai_api(story: Story) -> None:
    request_id = story.entry.request.request_id
    assert story.recorder.find(f"cmpl-{request_id}") is story.recorder.find(f"chatcmpl-{request_id}") is story.trace
    assert story.recorder.find("cmpl-nobody") is None


def test_only_the_last_requests_are_kept() -> None:
    story = Story(capacity=2)
    others = [entry(i) for i in (1, 2)]
    for other in others:
        story.recorder.on_event(other, Event.ARRIVED, 101.0)
    assert story.recorder.find(story.entry.request.request_id) is None
    assert all(story.recorder.find(other.request.request_id) for other in others)
    story.place(102.0)  # of the one that is forgotten: no harm
    assert story.recorder.find(story.entry.request.request_id) is None


def test_an_id_that_is_used_again_counts_as_new() -> None:
    story = Story(capacity=2)
    again = story.entry.request.request_id
    story.recorder.on_event(entry(1), Event.ARRIVED, 101.0)
    story.tell(Event.ARRIVED, 102.0)
    story.recorder.on_event(entry(2), Event.ARRIVED, 103.0)
    found = story.recorder.find(again)
    assert found is not None
    assert found.arrived_s == 102.0


def test_of_very_many_attempts_the_first_and_the_last_are_kept(story: Story) -> None:
    for i in range(MAX_ATTEMPTS + 5):
        story.place(101.0 + i)
        story.entry.refusal = f"no_blocks {i}"
        story.tell(Event.REFUSED, 101.5 + i)
    attempts = story.trace.attempts
    assert len(attempts) == MAX_ATTEMPTS
    assert (attempts[0].attempt, attempts[-1].attempt) == (1, MAX_ATTEMPTS + 5)
    assert story.trace.num_forgotten_attempts == 5
    assert (attempts[-1].outcome, attempts[-1].detail) == ("refused", f"no_blocks {MAX_ATTEMPTS + 4}")

"""What the client sees when workers fail: every token once, none missing."""

from __future__ import annotations

import pytest

from core.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from core.events import LifecycleEvent
from core.request import FinishReason
from penstock.v1 import worker_pb2 as pb
from router.config import DispatchConfig
from tests.router.fake_tokens import continuation, failed, key_of, tokens
from tests.router.fake_worker import FakeWorker
from tests.router.harness import harness, pair_of_workers, read, read_some

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]


async def test_a_decode_worker_killed_midway_leaves_no_gap_and_no_repeat() -> None:
    prefill, first, second = FakeWorker("p", "prefill"), FakeWorker("d1", "decode"), FakeWorker("d2", "decode")
    async with harness(prefill, first, second) as world:
        await world.until_routes(2)
        first.script.steps = second.script.steps = 9
        stream = world.submit(PROMPT, 100)
        streamed = await read_some(stream, 10)
        first.script.steps = second.script.steps = None
        victim = first if first.held else second
        await victim.kill()
        rest, finish = await read(stream)
        assert streamed + rest == continuation(PROMPT, 100)
        assert finish is FinishReason.LENGTH
        assert stream.stats.num_attempts == 2
        await world.idle()


async def test_a_resumed_prompt_ends_with_what_was_streamed() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.script.steps = 4
        stream = world.submit(PROMPT, 20)
        await read_some(stream, 5)
        decode.script.fail["tokens"] = 1
        decode.resume("tokens")
        await read(stream)
        jobs = prefill.commands("prefill")
        assert [job.ticket.attempt for job in jobs] == [1, 2]
        assert jobs[0].ticket.transfer_id == jobs[1].ticket.transfer_id
        assert jobs[1].work.num_prompt_tokens == len(PROMPT)
        assert list(jobs[1].work.token_ids) == PROMPT + continuation(PROMPT, 5)
        assert jobs[1].work.sampling == jobs[0].work.sampling
        await world.idle()


async def test_log_probabilities_of_the_prompt_are_asked_for_until_they_were_told() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.script.steps = 4
        prefill.script.fail["prefill"] = 1
        stream = world.submit(PROMPT, 20, logprobs=0, prompt_logprobs=2)
        await read_some(stream, 5)
        decode.script.fail["tokens"] = 1
        decode.resume("tokens")
        await read(stream)
        asked = [job.work.sampling for job in prefill.commands("prefill")]
        assert [each.HasField("prompt_logprobs") for each in asked] == [True, True, False]
        assert all(each.HasField("logprobs") for each in asked)
        await world.idle()


@pytest.mark.parametrize("stage", ["reserve", "prefill", "accept", "tokens"])
async def test_a_failure_in_any_stage_is_retried_and_frees_the_other_side(stage: str) -> None:
    async with pair_of_workers() as (world, prefill, decode):
        (prefill if stage == "prefill" else decode).script.fail[stage] = 1
        stream = world.submit(PROMPT, 12, request_id="mine")
        assert (await read(stream))[0] == continuation(PROMPT, 12)
        assert stream.stats.num_attempts == 2
        assert "retried" in world.seen.of("mine")
        assert world.dispatcher.counts.failures == {"internal": 1}
        await world.idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stage", ["reserve", "prefill", "accept", "tokens"])
async def test_a_lost_session_in_any_stage_is_survived(stage: str, role: str) -> None:
    async with pair_of_workers() as (world, prefill, decode):
        paused = prefill if stage == "prefill" else decode
        paused.pause(stage)
        stream = world.submit(PROMPT, 12)
        await paused.until_received("accept" if stage == "tokens" else stage)
        (prefill if role == "prefill" else decode).drop_session()
        await world.seen.until(lambda: len(world.connected()) == 1)
        paused.resume(stage)
        assert (await read(stream))[0] == continuation(PROMPT, 12)
        await world.idle()


async def test_decoding_goes_on_when_the_prefill_worker_dies_after_the_handover() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12, request_id="mine")
        await world.seen.until_event("mine", LifecycleEvent.ACCEPTED)
        await prefill.kill()
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 12)
        assert stream.stats.num_attempts == 1
        await world.idle()


async def test_a_local_request_is_resumed_too() -> None:
    one, two = FakeWorker("m1", "mixed"), FakeWorker("m2", "mixed")
    async with harness(one, two) as world:
        one.script.steps = two.script.steps = 9
        stream = world.submit(PROMPT, 100)
        streamed = await read_some(stream, 10)
        one.script.steps = two.script.steps = None
        await (one if one.held else two).kill()
        assert streamed + (await read(stream))[0] == continuation(PROMPT, 100)
        await world.idle()


async def test_a_worker_that_failed_is_avoided_where_another_exists() -> None:
    prefill, bad, good = FakeWorker("p", "prefill"), FakeWorker("d1", "decode"), FakeWorker("d2", "decode")
    async with harness(prefill, bad, good) as world:
        await world.until_routes(2)
        for fake in (bad, good):
            fake.script.fail["reserve"] = 1
        stream = world.submit(PROMPT, 4)
        assert (await read(stream))[0] == continuation(PROMPT, 4)
        assert [len(fake.commands("reserve")) for fake in (bad, good)] in ([2, 1], [1, 2])
        assert world.dispatcher.counts.placements["avoided_failed_worker"] == 1
        await world.idle()


async def test_the_only_worker_is_tried_again_though_it_failed() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.script.fail["reserve"] = 2
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        await world.idle()


async def test_a_deadline_that_a_worker_saw_first_is_the_end_of_the_request() -> None:
    async with pair_of_workers() as (world, prefill, _):
        prefill.pause("prefill")
        stream = world.submit(PROMPT, 4)
        key = key_of((await prefill.until_received("prefill")).ticket)
        prefill.forget(key)
        prefill.say(failed(key, "deadline_exceeded"))
        with pytest.raises(DeadlineExceededError):
            await read(stream)
        await world.idle()


async def test_a_grammar_that_can_not_go_on_is_the_clients_to_mend_and_not_tried_again() -> None:
    async with pair_of_workers() as (world, prefill, _):
        prefill.pause("prefill")
        stream = world.submit(PROMPT, 4, grammar="start: /a/")
        job = await prefill.until_received("prefill")
        key = (job.ticket.transfer_id, job.ticket.attempt)
        prefill.forget(key)
        said = pb.AttemptFailed(transfer_id=key[0], attempt=key[1], reason="grammar", message="too complex")
        prefill.say(pb.Event(failed=said))
        with pytest.raises(InvalidRequestError, match=r"structured output: .* can't be met: too complex"):
            await read(stream)
        assert stream.stats.num_attempts == 1
        await world.idle()


async def test_after_the_last_attempt_the_client_is_told_why() -> None:
    async with pair_of_workers(DispatchConfig(max_attempts=2)) as (world, _, decode):
        decode.script.fail["accept"] = 2
        stream = world.submit(PROMPT, 4, request_id="mine")
        with pytest.raises(
            UnavailableError, match="gave up after 2 attempts, the last on workers prefill-0 and decode-0"
        ):
            await read(stream)
        assert world.seen.of("mine")[-1] == "failed"
        assert stream.stats.num_attempts == 2
        await world.idle()


async def test_tokens_streamed_before_the_last_failure_are_still_delivered() -> None:
    async with pair_of_workers(DispatchConfig(max_attempts=1)) as (world, _, decode):
        decode.script.fail["accept"] = 1
        stream = world.submit(PROMPT, 4)
        assert list((await anext(stream)).token_ids) == continuation(PROMPT, 1)
        with pytest.raises(UnavailableError):
            await anext(stream)
        await world.idle()


@pytest.mark.parametrize("stage", ["reserve", "accept"])
async def test_a_stage_without_an_answer_fails_the_attempt(stage: str) -> None:
    config = DispatchConfig(reserve_timeout_s=0.1, accept_deadline_s=0.1, accept_timeout_s=0.1)
    async with pair_of_workers(config) as (world, _, decode):
        decode.pause(stage)
        stream = world.submit(PROMPT, 4, request_id="mine")
        await world.seen.until_event("mine", LifecycleEvent.RETRIED)
        decode.resume(stage)
        assert (await read(stream))[0] == continuation(PROMPT, 4)
        assert world.dispatcher.counts.failures[f"{stage}_timeout"] >= 1
        await world.idle()


async def test_events_of_an_earlier_attempt_are_dropped_and_counted() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.script.fail["accept"] = 1
        decode.pause("tokens")
        stream = world.submit(PROMPT, 6)
        await decode.until_received("accept", 2)
        transfer_id, _ = key_of(decode.commands("accept")[0].ticket)
        old = (transfer_id, 1)
        decode.say(tokens(old, [1, 2, 3]), failed(old), *answers(old))
        prefill.say(pb.Event(prefilled=pb.Prefilled(transfer_id=transfer_id, attempt=1, first_token_id=9)))
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        dropped = world.dispatcher.counts.dropped
        assert {name: dropped[name] for name in ("SequenceTokens", "AttemptFailed", "Reserved", "Accepted")} == {
            "SequenceTokens": 1,
            "AttemptFailed": 1,
            "Reserved": 1,
            "Accepted": 1,
        }
        await world.idle()


async def test_answers_that_come_twice_are_taken_once() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 6)
        accept = await decode.until_received("accept")
        key = key_of(accept.ticket)
        again = pb.Prefilled(transfer_id=key[0], attempt=1, first_token_id=accept.first_token_id, record=accept.record)
        prefill.say(pb.Event(prefilled=again))
        decode.say(*answers(key), *answers(key))
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        assert len(decode.commands("accept")) == len(prefill.commands("prefill")) == 1
        await world.idle()


async def test_tokens_before_their_time_fail_the_attempt_rather_than_leave_a_gap() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("accept")
        stream = world.submit(PROMPT, 6)
        accept = await decode.until_received("accept")
        decode.say(tokens(key_of(accept.ticket), [1]))
        await decode.until_received("cancel")
        decode.resume("accept")
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        assert world.dispatcher.counts.failures == {"out_of_order": 1}
        await world.idle()


async def test_a_worker_that_lets_go_unasked_has_failed_the_attempt() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 6, request_id="mine")
        await world.seen.until_event("mine", LifecycleEvent.ACCEPTED)
        transfer_id, attempt = key_of(decode.commands("accept")[0].ticket)
        decode.forget((transfer_id, attempt))
        decode.say(pb.Event(released=pb.Released(transfer_id=transfer_id, attempt=attempt)))
        await world.seen.until_event("mine", LifecycleEvent.RETRIED)
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        assert world.dispatcher.counts.failures == {"released": 1}
        await world.idle()


async def test_a_refusal_after_the_handover_is_dropped() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 6, request_id="mine")
        await world.seen.until_event("mine", LifecycleEvent.ACCEPTED)
        transfer_id, attempt = key_of(decode.commands("accept")[0].ticket)
        decode.say(pb.Event(refused=pb.Refused(transfer_id=transfer_id, attempt=attempt, reason="too late")))
        decode.resume("tokens")
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        assert world.dispatcher.counts.dropped == {"Refused": 1}
        await world.idle()


async def test_a_prefill_without_a_record_is_not_handed_over() -> None:
    async with pair_of_workers(DispatchConfig(max_attempts=1)) as (world, prefill, decode):
        prefill.pause("prefill")
        stream = world.submit(PROMPT, 6)
        job = await prefill.until_received("prefill")
        transfer_id, attempt = key_of(job.ticket)
        prefill.say(pb.Event(prefilled=pb.Prefilled(transfer_id=transfer_id, attempt=attempt, first_token_id=1)))
        with pytest.raises(UnavailableError, match="no commit record"):
            await read(stream)
        prefill.resume("prefill")
        assert decode.commands("accept") == []
        await world.idle()


async def test_an_error_of_the_routers_own_costs_a_session_and_not_the_request() -> None:
    async with pair_of_workers() as (world, prefill, _):
        world.seen.raise_at = LifecycleEvent.FIRST_TOKEN
        stream = world.submit(PROMPT, 6)
        assert (await read(stream))[0] == continuation(PROMPT, 6)
        assert prefill.num_sessions == 2
        await world.idle()


async def test_a_worker_that_never_confirms_is_written_off_in_time() -> None:
    async with pair_of_workers(DispatchConfig(release_timeout_s=0.1)) as (world, _, decode):
        decode.script.no_release = True
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12, request_id="mine")
        await world.seen.until_event("mine", LifecycleEvent.ACCEPTED)
        stream.cancel()
        await decode.until_received("cancel")
        assert world.dispatcher.ledger.num_entries == 1
        await world.idle()
        assert world.dispatcher.counts.release_timeouts == 1


def answers(key: tuple[str, int]) -> list[pb.Event]:
    transfer_id, attempt = key
    return [
        pb.Event(reserved=pb.Reserved(transfer_id=transfer_id, attempt=attempt)),
        pb.Event(accepted=pb.Accepted(transfer_id=transfer_id, attempt=attempt)),
    ]

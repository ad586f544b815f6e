"""What holds for every order of calls: nothing leaks, everything ends, and batching never changes a token.

The model is that of paged_tokens.py. Prompts are made of few pieces, so that many begin alike.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.request import Request, RequestState
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.growth import GrowthForecast
from engine.plan import Plan, StepOutput
from engine.prefix_index import PrefixIndex
from engine.scheduler import Scheduler
from engine.speculation.speculator import Speculator
from tests.engine.paged_tokens import STOP, VOCAB_SIZE, Guesser, PagedMemory, compute, next_token, undisturbed_output


class SchedulerMachine(RuleBasedStateMachine):
    """Calls in any order, on pools so small that everything happens."""

    plan: Plan | None = None

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 8),
        max_num_seqs=st.integers(2, 5),
        caching=st.sampled_from([True, True, False]),
        max_drafts=st.sampled_from([0, 1, 3]),
        num_host_blocks=st.sampled_from([0, 2, 5, 20]),
        forecasting=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        caching: bool,
        max_drafts: int,
        num_host_blocks: int,
        forecasting: bool,
        **limits: Any,
    ) -> None:
        self.max_model_len = num_blocks * block_size
        self.pool = BlockPool(num_blocks, block_size, PrefixIndex("m", block_size) if caching else None)
        self.guesser = Guesser()
        speculator = Speculator(self.guesser, max_drafts) if max_drafts else None
        self.scheduler = Scheduler(
            self.pool,
            max_model_len=self.max_model_len,
            speculator=speculator,
            forecast=GrowthForecast(block_size, self.max_model_len) if forecasting else None,
            num_host_blocks=num_host_blocks,
            **limits,
        )
        self.memory = PagedMemory(block_size)
        self.host: dict[int, dict[int, int]] = {}
        self.num_host_blocks = num_host_blocks
        self.parked: dict[str, int] = {}  # computed positions, as the plans tell them
        self.limits = limits
        self.progress: dict[str, int] = {}  # computed positions, as the plans tell them
        self.reserved: set[str] = set()
        self.prefill_only: set[str] = set()
        self.admitted: set[str] = set()  # since they last lost their blocks
        self.told: set[bytes] = set()  # what is cached, as the changes tell it

    def new_request(self, data: st.DataObject) -> Request:
        """Names are used again as soon as they are free. Beyond a few pieces, prompts repeat what was drawn before."""
        name = next(name for name in map(str, count()) if name not in self.scheduler.requests)
        num_prompt = data.draw(st.integers(1, self.max_model_len // 3) | st.integers(1, self.max_model_len - 1))
        prompt = [1 + piece for piece in data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))][:num_prompt]
        while len(prompt) < num_prompt:
            prompt.append(max(1, next_token(prompt)))
        sampling = SamplingParams(max_tokens=data.draw(st.sampled_from([40, 9, 2, 1])), stop_token_ids=(STOP,))
        return Request(name, prompt, sampling)

    def existing(self, data: st.DataObject, names: Any) -> str:
        return str(data.draw(st.sampled_from(sorted(names))))

    @rule(data=st.data(), prefill_only=st.booleans())
    def add(self, data: st.DataObject, prefill_only: bool) -> None:
        request = self.new_request(data)
        self.scheduler.add(request, prefill_only=prefill_only)
        self.progress[request.request_id] = 0
        if prefill_only:
            self.prefill_only.add(request.request_id)

    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        request = self.new_request(data)
        num_free = self.pool.num_free_blocks
        if self.scheduler.reserve(request):
            self.reserved.add(request.request_id)
            self.progress[request.request_id] = len(request.prompt_token_ids)
            self.admitted.add(request.request_id)
            self.check_prefix(request, self.pool.table(request.request_id))
        else:
            assert self.pool.num_free_blocks == num_free
            assert request.state is RequestState.WAITING

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        self.arrive(self.existing(data, self.reserved))

    def arrive(self, name: str) -> None:
        request = self.scheduler.requests[name]
        self.reserved.remove(name)
        num_there = request.num_cached_tokens or 0
        self.memory.write(self.pool.table(name), num_there, request.prompt_token_ids[num_there:])
        self.check(self.scheduler.join(name, next_token(request.prompt_token_ids)))

    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """One that decodes is handed over, by somebody who may not know its last tokens."""
        decoding = [r for r in self.scheduler.requests.values() if r.output_token_ids and r.num_missing_tokens == 1]
        if not decoding:
            return
        before = data.draw(st.sampled_from(sorted(decoding, key=lambda request: request.request_id)))
        num_known = data.draw(st.integers(len(before.prompt_token_ids), before.num_tokens))
        name = next(name for name in map(str, count()) if name not in self.scheduler.requests)
        after = Request(name, before.token_ids(0, num_known), before.sampling)
        if self.scheduler.succeed(before.request_id, after):
            self.forget(before.request_id)
            self.progress[name] = num_known - 1
            self.admitted.add(name)
            self.prefill_only.add(name)
            assert self.memory.read(self.pool.table(name), num_known - 1) == after.token_ids(0, num_known - 1)

    @precondition(lambda self: len(self.scheduler.requests) > 2)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = self.existing(data, self.scheduler.requests)
        assert self.scheduler.release(name)
        assert not self.scheduler.release(name)
        self.forget(name)

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.limits["max_num_batched_tokens"]
        swapped_out = [swap.request_id for swap in plan.swaps_out]
        assert not self.prefill_only.intersection([*plan.preempted, *swapped_out])
        self.parked |= {name: self.progress[name] for name in swapped_out}
        self.progress |= dict.fromkeys([*plan.preempted, *swapped_out], 0)
        self.admitted.difference_update(plan.preempted, swapped_out)
        self.check_swaps(plan)
        for entry in plan.entries:
            request = self.scheduler.requests[entry.request_id]
            if entry.request_id not in self.admitted:
                self.admitted.add(entry.request_id)
                num_parked = self.parked.pop(entry.request_id, 0)
                assert request.num_computed_tokens >= num_parked
                if request.num_computed_tokens > num_parked:
                    self.check_prefix(request, entry.block_ids)
                self.progress[entry.request_id] = request.num_computed_tokens
            assert entry.start == self.progress[entry.request_id]
            end = entry.end - entry.num_drafts
            assert list(entry.token_ids[: end - entry.start]) == request.token_ids(entry.start, end) != []
            assert (entry.sampling is not None) == (end == request.num_tokens)
            assert entry.end < self.max_model_len or not entry.num_drafts
            assert entry.end <= len(entry.block_ids) * self.pool.block_size
        self.in_step = {entry.request_id: self.scheduler.requests[entry.request_id] for entry in plan.entries}
        self.plan = plan if plan else None

    def check_swaps(self, plan: Plan) -> None:
        """Who is parked keeps all it has computed, and who comes back gets the end of that."""
        for swap in plan.swaps_out:
            num_blocks = self.pool.num_blocks_for(self.parked[swap.request_id])
            assert len(swap.block_ids) == len(swap.host_block_ids) == num_blocks
        for swap in plan.swaps_in:
            end = self.pool.num_blocks_for(self.parked[swap.request_id])
            assert swap.block_ids == self.pool.table(swap.request_id)[end - len(swap.block_ids) : end] != ()
            assert not {block for block, count in self.holders().items() if count > 1} & set(swap.block_ids)
        assert {swap.request_id for swap in plan.swaps_in} <= {entry.request_id for entry in plan.entries}

    def holders(self) -> Counter[int]:
        return Counter(block for name in self.scheduler.requests for block in self.pool.table(name))

    def check_prefix(self, request: Request, table: tuple[int, ...]) -> None:
        """What a request finds is what it would have computed, and never all of it."""
        num_found = request.num_computed_tokens
        assert num_found % self.pool.block_size == 0
        assert num_found < request.num_tokens
        assert self.memory.read(table, num_found) == request.token_ids(0, num_found)
        assert num_found == 0 or self.pool.index is not None

    @precondition(lambda self: self.plan is not None)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def finish_step(self, fails: bool) -> None:
        """The memory is written at the very end of the step: after all that was released and joined meanwhile."""
        assert self.plan is not None
        plan, self.plan = self.plan, None
        if fails:  # before anything was copied
            for request in self.scheduler.abandon(plan):
                self.forget(request.request_id)
            for swap in plan.swaps_out:
                self.parked.pop(swap.request_id, None)
            return
        result = compute(plan, self.memory, self.host)
        for entry in plan.entries:
            if self.scheduler.requests.get(entry.request_id) is self.in_step[entry.request_id]:
                self.progress[entry.request_id] = entry.end - entry.num_drafts
                if drawn := result.drawn.get(entry.request_id):
                    self.progress[entry.request_id] += len(drawn.token_ids) - 1
        for output in self.scheduler.update(plan, result):
            self.check(output)

    @precondition(lambda self: self.plan is None)
    @rule(num_steps=st.integers(2, 12))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.schedule()
            if self.plan is not None:
                self.is_sound()
                self.finish_step(fails=False)
                self.is_sound()

    def check(self, output: StepOutput) -> None:
        request = output.request
        expected = undisturbed_output(request, self.max_model_len)
        assert request.output_token_ids == expected[: len(request.output_token_ids)]
        if output.finish_reason is not None:
            assert request.output_token_ids == expected
            assert request.request_id not in self.scheduler.requests
            self.forget(request.request_id)

    def forget(self, name: str) -> None:
        del self.progress[name]
        self.parked.pop(name, None)
        self.admitted.discard(name)
        self.reserved.discard(name)
        self.prefill_only.discard(name)

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.requests.keys() == self.progress.keys()
        requests = self.scheduler.requests.values()
        assert self.guesser.known <= set(requests)
        held = self.holders()
        assert self.parked.keys() == {r.request_id for r in requests if r.state is RequestState.PARKED}
        assert self.scheduler.parking_counts.num_held_blocks == sum(map(self.pool.num_blocks_for, self.parked.values()))
        assert self.scheduler.parking_counts.num_held_blocks <= self.num_host_blocks
        assert self.pool.num_free_blocks + self.pool.num_retired_blocks + len(held) == self.pool.num_blocks

    @invariant()
    def changes_tell_what_is_cached(self) -> None:
        if self.pool.index is not None:
            if changes := self.pool.index.take_changes():
                assert not self.told & set(changes.stored)
                assert self.told >= set(changes.removed)
                self.told = self.told.union(changes.stored).difference(changes.removed)
            assert self.told == set(self.pool.index.snapshot().stored)

    @invariant()
    def a_step_alone_writes_into_its_blocks(self) -> None:
        for entry in self.plan.entries if self.plan is not None else ():
            for name, request in self.scheduler.requests.items():
                if request is not self.in_step[entry.request_id]:
                    written = entry.block_ids[entry.start // self.pool.block_size :]
                    assert not set(self.pool.table(name)) & set(written)

    def teardown(self) -> None:
        """Everything ends once the held ones are joined or released, and then nothing is held."""
        for _ in range(20_000):
            if self.plan is not None:
                self.finish_step(fails=False)
            elif self.num_settled() == 0:
                self.schedule()
                if self.plan is None:
                    break
            self.is_sound()
        assert not self.scheduler.requests
        assert self.pool.num_free_blocks == self.pool.num_blocks
        assert self.scheduler.parking_counts.num_held_blocks == 0

    def num_settled(self) -> int:
        """Join what is reserved, release what is prefilled; returns how many."""
        held = [name for name, r in self.scheduler.requests.items() if r.state is RequestState.HELD]
        for name in held:
            if name in self.reserved:
                self.arrive(name)
            else:
                self.scheduler.release(name)
                self.forget(name)
        return len(held)


def test_no_order_of_calls_breaks_the_scheduler() -> None:
    steps = settings(max_examples=120, stateful_step_count=60, deadline=None)
    run_state_machine_as_test(SchedulerMachine, settings=steps)


class CrowdedMachine(SchedulerMachine):
    """All want more than there is: many are parked."""

    @initialize(
        num_blocks=st.integers(4, 8),
        block_size=st.integers(1, 3),
        max_num_batched_tokens=st.just(8),
        max_num_seqs=st.just(5),
        caching=st.booleans(),
        max_drafts=st.sampled_from([0, 2]),
        num_host_blocks=st.sampled_from([2, 5, 20]),
        forecasting=st.just(False),
    )
    def start(self, **options: Any) -> None:
        super().start(**options)

    def new_request(self, data: st.DataObject) -> Request:
        request = super().new_request(data)
        return Request(request.request_id, request.prompt_token_ids[:3], SamplingParams(max_tokens=40))

    @rule(data=st.data())
    def crowd(self, data: st.DataObject) -> None:
        for _ in range(3):
            self.reserve(data)
        for name in sorted(self.reserved):
            self.arrive(name)


def test_no_order_of_calls_breaks_a_crowded_scheduler() -> None:
    steps = settings(max_examples=60, stateful_step_count=60, deadline=None)
    run_state_machine_as_test(CrowdedMachine, settings=steps)


prompts = st.lists(st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=12), min_size=1, max_size=8)


@given(prompts=prompts, num_blocks=st.integers(4, 8), max_num_batched_tokens=st.integers(1, 16))
@settings(deadline=None)
def test_equal_calls_give_equal_plans(prompts: list[list[int]], num_blocks: int, max_num_batched_tokens: int) -> None:
    def plans() -> list[Plan]:
        pool, memory = BlockPool(num_blocks, 4, PrefixIndex("m", 4)), PagedMemory(block_size=4)
        host: dict[int, dict[int, int]] = {}
        scheduler = Scheduler(
            pool,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=4,
            max_model_len=num_blocks * 4,
            forecast=GrowthForecast(4, num_blocks * 4),
            num_host_blocks=num_blocks,
        )
        for number, prompt in enumerate(prompts):
            scheduler.add(Request(str(number), prompt, SamplingParams(max_tokens=8)))
        made = []
        while plan := scheduler.schedule():
            made.append(plan)
            scheduler.update(plan, compute(plan, memory, host))
        assert not scheduler.requests
        return made

    assert plans() == plans()

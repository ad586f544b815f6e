"""What the next step computes: continuous batching under a token budget, long prompts in chunks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from core.errors import ConfigError, IntegrityError, InvalidRequestError
from core.request import Request, RequestState
from engine.block_pool import BlockPool
from engine.entries import decode_entry, guess, prefill_entry
from engine.growth import GrowthForecast, num_allowed
from engine.parking import Parking, ParkingCounts
from engine.plan import Drawn, Plan, PlanEntry, StepOutput, StepResult
from engine.soundness import check_blocks, goes_on_with
from engine.speculation.speculator import DraftCounts, Speculator

_NOTHING = Plan(entries=())
_QUEUED = RequestState.WAITING, RequestState.PARKED


class Scheduler:
    """Turns requests into plans, one step after the other. Deterministic: equal calls give equal plans.

    A step is `schedule()`, then the computation, then `update()` (or `abandon()`, where the computation failed). In
    between, every other method may be called.

    **Order.** Running requests that miss one token come first, then prefills, oldest first; then the waiting are
    admitted, first come, first served. A request is admitted only when blocks for all its known tokens and one more
    are free, and those besides by which all are expected to grow. It takes them at once: a prefill never runs out
    midway, only decoding grows. Where it can't, the youngest running request is preempted: it loses its blocks and
    waits in the queue, where who came first stands first. One added as `prefill_only` never is: its K and V may be on
    their way.

    **Parking.** What a preempted request has computed is kept in host memory and copied back when it is admitted, where
    there is room; else it is computed anew, as far as others have taken its blocks.

    **Prefixes.** Blocks that are full and computed, of prompt or output, can be found by later requests, also when no
    request holds them, until they are handed out anew. Who is admitted or reserved starts behind what it finds.

    **Drafts.** Budget that nobody else needs goes to guesses of what decoding requests draw next, if there is a
    `speculator`; blocks too, but nobody is preempted for them. Positions of wrong guesses count as not computed.

    **Ownership.** The scheduler alone allocates and frees blocks of the pool:

    | state    | holds                                  | until                                           |
    |----------|----------------------------------------|-------------------------------------------------|
    | WAITING  | nothing                                | `schedule` admits it                            |
    | PARKED   | blocks of host memory                  | `schedule` admits it                            |
    | RUNNING  | blocks of its known tokens             | `update` ends it, or `schedule` preempts it     |
    | HELD     | blocks of its prompt and one token     | `join` (if reserved), `release` (if prefilled)  |
    | FINISHED | nothing; it is not in `requests` then  |                                                 |

    `release` is legal in every state and frees at once, unless the step in progress may still write into the blocks:
    then they are free when the step ends. A HELD request stays until its owner acts: no time limit is kept here.

    **Progress.** The oldest running request is preempted only where held and prefill_only ones leave it no room, and
    every request fits into an empty pool. So all requests end, given that the held ones are joined or released.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        speculator: Speculator | None = None,
        forecast: GrowthForecast | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        """Without a `forecast` nobody is expected to grow; without `num_host_blocks` nobody is parked."""
        if max_model_len > pool.num_blocks * pool.block_size:
            raise ConfigError("engine.max_model_len", max_model_len, f"must fit into {pool.num_blocks} KV blocks")
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._speculator = speculator
        self._parking = Parking(num_host_blocks, pool.block_size)
        self._forecast = forecast
        self._requests: dict[str, Request] = {}  # in the order of their arrival
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []  # those of the last step that had more than one token to compute
        self._num_in_state: Counter[RequestState] = Counter()
        self._prefill_only: set[str] = set()
        self._plan = _NOTHING  # of the step in progress
        self._in_step: dict[str, Request] = {}  # its requests, without those released meanwhile
        self._num_preemptions = 0

    @property
    def requests(self) -> Mapping[str, Request]:
        """All that are not finished, oldest first."""
        return MappingProxyType(self._requests)

    @property
    def num_running(self) -> int:
        return self._num_in_state[RequestState.RUNNING]

    @property
    def num_waiting(self) -> int:
        return self._num_in_state[RequestState.WAITING]

    @property
    def num_parked(self) -> int:
        return self._num_in_state[RequestState.PARKED]

    @property
    def num_held(self) -> int:
        return self._num_in_state[RequestState.HELD]

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that wait to be prefilled, after a preemption too."""
        prefilling = (r for r in self._prefilling if r.state is RequestState.RUNNING and r.num_missing_tokens > 1)
        return sum(request.num_missing_tokens for request in chain(self._waiting, prefilling))

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def parking_counts(self) -> ParkingCounts:
        return self._parking.counts

    @property
    def draft_counts(self) -> DraftCounts:
        return self._speculator.counts if self._speculator is not None else DraftCounts()

    def add(self, request: Request, *, prefill_only: bool = False) -> None:
        """Queue a new request. With `prefill_only` it stops after its first token and is HELD until it is released."""
        self._check_new(request)
        self._enter(request)
        self._waiting.append(request)
        if prefill_only:
            self._prefill_only.add(request.request_id)

    def num_found(self, request: Request) -> int:
        """Tokens of a new request that are in the cache now."""
        return len(self._pool.find(request)) * self._pool.block_size

    def succeed(self, request_id: str, request: Request) -> bool:
        """`request`, prefill_only, takes the place and blocks of one that decodes its tokens. False where it can't."""
        before = self._requests.get(request_id)
        if before is None or request_id in self._in_step or not goes_on_with(before, request):
            return False
        if not self._pool.hand_on(request_id, request.request_id, request.num_tokens + 1):
            return False
        request.num_computed_tokens = request.num_cached_tokens = request.num_tokens - 1
        request.cache_salt = before.cache_salt
        self._enter(request)
        self._prefill_only.add(request.request_id)
        self._move(request, RequestState.RUNNING)
        return self.release(request_id)

    def reserve(self, request: Request) -> bool:
        """Hold room for a request whose prompt is prefilled elsewhere. False where there is none: nothing is held then.

        `request.num_cached_tokens` are there already: they need not be sent, and stay until the request ends. Those
        that wait come first: room is what would be left if all of them had been admitted. There is none while a step
        is to empty blocks that were given up.
        """
        self._check_new(request)
        if len(self._requests) >= self._max_num_seqs or self._plan.swaps_out:
            return False
        num_blocks = sum(self._pool.num_blocks_for(r.num_tokens + 1) for r in self._waiting)
        if not self._pool.admit(request, num_spared=num_blocks + self._growth([*self._waiting, request])):
            return False
        self._enter(request)
        self._move(request, RequestState.HELD)
        return True

    def join(self, request_id: str, first_token_id: int) -> StepOutput:
        """K and V of a reserved request's prompt stand in its blocks: from the next step on it decodes.

        Raises `IntegrityError` where the request is not reserved.
        """
        request = self._requests.get(request_id)
        if request is None or request.state is not RequestState.HELD or request_id in self._prefill_only:
            raise IntegrityError(f"request {request_id} can't join: it is not reserved")
        self._move(request, RequestState.RUNNING)
        return self._take(request, Drawn((first_token_id,)), len(request.prompt_token_ids))

    def schedule(self) -> Plan:
        """Begin a step. Falsy where there is nothing to compute: then there is nothing to update either."""
        if self._plan:
            raise IntegrityError("the step in progress was neither updated nor abandoned")
        decoding: list[Request] = []
        preempted: list[str] = []
        budget = self._max_num_batched_tokens
        self._prefilling = []
        for request in self._requests.values():
            if request.state is not RequestState.RUNNING:
                continue  # so is who has just given way: it is younger than who needed room
            if request.num_missing_tokens > 1:
                self._prefilling.append(request)
            elif len(decoding) < budget and self._grow(request, preempted):
                decoding.append(request)
        budget -= len(decoding)
        entries: list[PlanEntry] = []
        prefills = chain(tuple(self._prefilling), self._admit())
        while budget and (prefill := next(prefills, None)) is not None:
            num_tokens = min(budget, prefill.num_missing_tokens)
            entries.append(prefill_entry(prefill, num_tokens, self._pool.table(prefill.request_id)))
            budget -= entries[-1].num_tokens
        limits = map(self._max_drafts, decoding)
        drafts = guess(self._speculator, self._pool, [*zip(decoding, limits, strict=True)], budget)
        tables = [self._pool.table(request.request_id) for request in decoding]
        entries[:0] = map(decode_entry, decoding, drafts, tables)
        self._plan = Plan(tuple(entries), tuple(preempted), *self._parking.take_swaps())
        self._in_step = {entry.request_id: self._requests[entry.request_id] for entry in entries}
        return self._plan

    def update(self, plan: Plan, result: StepResult) -> list[StepOutput]:
        """End the step: `plan` was computed and drew `result`. Requests released meanwhile are passed over.

        Those whose draw failed are released, and have no output.
        """
        outputs: list[StepOutput] = []
        for swap in plan.swaps_in:
            if request := self._in_step.get(swap.request_id):
                self._pool.refilled(request)
        computed = self._end_step(plan)
        if self._speculator is not None:
            self._speculator.observe(computed, result)
        for entry, request in computed:
            if entry.prompt_targets:
                request.prompt_logprobs[entry.start :] = result.prompt_logprobs[entry.request_id]
            if entry.sampling is None:
                self._pool.computed(request, entry.end)
            elif (drawn := result.drawn[entry.request_id]).failure:
                self._finish(request)
            else:
                outputs.append(self._take(request, drawn, entry.end - entry.num_drafts))
        return outputs

    def abandon(self, plan: Plan) -> list[Request]:
        """End the step: its computation failed. Releases its requests and returns them."""
        requests = [request for _, request in self._end_step(plan)]
        for request in requests:
            self.release(request.request_id)
        for swap in plan.swaps_out:  # nobody knows what stands in host memory
            victim = self._requests.get(swap.request_id)
            if victim is not None and victim.state is RequestState.PARKED:
                self._lose(victim)
        return requests

    def release(self, request_id: str) -> bool:
        """Drop a request, whatever its state. False where it is unknown, finished, or released before."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request.state in _QUEUED:
            self._waiting.remove(request)
        self._finish(request)
        return True

    def check_integrity(self) -> None:
        """`IntegrityError` where requests, queue, and blocks don't agree."""
        max_drafts = self._speculator.max_tokens if self._speculator is not None else 0
        for request_id, request in self._requests.items():
            check_blocks(
                request, self._pool.table(request_id), self._pool, request_id in self._prefill_only, max_drafts
            )
        if list(map(id, self._waiting)) != list(map(id, self._in_state(*_QUEUED))):
            raise IntegrityError("the queue does not hold each waiting request once, in the order of arrival")
        for state in (RequestState.WAITING, RequestState.RUNNING, RequestState.HELD, RequestState.PARKED):
            if self._num_in_state[state] != len(self._in_state(state)):
                raise IntegrityError(f"{self._num_in_state[state]} requests are counted as {state.value}")
        if self.num_running + self.num_held > self._max_num_seqs:
            raise IntegrityError(f"{self.num_running} running + {self.num_held} held of {self._max_num_seqs}")
        if not self._prefill_only <= self._requests.keys():
            raise IntegrityError("a request that is gone is marked as prefill_only")
        if any(self._requests.get(request_id) is not request for request_id, request in self._in_step.items()):
            raise IntegrityError("a request that is gone takes part in a step")
        if self._pool.num_retired_blocks and not self._plan:
            raise IntegrityError("blocks are retired between two steps")
        self._pool.check_integrity(self._requests.keys())
        self._parking.check_integrity(self._in_state(RequestState.PARKED))

    def _enter(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._num_in_state[request.state] += 1

    def _move(self, request: Request, state: RequestState) -> None:
        before = request.state
        request.advance(state)
        self._num_in_state[before] -= 1
        self._num_in_state[state] += 1

    def _in_state(self, *states: RequestState) -> list[Request]:
        return [request for request in self._requests.values() if request.state in states]

    def _check_new(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise IntegrityError(f"request {request.request_id} is there already")
        num_tokens = request.num_tokens
        if not 0 < num_tokens < self._max_model_len:
            fix = f"must be 1 to {self._max_model_len - 1} tokens, so that the model can add at least one"
            raise InvalidRequestError("prompt", f"{num_tokens} tokens", fix)

    def _admit(self) -> Iterator[Request]:
        """Waiting requests as they start to run, until blocks or sequences run out. Lazy: who isn't taken, waits on."""
        num_seqs = len(self._requests) - len(self._waiting)
        while self._waiting and num_seqs < self._max_num_seqs:
            request, num_parked = self._waiting[0], self._waiting[0].num_computed_tokens
            if not self._pool.admit(request, num_spared=self._growth([request])):
                return
            self._waiting.popleft()
            if request.state is RequestState.PARKED:
                self._parking.bring_back(request, self._pool.table(request.request_id), num_parked)
            self._move(request, RequestState.RUNNING)
            self._prefilling.append(request)
            num_seqs += 1
            yield request

    def _grow(self, request: Request, preempted: list[str]) -> bool:
        """Make room for the request's last token, at the cost of the youngest. False where it is preempted itself."""
        while not self._pool.allocate(request.request_id, request.num_tokens):
            victim = self._preempt_youngest()
            if victim.state is RequestState.WAITING:
                preempted.append(victim.request_id)
            if victim is request:
                return False
        return True

    def _preempt_youngest(self) -> Request:
        victim = next(
            request
            for request in reversed(self._requests.values())
            if request.state is RequestState.RUNNING and request.request_id not in self._prefill_only
        )
        self._num_preemptions += 1
        if self._parking.park(victim, self._pool.table(victim.request_id)):
            self._move(victim, RequestState.PARKED)
        else:
            self._lose(victim)
        self._pool.free(victim.request_id)
        if self._speculator is not None:
            self._speculator.forget(victim)
        self._waiting = deque(self._in_state(*_QUEUED))
        return victim

    def _lose(self, request: Request) -> None:
        self._move(request, RequestState.WAITING)
        self._parking.lose(request)

    def _growth(self, coming: Sequence[Request]) -> int:
        """Blocks by which all that run or will are expected to grow once these are in."""
        there = chain(self._in_state(RequestState.RUNNING, RequestState.HELD), coming)
        decoded = (r for r in there if r.request_id not in self._prefill_only)
        held = ((request, len(self._pool.table(request.request_id))) for request in decoded)
        return self._forecast.num_blocks(held) if self._forecast is not None else 0

    def _max_drafts(self, request: Request) -> int:
        """All of these can be right, and the token after them is still one that the request may draw."""
        if request.request_id in self._prefill_only:
            return 0
        return num_allowed(request, self._max_model_len) - request.num_output_tokens - 1

    def _end_step(self, plan: Plan) -> list[tuple[PlanEntry, Request]]:
        """Nothing writes into blocks any more. Returns what was computed for requests that are still there."""
        if plan is not self._plan:
            raise IntegrityError("a plan was handed back that is not that of the step in progress")
        computed = [(e, self._in_step[e.request_id]) for e in plan.entries if e.request_id in self._in_step]
        self._plan, self._in_step = _NOTHING, {}
        self._pool.reclaim()
        return computed

    def _take(self, request: Request, drawn: Drawn, end: int) -> StepOutput:
        """Append drawn tokens up to the one that ends the request, and move it to where that brings it.

        Positions before `end` are computed, and so are those of the tokens that are taken, but for the last of them.
        """
        num_taken, finish_reason = 0, None
        while finish_reason is None and num_taken < len(drawn.token_ids):
            finish_reason = request.append(drawn.token_ids[num_taken], self._max_model_len)
            num_taken += 1
        self._pool.computed(request, end + num_taken - 1)
        if finish_reason is not None:
            if self._forecast is not None and request.request_id not in self._prefill_only:
                self._forecast.observe(request)
            self._finish(request)
        elif request.request_id in self._prefill_only:
            self._move(request, RequestState.HELD)
        return StepOutput(request, drawn.token_ids[:num_taken], finish_reason, drawn.logprobs[:num_taken])

    def _finish(self, request: Request) -> None:
        self._move(request, RequestState.FINISHED)
        self._parking.drop(request.request_id)
        if self._speculator is not None:
            self._speculator.forget(request)
        del self._requests[request.request_id]
        self._prefill_only.discard(request.request_id)
        if self._in_step.pop(request.request_id, None) is not None:
            self._pool.retire(request.request_id)
        else:
            self._pool.free(request.request_id)

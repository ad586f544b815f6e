"""A worker in memory behind a real gRPC server: speaks worker.proto, computes nothing, and does as it is told.

Its next token is a hash of all tokens before, so a continuation is right or provably wrong. It never sleeps: it answers
commands, and its load follows each of the router's heartbeats. Where `pause`d, it takes commands of that kind, holds
what they ask for, and answers once resumed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from penstock.v1 import inference_pb2, worker_pb2_grpc
from penstock.v1 import worker_pb2 as pb
from tests.router.fake_tokens import Key, failed, key_of, next_token, tokens

WAIT_S = 10.0
ROLES = {
    "prefill": inference_pb2.WORKER_ROLE_PREFILL,
    "decode": inference_pb2.WORKER_ROLE_DECODE,
    "mixed": inference_pb2.WORKER_ROLE_MIXED,
}


@dataclass(eq=False)
class Held:
    """What the worker holds of one attempt."""

    key: Key
    token_ids: list[int]
    work: pb.Work
    local: bool
    num_blocks: int
    running: asyncio.Task[None] | None = None


@dataclass
class Script:
    """How the worker departs from the ordinary. `pause` and `fail` go by kind of command; decoding is `tokens`.

    Each attempt's decoding pauses after `steps` tokens, where given.
    """

    refuse: int = 0
    fail: dict[str, int] = field(default_factory=dict)
    fail_reason: str = "internal"
    pause: set[str] = field(default_factory=set)
    steps: int | None = None
    finish_after_first: bool = False
    silent: bool = False
    no_release: bool = False
    pairs_fail: int = 0
    pairs_permanent: bool = False
    num_cached_tokens: int = 0
    num_cached_blocks: int = 0
    hello_incarnation: str | None = None
    wire_version: int = 1
    runs_alone: bool = False


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self,
        worker_id: str,
        role: str,
        *,
        num_credits: int = 64,
        num_blocks: int = 4096,
        block_size: int = 16,
        max_model_len: int = 32_768,
        fingerprint: str = "f00d",
        max_pairs: int = 16,
    ) -> None:
        self.worker_id, self.role, self.credits, self.max_pairs = worker_id, role, num_credits, max_pairs
        self.num_blocks, self.block_size, self.max_model_len = num_blocks, block_size, max_model_len
        self.fingerprint = fingerprint
        self.incarnation = f"{worker_id}-{uuid.uuid4().hex[:8]}"
        self.script = Script()
        self.address = ""
        self.held: dict[Key, Held] = {}
        self.parts: dict[Key, list[int]] = {}
        self.received: list[tuple[str, Any]] = []  # (kind, command)
        self.heartbeats: list[tuple[str, ...]] = []
        self.num_sessions = 0
        self.num_steps: Counter[Key] = Counter()
        self.max_held = 0
        self.problems: list[str] = []
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._changed = asyncio.Condition()
        self._outbox: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life

    async def start(self, port: int = 0) -> FakeWorker:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()
        return self

    async def kill(self) -> None:
        """As kill -9: every connection breaks at once."""
        if self._server:
            await self._server.stop(None)
        for task in self._tasks:
            task.cancel()

    def drop_session(self) -> None:
        self._outbox.put_nowait(None)

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - sum(held.num_blocks for held in self.held.values())

    def load(self, *, draining: bool = False) -> pb.Load:
        running = sum(held.running is not None for held in self.held.values())
        return pb.Load(
            num_running=running,
            num_held=len(self.held) - running,
            num_free_blocks=self.num_free_blocks,
            draining=draining,
        )

    # ---- what tests wait for and do

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that commands, or sessions, bring about."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    async def until_received(self, kind: str, count: int = 1) -> Any:
        await self.until(lambda: len(self.commands(kind)) >= count)
        return self.commands(kind)[count - 1]

    def commands(self, kind: str) -> list[Any]:
        return [command for name, command in self.received if name == kind]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.received]

    def pause(self, kind: str) -> None:
        self.script.pause.add(kind)
        self._gates[kind].clear()

    def resume(self, kind: str) -> None:
        self.script.pause.discard(kind)
        self._gates[kind].set()

    def decode_to(self, num_steps: int) -> None:
        """Those that wait decode on, up to so many steps."""
        self.script.steps = num_steps
        self._gates["tokens"].set()
        self._gates["tokens"].clear()

    def say(self, *events: pb.Event, load: pb.Load | None = None) -> None:
        if not self.script.silent:
            self._outbox.put_nowait(pb.WorkerMessage(events=events, load=load or self.load()))

    # ---- the session

    async def Session(  # noqa: N802
        self, requests: AsyncIterator[pb.RouterMessage], context: Any
    ) -> AsyncIterator[pb.WorkerMessage]:
        first = await anext(requests)
        assert first.HasField("hello")
        self._outbox = asyncio.Queue()
        self.num_sessions += 1
        reader = self._spawn(self._read(requests))
        try:
            yield pb.WorkerMessage(hello=self._hello())
            await self._notify()
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            for key in [*self.held]:
                self.forget(key)
            self.parts.clear()

    def _hello(self) -> pb.WorkerHello:
        layout = pb.KVLayout(
            model="tiny",
            fingerprint=self.fingerprint,
            num_layers=2,
            num_kv_heads=2,
            head_size=8,
            block_size=self.block_size,
            dtype="float32",
            kind="heads",
        )
        return pb.WorkerHello(
            wire_version=self.script.wire_version,
            worker_id=self.worker_id,
            incarnation=self.script.hello_incarnation or self.incarnation,
            role=ROLES[self.role],
            layout=layout,
            credits=self.credits,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            kv_address=f"kv-of-{self.worker_id}:1",
            device="memory",
            runs_alone=self.script.runs_alone,
            max_pairs=self.max_pairs,
        )

    async def _read(self, requests: AsyncIterator[pb.RouterMessage]) -> None:
        async for message in requests:
            for command in message.commands:
                kind = str(command.WhichOneof("command"))
                body = getattr(command, kind)
                if kind == "heartbeat":
                    self.heartbeats.append(tuple(body.live_transfer_ids))
                    self.say()
                else:
                    self.received.append((kind, body))
                    getattr(self, f"_on_{kind}")(body)
                self.max_held = max(self.max_held, len(self.held))
            await self._notify()

    # ---- commands

    def _on_connect(self, connect: pb.Connect) -> None:
        names: dict[str, Any] = {
            "prefill_incarnation": connect.prefill_incarnation,
            "decode_incarnation": connect.decode_incarnation,
            "epoch": connect.epoch,
        }
        if self.script.pairs_fail or self.script.pairs_permanent:
            self.script.pairs_fail -= 1
            permanent = self.script.pairs_permanent
            self.say(pb.Event(pair_down=pb.PairDown(**names, reason="the peer is away", permanent=permanent)))
        else:
            self._answer("connect", None, pb.Event(pair_up=pb.PairUp(**names)))

    def _on_disconnect(self, disconnect: pb.Disconnect) -> None:
        names: dict[str, Any] = {
            "prefill_incarnation": disconnect.prefill_incarnation,
            "decode_incarnation": disconnect.decode_incarnation,
            "epoch": disconnect.epoch,
        }
        self.say(pb.Event(pair_down=pb.PairDown(**names, reason="the router has closed it")))

    def _on_prompt_part(self, part: pb.PromptPart) -> None:
        tokens = self.parts.setdefault(key_of(part.ticket), [])
        self._expect(len(tokens) == part.offset, f"part at {part.offset}, {len(tokens)} tokens are here")
        tokens.extend(part.token_ids)

    def _on_reserve(self, reserve: pb.Reserve) -> None:
        self._expect(reserve.ticket.decode_incarnation == self.incarnation, "a reservation for somebody else")
        key = key_of(reserve.ticket)
        if not self._admit("reserve", reserve.ticket, reserve.work, local=False):
            return
        self._answer("reserve", key, pb.Event(reserved=pb.Reserved(transfer_id=key[0], attempt=key[1])))

    def _on_prefill(self, prefill: pb.Prefill) -> None:
        ticket, key = prefill.ticket, key_of(prefill.ticket)
        self._expect(ticket.prefill_incarnation == self.incarnation, "a prefill for somebody else")
        local = ticket.prefill_incarnation == ticket.decode_incarnation
        if prefill.handover:
            before = [other for other in self.held if other[0] == key[0] and other[1] < key[1]]
            for other in before:
                self.forget(other)
        if not self._admit("prefill", ticket, prefill.work, local=local):
            return
        held = self.held[key]
        first = next_token(held.token_ids)
        sampling = held.work.sampling
        num_output = len(held.token_ids) + 1 - held.work.num_prompt_tokens
        finish = pb.ENGINE_FINISH_UNSPECIFIED
        if self.script.finish_after_first or first in sampling.stop_token_ids:
            finish = pb.ENGINE_FINISH_STOP
        elif num_output >= sampling.max_tokens:
            finish = pb.ENGINE_FINISH_LENGTH
        segment = pb.SegmentRecord(
            layer=0, kv_head_end=2, token_end=len(held.token_ids), num_bytes=100, checksum=first, receiver_rank=1
        )
        record = pb.CommitRecord(segments=[segment], num_tokens=len(held.token_ids))
        event = pb.Prefilled(
            transfer_id=key[0],
            attempt=key[1],
            first_token_id=first,
            finish=finish,
            record=None if finish or local else record,
            num_cached_tokens=self.script.num_cached_tokens,
        )
        self._answer("prefill", key, pb.Event(prefilled=event), after=lambda: self._after_prefill(held, first, finish))

    def _after_prefill(self, held: Held, first: int, finish: int) -> None:
        if finish:
            self.forget(held.key)
        elif held.local:
            held.token_ids.append(first)
            held.running = self._spawn(self._decode(held))

    def _on_accept(self, accept: pb.Accept) -> None:
        key = key_of(accept.ticket)
        held = self.held.get(key)
        if held is None:
            self._expect(False, "accept without a reservation")
            return
        self._expect(accept.first_token_id == next_token(held.token_ids), "the first token is not that of the prompt")
        (segment,) = accept.record.segments
        self._expect(segment.checksum == accept.first_token_id, "the record is not the one that was sent")
        held.token_ids.append(accept.first_token_id)
        if self._fails("accept", key):
            return
        event = pb.Accepted(transfer_id=key[0], attempt=key[1], commit_wait_s=0.25)
        self._answer("accept", key, pb.Event(accepted=event), after=lambda: self._begin(held))

    def _begin(self, held: Held) -> None:
        held.running = self._spawn(self._decode(held))

    def _on_release(self, release: pb.Release) -> None:
        key = key_of(release.ticket)
        self._expect(key in self.held, "release of what is not held")
        self.forget(key)
        transfer = pb.TransferStats(num_bytes=100, transfer_s=0.5, exposed_s=0.125)
        event = pb.Released(transfer_id=key[0], attempt=key[1], transfer=transfer)
        self._answer("release", None, pb.Event(released=event))

    def _on_cancel(self, cancel: pb.CancelAttempt) -> None:
        key = key_of(cancel.ticket)
        self.forget(key)
        if not self.script.no_release:
            event = pb.Released(transfer_id=key[0], attempt=key[1])
            self._answer("cancel", None, pb.Event(released=event))

    def _on_drain(self, drain: pb.Drain) -> None:
        self.say(pb.Event(drained=pb.Drained()), load=self.load(draining=True))

    def _on_flush_cache(self, _: pb.FlushCache) -> None:
        flushed = pb.CacheFlushed(num_blocks=self.script.num_cached_blocks)
        self._answer("flush_cache", None, pb.Event(cache_flushed=flushed))

    # ---- small steps

    def _admit(self, kind: str, ticket: pb.Ticket, work: pb.Work, *, local: bool) -> bool:
        """Hold blocks for the whole prompt and one token more, or say why not."""
        key = key_of(ticket)
        token_ids = [*self.parts.pop(key, []), *work.token_ids]
        self._expect(len(token_ids) == work.prompt_offset + len(work.token_ids), "parts of the prompt are missing")
        self._expect(key not in self.held, "the same attempt twice")
        num_blocks = -(-(len(token_ids) + 1) // self.block_size)
        if self._fails(kind, key):
            return False
        if self.script.refuse or num_blocks > self.num_free_blocks:
            self.script.refuse = max(0, self.script.refuse - 1)
            self.say(pb.Event(refused=pb.Refused(transfer_id=key[0], attempt=key[1], reason="no_blocks")))
            return False
        self.held[key] = Held(key, token_ids, work, local, num_blocks)
        self._expect(len(self.held) <= self.credits, "more than the credits granted")
        return True

    def _fails(self, kind: str, key: Key) -> bool:
        if not self.script.fail.get(kind):
            return False
        self.script.fail[kind] -= 1
        self.forget(key)
        self.say(failed(key, self.script.fail_reason))
        return True

    async def _decode(self, held: Held) -> None:
        """One token a step, each step a message."""
        sampling, key = held.work.sampling, held.key
        while True:
            if "tokens" in self.script.pause or self.num_steps[key] == self.script.steps:
                await self._gates["tokens"].wait()
            await asyncio.sleep(0)
            if key not in self.held or self._fails("tokens", key):
                return
            held.token_ids.append(next_token(held.token_ids))
            finish = pb.ENGINE_FINISH_UNSPECIFIED
            if len(held.token_ids) - held.work.num_prompt_tokens >= sampling.max_tokens:
                finish = pb.ENGINE_FINISH_LENGTH
                self.forget(key)
            self.num_steps[key] += 1
            self.say(tokens(key, held.token_ids[-1:], finish))
            await self._notify()
            if finish:
                return

    def _answer(self, kind: str, key: Key | None, event: pb.Event, after: Callable[[], None] | None = None) -> None:
        """Now, or once resumed; not at all where the attempt was cancelled meanwhile."""

        def speak() -> None:
            if key is None or key in self.held:
                self.say(event)
                if after:
                    after()

        async def later() -> None:
            await self._gates[kind].wait()
            speak()

        if kind in self.script.pause:
            self._spawn(later())
        else:
            speak()

    def forget(self, key: Key) -> None:
        """Hold nothing of the attempt any more, and say nothing."""
        held = self.held.pop(key, None)
        if held and held.running and held.running is not asyncio.current_task():
            held.running.cancel()

    def _expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

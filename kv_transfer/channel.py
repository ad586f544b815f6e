"""The two ends of a channel, with threads of their own, and nothing else shared."""

from __future__ import annotations

import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.clock import Clock
from core.errors import IntegrityError, TransferError
from core.ticket import AttemptKey
from kernels.memory import zeros
from kv_transfer.config import TransferConfig
from kv_transfer.frame import FRAME_BYTES, Entry, Frame, FrameKind, pack, unpack
from kv_transfer.outbox import Outbox, Outgoing
from kv_transfer.streaming import LinkFit, LinkMeter
from kv_transfer.transport import Delivery, Transport

FAILED = "the channel's thread failed"
"""Stands where anything but a TransferError ends it: a bug, shown as such."""
WINDOW = 4
"""Batches that are on their way at once: the peer always has the next one when it is done with one."""
OnSent = Callable[[AttemptKey, int, float, float], None]
"""`(key, bytes, share of the channel's time in s, when)`, for each segment that has left."""
OnSegment = Callable[[Entry, Tensor], None]
"""A segment and its payload: 1-D uint8, in memory of the transport that is used again after the call."""
OnDown = Callable[[str], None]
"""The channel has ended, with the reason. Called once, by the channel's thread."""


class Channel(ABC):
    """One end: a thread that runs until it is closed, the peer goes, or it fails; then `on_down` is called.

    However the thread ends, it breaks the connection, so that neither end outlives the other.
    """

    def __init__(self, name: str, transport: Transport, config: TransferConfig, on_down: OnDown) -> None:
        self._transport, self._config, self._on_down = transport, config, on_down
        self._closed = threading.Event()
        self.num_turns = 0
        """Frames sent or received: a channel that lives always has another before long."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End at once, from any thread; returns without waiting for it."""
        self._closed.set()
        self._transport.abort()

    def _run(self) -> None:
        reason = FAILED
        try:
            reason = self._carry()
        except TransferError as error:
            reason = str(error)
        finally:
            self.close()
            self._on_down(reason)

    @abstractmethod
    def _carry(self) -> str:
        """The thread's work; returns the reason of an orderly end."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch on its way, or a sign of life, which is an empty one."""

    batch: list[Outgoing]
    parts: list[Tensor]
    """Its payload as it is sent; kept until it has left."""
    started_at: float
    delivery: Delivery


class SendChannel(Channel):
    """The sending end. `put` and `drop` may be called from any thread.

    With nothing to send it says that it lives, so that its peer can tell silence from death. Nothing leaves unless
    the peer takes it, so a peer that does not is noticed as soon.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        config: TransferConfig,
        clock: Clock,
        on_sent: OnSent,
        on_down: OnDown,
        *,
        by_blocks: bool = False,
    ) -> None:
        """`by_blocks`: the caches of both sides have blocks of the same size."""
        super().__init__(f"kv-send-{name}", transport, config, on_down)
        self.by_blocks = by_blocks
        self._clock, self._on_sent = clock, on_sent
        memory = transport.memory
        if memory is None and transport.payload_device.type == "cpu":
            memory = zeros(config.max_staging_bytes)
        self._window = threading.Semaphore(WINDOW)
        self._flying: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._failure = FAILED
        self._meter = LinkMeter()
        self._outbox = Outbox(config.max_staging_bytes, config.coalesce_bytes, memory)

    @property
    def fit(self) -> LinkFit:
        """What the link is known to do."""
        return self._meter.fit

    def stage(self, num_bytes: int, wanted: Callable[[], bool]) -> Tensor | None:
        """[num_bytes] uint8 on CPU to make a payload in, for `put` or `unstage`; waits and fails as `put` does."""
        return self._outbox.stage(num_bytes, self._config.keepalive_s, wanted)

    def unstage(self, payload: Tensor) -> None:
        self._outbox.unstage(payload)

    def put(self, outgoing: Outgoing, wanted: Callable[[], bool], *, more: bool = False) -> bool:
        """Queue a segment. Where staging is full, waits for as long as the peer takes something every `keepalive_s`.

        False: it was not queued. `more`: it may wait for the next one, which comes at once.
        """
        return self._outbox.put(outgoing, self._config.keepalive_s, wanted, more=more)

    def drop(self, key: AttemptKey) -> None:
        """Forget what is queued of an attempt. What is leaving right now still leaves."""
        self._outbox.drop(key)

    def close(self) -> None:
        self._outbox.close()
        super().close()

    def _carry(self) -> str:
        settling = threading.Thread(target=self._settle, name=f"{self.thread.name}-settle", daemon=True)
        settling.start()
        try:
            while (batch := self._next()) is not None:
                self.num_turns += 1
                self._send(batch)
        finally:
            self.close()
            self._flying.put(None)
            settling.join(self._config.keepalive_s)
        return self._failure

    def _next(self) -> list[Outgoing] | None:
        """What is sent next, taken when fewer than `WINDOW` batches are on their way: until then it can be dropped."""
        timeout_s = self._config.silence_timeout_s
        if not self._window.acquire(timeout=timeout_s):
            raise TransferError("pair_down", f"the peer has taken nothing for {timeout_s:g} s")
        return self._outbox.take(self._config.keepalive_s)

    def _send(self, batch: list[Outgoing]) -> None:
        """Put a batch on its way, or the sign of life that an empty one is."""
        timeout_s, started_at = self._config.silence_timeout_s, self._clock()
        parts = [outgoing.payload.to(self._transport.payload_device) for outgoing in batch]
        for part, outgoing in zip(parts, batch, strict=True):
            if part.numel() != outgoing.num_bytes:  # gloo ends the peer's process where more comes than it expects
                raise IntegrityError(f"{part.numel()} bytes of payload, {outgoing.num_bytes} announced")
        kind = FrameKind.SEGMENTS if batch else FrameKind.KEEPALIVE
        frame = Frame(kind, tuple(outgoing.entry for outgoing in batch))
        self._flying.put(_Flight(batch, parts, started_at, begin_frame(self._transport, frame, parts, timeout_s)))

    def _settle(self) -> None:
        """A thread's work: see what is on its way arrive, and let its memory be used again."""
        free_at = -math.inf  # when the channel had carried what came before
        try:
            while (flight := self._flying.get()) is not None:
                flight.delivery.wait(self._config.silence_timeout_s)
                self._window.release()
                free_at = self._book(flight, max(free_at, flight.started_at))
            self._failure = "closed"
        except TransferError as error:
            self._failure = str(error)
        finally:
            self.close()
            self._window.release()  # whoever waits for room sees that it is closed

    def _book(self, flight: _Flight, started_at: float) -> float:
        """Tell of a batch that has left; returns when it had."""
        sent_at, num_bytes = self._clock(), sum(outgoing.num_bytes for outgoing in flight.batch)
        self._meter.observe(num_bytes, sent_at - started_at)
        if flight.batch:
            self._outbox.sent(flight.batch)
        for outgoing in flight.batch:
            share = (sent_at - started_at) * outgoing.num_bytes / num_bytes
            self._on_sent(outgoing.entry.key, outgoing.num_bytes, share, sent_at)
        return sent_at


class ReceiveChannel(Channel):
    """The receiving end: hands on what comes. Never touches a block itself."""

    def __init__(
        self, name: str, transport: Transport, config: TransferConfig, on_segment: OnSegment, on_down: OnDown
    ) -> None:
        super().__init__(f"kv-receive-{name}", transport, config, on_down)
        self._on_segment = on_segment

    def _carry(self) -> str:
        while True:
            frame = receive_frame(self._transport, self._config.silence_timeout_s)
            self.num_turns += 1
            if frame.kind is FrameKind.SEGMENTS:
                self._receive_segments(frame)
            elif frame.kind is not FrameKind.KEEPALIVE:
                raise TransferError("corrupt_frame", f"a frame of kind {frame.kind.name} in the middle")

    def _receive_segments(self, frame: Frame) -> None:
        sizes = [entry.record.num_bytes for entry in frame.entries]
        parts = self._transport.receive_parts(sizes, self._config.silence_timeout_s)
        for entry, payload in zip(frame.entries, parts, strict=True):
            self._on_segment(entry, payload)


def begin_frame(transport: Transport, frame: Frame, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
    return transport.send(torch.frombuffer(bytearray(pack(frame)), dtype=torch.uint8), parts, timeout_s)


def send_frame(transport: Transport, frame: Frame, timeout_s: float) -> None:
    """Send it alone; returns when the peer has taken it."""
    begin_frame(transport, frame, (), timeout_s).wait(timeout_s)


def receive_frame(transport: Transport, timeout_s: float) -> Frame:
    """Raises TransferError `pair_down` or `corrupt_frame`."""
    data = torch.empty(FRAME_BYTES, dtype=torch.uint8)
    transport.receive_frame(data, timeout_s)
    return unpack(data.numpy().tobytes())

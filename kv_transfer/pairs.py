"""A worker's channels: one for each pair it is part of, made and remade at the router's word."""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from core.clock import Clock
from core.errors import TransferError
from core.kv_layout import KVLayout
from core.messages import Connect, PairDown, PairUp
from core.ticket import AttemptKey, Ticket, lane_of
from kv_transfer.channel import Channel, ReceiveChannel, SendChannel, receive_frame, send_frame
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify
from kv_transfer.frame import Entry, Frame, FrameKind
from kv_transfer.handshake import INCOMPATIBLE
from kv_transfer.rendezvous import RECEIVER, SENDER, Rendezvous
from kv_transfer.reshard import Group, refusal
from kv_transfer.transport import Transport

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""How long `close` waits for threads, all together."""

MAX_ENDED = 64
"""Pairs without a channel whose last epoch is remembered."""

PairKey = tuple[str, str]
"""Incarnations of the prefill and the decode worker."""
LinkKey = tuple[str, str, int]
"""The same, and the lane: each router of a cluster has a channel of its own between the two."""


class PairListener(Protocol):
    """Who is told of segments and ends; called by channel threads, and by whoever replaces or closes a channel."""

    def on_sent(self, key: AttemptKey, num_bytes: int, seconds: float, at: float) -> None: ...

    def on_segment(self, entry: Entry, payload: Tensor) -> None: ...

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Link:
    """One epoch of a pair. `outcome` is None while it is made; PairDown is the end of it."""

    connect: Connect
    outcome: PairUp | PairDown | None = None
    channel: Channel | None = None
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def key(self) -> PairKey:
        return self.connect.prefill_incarnation, self.connect.decode_incarnation

    @property
    def lane(self) -> LinkKey:
        return *self.key, lane_of(self.connect.epoch)

    @property
    def name(self) -> str:
        return f"{self.connect.prefill_incarnation[:8]}-{self.connect.decode_incarnation[:8]}-{self.connect.epoch}"


class Pairs:
    """Owns every channel of a worker. Thread-safe.

    A worker has `max_pairs` channels at most, a pair has one live epoch for each router. A Connect with a later one
    replaces it, one with an earlier one is refused, the same again only repeats the outcome. A channel that ends takes
    its transfers with it and no others, and is told by one PairDown. A watchdog ends the channel whose thread hangs in
    a transport that does not mind its timeouts.
    """

    def __init__(
        self,
        incarnation: str,
        layout: KVLayout,
        rendezvous: Rendezvous,
        config: TransferConfig,
        clock: Clock,
        notify: Notify,
        listener: PairListener,
    ) -> None:
        self._incarnation, self._layout, self._rendezvous = incarnation, layout, rendezvous
        self._config, self._clock, self._notify, self._listener = config, clock, notify, listener
        self._lock = threading.Lock()
        self._links: dict[LinkKey, _Link] = {}
        self._closed = False
        self._closing = threading.Event()
        self._watchdog: threading.Thread | None = None

    @property
    def address(self) -> str:
        return self._rendezvous.address

    def connect(self, connect: Connect) -> None:
        """Build the channel of a pair in the background; PairUp or PairDown tells the outcome. Returns at once."""
        link = _Link(connect)
        with self._lock:
            old = self._links.get(link.lane)
            if self._closed:
                return
            if old is not None and old.connect.epoch == connect.epoch:
                if old.outcome is not None:
                    self._notify(old.outcome)
                return
            if old is None or old.connect.epoch < connect.epoch:
                self._keep(link)
            num_open = sum(not isinstance(other.outcome, PairDown) for other in self._links.values())
        if old is not None and old.connect.epoch > connect.epoch:
            self._end(link, f"epoch {connect.epoch} is over: {old.connect.epoch} is the latest")
            return
        if num_open > (limit := self._config.max_pairs):
            self._end(link, f"worker {self._incarnation} has {num_open - 1} channels: transfer.max_pairs = {limit}")
            return
        if old is not None:
            self._end(old, f"replaced by epoch {connect.epoch}")
        self._begin(link)

    def disconnect(self, pair: PairKey, epoch: int) -> None:
        """End the channel of a pair, if it is of that epoch. Returns at once."""
        with self._lock:
            link = self._links.get((*pair, lane_of(epoch)))
        if link is not None and link.connect.epoch == epoch:
            self._end(link, "the router has closed it")

    def sending(self, ticket: Ticket) -> SendChannel:
        """The live channel of a ticket that this worker sends by.

        Raises TransferError `pair_down` where there is none of its epoch.
        """
        channel = self._live(ticket)
        if not isinstance(channel, SendChannel):
            raise TransferError("pair_down", "this worker is the pair's receiver")
        return channel

    def check_receiving(self, ticket: Ticket) -> None:
        """TransferError `pair_down` where segments of the ticket could not come in."""
        if not isinstance(self._live(ticket), ReceiveChannel):
            raise TransferError("pair_down", "this worker is the pair's sender")

    def close(self) -> None:
        """End every channel; returns when their threads have ended, or after `CLOSE_TIMEOUT_S`.

        Who still waits for a peer to come ends by himself, at `connect_timeout_s` at the latest.
        """
        self._closing.set()
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        for link in links:
            self._end(link, "closed")
        self._rendezvous.close()
        ends_at = self._clock() + CLOSE_TIMEOUT_S
        for thread in [self._watchdog, *(thread for link in links for thread in link.threads)]:
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, ends_at - self._clock()))

    def _live(self, ticket: Ticket) -> Channel:
        with self._lock:
            link = self._links.get((ticket.prefill_incarnation, ticket.decode_incarnation, lane_of(ticket.pair_epoch)))
        if link is None or link.connect.epoch != ticket.pair_epoch:
            raise TransferError("pair_down", f"no channel of epoch {ticket.pair_epoch} between the two")
        if link.channel is None or not isinstance(link.outcome, PairUp):
            reason = link.outcome.reason if isinstance(link.outcome, PairDown) else "it is still being made"
            raise TransferError("pair_down", f"the channel is not up: {reason}")
        return link.channel

    # ---- one link

    def _begin(self, link: _Link) -> None:
        mismatch = refusal(Group(self._layout), Group(link.connect.peer_layout))
        if self._incarnation not in link.key:
            mismatch = f"worker {self._incarnation} is not of this pair"
        if mismatch is not None:
            self._end(link, mismatch, permanent=True)
            return
        timeout_s = self._config.connect_timeout_s
        deadline = threading.Timer(timeout_s, self._end, (link, f"the peer did not come within {timeout_s:g} s"))
        deadline.name, deadline.daemon = f"kv-deadline-{link.name}", True
        builder = threading.Thread(
            target=self._build, args=(link, deadline), name=f"kv-connect-{link.name}", daemon=True
        )
        with self._lock:
            if link.outcome is not None:
                return  # replaced or closed
            link.threads += [deadline, builder]
            deadline.start()
            builder.start()

    def _build(self, link: _Link, deadline: threading.Timer) -> None:
        """Meet the peer and make sure of it; the deadline stands beside, for a meeting may hang."""
        rank = SENDER if link.connect.prefill_incarnation == self._incarnation else RECEIVER
        transport: Transport | None = None
        try:
            transport = self._rendezvous.meet(link.connect, rank)
            self._greet(transport, link.connect, rank)
        except TransferError as error:
            self._end(link, str(error), permanent=error.reason == INCOMPATIBLE)
        else:
            self._open(link, self._channel(link, transport, rank), transport.name)
        finally:
            deadline.cancel()
            if transport is not None and link.channel is None:
                transport.abort()

    def _greet(self, transport: Transport, connect: Connect, rank: int) -> None:
        """Each side says whom it means, the sender first. Raises TransferError `pair_down`, `corrupt_frame`."""
        ours, timeout_s = Frame(FrameKind.HELLO, identity=self._identity(connect)), self._config.connect_timeout_s
        if rank == SENDER:
            send_frame(transport, ours, timeout_s)
        theirs = receive_frame(transport, timeout_s)
        if rank == RECEIVER:
            send_frame(transport, ours, timeout_s)
        if theirs != ours:
            raise TransferError("pair_down", "the peer is not of the pair, epoch and layout that the router named")

    def _channel(self, link: _Link, transport: Transport, rank: int) -> Channel:
        def on_down(reason: str) -> None:
            self._end(link, reason)

        if rank == SENDER:
            by_blocks = link.connect.peer_layout.block_size == self._layout.block_size
            on_sent = self._listener.on_sent
            return SendChannel(link.name, transport, self._config, self._clock, on_sent, on_down, by_blocks=by_blocks)
        return ReceiveChannel(link.name, transport, self._config, self._listener.on_segment, on_down)

    def _open(self, link: _Link, channel: Channel, transport: str) -> None:
        c = link.connect
        with self._lock:
            if link.outcome is not None:
                return  # replaced, closed or too late
            link.channel, link.outcome = (
                channel,
                PairUp(c.prefill_incarnation, c.decode_incarnation, c.epoch, transport),
            )
            link.threads.append(channel.thread)
            channel.start()
            if self._watchdog is None:
                self._watchdog = threading.Thread(target=self._watch, name="kv-watchdog", daemon=True)
                self._watchdog.start()
            self._notify(link.outcome)  # under the lock: the word of its end can't overtake it

    def _end(self, link: _Link, reason: str, *, permanent: bool = False) -> None:
        c = link.connect
        down = PairDown(c.prefill_incarnation, c.decode_incarnation, c.epoch, reason, permanent)
        with self._lock:
            if isinstance(link.outcome, PairDown):
                return
            link.outcome = down
            channel, link.channel = link.channel, None  # its sockets and staging go with it
            if channel is not None and not channel.closed:  # to abort takes time, which is nobody else's
                closer = threading.Thread(target=channel.close, name=f"kv-close-{link.name}", daemon=True)
                link.threads.append(closer)
                closer.start()
        log.info("pair %s -> %s, epoch %d: %s", c.prefill_incarnation, c.decode_incarnation, c.epoch, reason)
        self._listener.on_pair_down(link.key, c.epoch, reason)
        self._notify(down)

    def _keep(self, link: _Link) -> None:
        """Under the lock. Ends that are long past are forgotten: those of workers that are gone would pile up."""
        self._links.pop(link.lane, None)
        self._links[link.lane] = link
        over = [key for key, other in self._links.items() if isinstance(other.outcome, PairDown)]
        for key in over[: max(0, len(over) - MAX_ENDED)]:
            del self._links[key]

    # ---- the watchdog

    def _watch(self) -> None:
        """End channels whose thread does not turn. Each is aborted by a thread of its own: that may hang as well."""
        limit_s = 2 * (self._config.silence_timeout_s + self._config.keepalive_s)
        turned: dict[_Link, tuple[int, float]] = {}
        while not self._closing.wait(self._config.keepalive_s):
            now = self._clock()
            with self._lock:
                channels = {link: link.channel for link in self._links.values() if link.channel is not None}
            turned = {link: turned.get(link, (-1, now)) for link in channels}
            for link, channel in channels.items():
                if channel.num_turns != turned[link][0]:
                    turned[link] = channel.num_turns, now
                elif now - turned[link][1] > limit_s:
                    self._end(link, f"the watchdog: its thread has hung for {limit_s:g} s")

    def _identity(self, connect: Connect) -> bytes:
        """16 bytes that are equal on both sides only if they mean the same pair, epoch and layout."""
        layout = self._layout
        names = (
            connect.prefill_incarnation,
            connect.decode_incarnation,
            connect.epoch,
            layout.fingerprint,
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_size,
            layout.dtype,
            layout.kind,
            layout.weights,
        )
        return hashlib.blake2b("\n".join(map(str, names)).encode(), digest_size=16).digest()

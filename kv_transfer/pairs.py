"""A worker's channels: one for each pair it is part of, made and remade at the router's word."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from core.clock import Clock
from core.errors import TransferError
from core.kv_layout import KVLayout
from core.messages import Connect, PairDown, PairUp
from core.ticket import AttemptKey, Ticket
from kv_transfer.channel import ReceiveChannel, SendChannel
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify
from kv_transfer.frame import Entry
from kv_transfer.transport import RECEIVER, SENDER, ProcessGroupTransport, Transport, dist

log = logging.getLogger(__name__)

PairKey = tuple[str, str]
"""Incarnations of the prefill and the decode worker."""
MakeTransport = Callable[[Connect, int], Transport]
"""`(connect, rank)`: blocks until the peer has joined; TransferError where it does not."""


@dataclass(slots=True)
class _Pair:
    connect: Connect
    channel: SendChannel | ReceiveChannel | None = None
    outcome: PairUp | PairDown | None = None  # None: still connecting
    lock: threading.Lock = field(default_factory=threading.Lock)


class PairListener(Protocol):
    """Who is told of segments and ends; called by channel threads."""

    def on_sent(self, key: AttemptKey, num_bytes: int, seconds: float, at: float) -> None: ...

    def on_segment(self, entry: Entry, payload: Tensor) -> None: ...

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None: ...


class Pairs:
    """Owns the store where others meet this worker, and every channel. Thread-safe.

    A pair has one live epoch. A Connect with a later one replaces it, one with an earlier one is refused, the same
    again only repeats the outcome. A channel that ends takes its transfers with it and no others.
    """

    def __init__(
        self,
        incarnation: str,
        layout: KVLayout,
        host: str,
        device: torch.device,
        config: TransferConfig,
        clock: Clock,
        notify: Notify,
        listener: PairListener,
        make_transport: MakeTransport | None = None,
    ) -> None:
        self._incarnation, self._layout, self._host, self._device = incarnation, layout, host, device
        self._config, self._clock, self._notify, self._listener = config, clock, notify, listener
        self._make_transport = make_transport or self._process_group
        self._lock = threading.Lock()
        self._pairs: dict[PairKey, _Pair] = {}
        self._closed = False
        with socket.create_server((host, 0), backlog=64) as server:
            port = server.getsockname()[1]
            timeout = timedelta(seconds=config.connect_timeout_s)
            # the store takes over the socket: bound to `host` alone, where it would bind to everything by itself
            self._store = dist.TCPStore(
                host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=server.detach()
            )
        self.address = f"{host}:{port}"

    def connect(self, connect: Connect) -> None:
        """Build the channel of a pair in the background; PairUp or PairDown tells the outcome. Returns at once."""
        key = (connect.prefill_incarnation, connect.decode_incarnation)
        with self._lock:
            old = self._pairs.get(key)
            if self._closed or (old is not None and old.connect.epoch > connect.epoch):
                return
            if old is not None and old.connect.epoch == connect.epoch:
                if old.outcome is not None:
                    self._notify(old.outcome)
                return
            pair = self._pairs[key] = _Pair(connect)
        if old is not None:
            self._down(old, "replaced by a later epoch", tell=False)
        mismatch = self._layout.mismatch(connect.peer_layout)
        if self._incarnation not in key:
            mismatch = f"worker {self._incarnation} is not of this pair"
        if mismatch is not None:
            self._down(pair, mismatch, permanent=True)
            return
        threading.Thread(target=self._build, args=(pair, old), name="kv-connect", daemon=True).start()

    def sending(self, ticket: Ticket) -> SendChannel:
        """The live channel of a ticket; TransferError `pair_down` where there is none of its epoch."""
        channel = self._live(ticket)
        if not isinstance(channel, SendChannel):
            raise TransferError("pair_down", "this worker is the pair's receiver")
        return channel

    def check_receiving(self, ticket: Ticket) -> None:
        """TransferError `pair_down` where segments of the ticket could not come in."""
        if not isinstance(self._live(ticket), ReceiveChannel):
            raise TransferError("pair_down", "this worker is the pair's sender")

    def close(self) -> None:
        """End every channel; returns when their threads have, or at `silence_timeout_s`."""
        with self._lock:
            self._closed = True
            pairs = list(self._pairs.values())
        closers = [threading.Thread(target=self._end, args=(pair,), daemon=True) for pair in pairs]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(self._config.silence_timeout_s)

    def _live(self, ticket: Ticket) -> SendChannel | ReceiveChannel:
        with self._lock:
            pair = self._pairs.get((ticket.prefill_incarnation, ticket.decode_incarnation))
        if pair is None or pair.connect.epoch != ticket.pair_epoch:
            raise TransferError("pair_down", f"no channel of epoch {ticket.pair_epoch} between the two")
        if pair.channel is None or not isinstance(pair.outcome, PairUp):
            reason = pair.outcome.reason if isinstance(pair.outcome, PairDown) else "it is still being made"
            raise TransferError("pair_down", f"the channel is not up: {reason}")
        return pair.channel

    def _build(self, pair: _Pair, old: _Pair | None) -> None:
        connect = pair.connect
        if old is not None and old.channel is not None:
            old.channel.close(self._config.silence_timeout_s)
        rank = SENDER if connect.prefill_incarnation == self._incarnation else RECEIVER
        try:
            transport = self._make_transport(connect, rank)
        except TransferError as error:
            self._down(pair, str(error))
            return
        identity, config, listener = self._identity(connect), self._config, self._listener

        def on_down(reason: str) -> None:
            self._down(pair, reason)

        channel: SendChannel | ReceiveChannel
        if rank == SENDER:
            channel = SendChannel(transport, identity, config, self._clock, listener.on_sent, on_down)
        else:
            channel = ReceiveChannel(transport, identity, config, lambda: self._up(pair), listener.on_segment, on_down)
        with pair.lock:
            late = pair.outcome is not None
            pair.channel = channel
        if late:
            transport.abort()
            return
        channel.start()
        if rank == SENDER:
            self._up(pair)

    def _up(self, pair: _Pair) -> None:
        c = pair.connect
        with pair.lock:
            if pair.outcome is not None:
                return
            pair.outcome = PairUp(c.prefill_incarnation, c.decode_incarnation, c.epoch)
        self._notify(pair.outcome)

    def _down(self, pair: _Pair, reason: str, *, permanent: bool = False, tell: bool = True) -> None:
        c = pair.connect
        with pair.lock:
            if isinstance(pair.outcome, PairDown):
                return
            pair.outcome = PairDown(c.prefill_incarnation, c.decode_incarnation, c.epoch, reason, permanent)
        log.info("pair %s -> %s, epoch %d: %s", c.prefill_incarnation, c.decode_incarnation, c.epoch, reason)
        self._listener.on_pair_down((c.prefill_incarnation, c.decode_incarnation), c.epoch, reason)
        if tell:
            self._notify(pair.outcome)

    def _end(self, pair: _Pair) -> None:
        self._down(pair, "closed", tell=False)
        if pair.channel is not None:
            pair.channel.close(self._config.silence_timeout_s)

    def _identity(self, connect: Connect) -> bytes:
        """16 bytes that are equal on both sides only if they mean the same pair, epoch and layout."""
        names = (
            connect.prefill_incarnation,
            connect.decode_incarnation,
            str(connect.epoch),
            self._layout.fingerprint,
            str(self._layout.bytes_per_token_per_layer),
        )
        return hashlib.blake2b("\n".join(names).encode(), digest_size=16).digest()

    def _process_group(self, connect: Connect, rank: int) -> Transport:
        host, _, port = connect.store_address.rpartition(":")
        timeout_s = self._config.connect_timeout_s
        try:
            store = dist.TCPStore(host, int(port), None, False, timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise TransferError("pair_down", f"the store at {connect.store_address} can't be reached") from error
        name = f"pair-{connect.prefill_incarnation}-{connect.decode_incarnation}-{connect.epoch}"
        return ProcessGroupTransport(
            dist.PrefixStore(name, store),
            rank,
            host=self._host,
            device=self._device,
            backend=self._config.backend,
            timeout_s=timeout_s,
        )

"""Where the two workers of a pair meet and agree on what carries their payload."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch

from core.errors import ConfigError, TransferError
from core.messages import Connect
from core.secret import Secret
from kv_transfer.config import TransferConfig
from kv_transfer.door import NAME_BYTES, Door
from kv_transfer.handshake import Offer, choose
from kv_transfer.pair_proof import prove_both
from kv_transfer.pair_store import PairStore, dist
from kv_transfer.shared_memory import Invitation, host_identity, visit
from kv_transfer.socket_transport import TCPTransport
from kv_transfer.transport import ProcessGroupTransport, Transport, first_sentence, wants_nccl

SENDER, RECEIVER = 0, 1
"""Ranks of the two workers of a pair."""
MAX_VISITORS = 256
"""Senders that may wait for this worker to hear of their pair."""
_WATCHDOG_TIMEOUT = timedelta(days=1)  # of torch's NCCL watchdog, which would end the process: our own comes first


class Rendezvous(Protocol):
    """Where workers find each other."""

    address: str
    """host:port to which the senders of this worker's pairs come."""

    def meet(self, connect: Connect, rank: int) -> Transport:
        """Blocks until the peer has come; TransferError `pair_down` where it does not within `connect_timeout_s`."""

    def close(self) -> None:
        """Nobody can come any more, and who waits for somebody fails; pairs that stand go on."""


class GroupRendezvous:
    """The sender of a pair comes to the receiver's address; both share memory or make process groups. Thread-safe.

    Two sockets of our own instead of torch's TCPStore: that one looks every address up in the DNS, which takes seconds
    where a name server does not answer, and its constructor can't be interrupted. Listens on `host` alone. Raises
    ConfigError where the configured backend can't be had.
    """

    def __init__(self, host: str, device: torch.device, config: TransferConfig) -> None:
        self._host, self._device, self._config = host, device, config
        self._timeout_s = config.connect_timeout_s
        self._with_nccl = wants_nccl(config.backend, device, hasattr(dist, "ProcessGroupNCCL"))
        self._shared_host = host_identity() if device.type == "cpu" and config.backend in ("auto", "shm") else ""
        if config.backend == "shm" and not self._shared_host:
            raise ConfigError("transfer.backend", "shm", "needs KV on CPU and Linux with memfd_create; use 'auto'")
        self._changed = threading.Condition()
        self._visitors: OrderedDict[bytes, socket.socket] = OrderedDict()  # by the name of their pair
        self._meetings: set[socket.socket] = set()
        self._closed = False
        self._door = Door(host, MAX_VISITORS, self._take_in)
        self.address = f"{host}:{self._door.port}"

    def meet(self, connect: Connect, rank: int) -> Transport:
        try:
            connection = self._visit(connect) if rank == SENDER else self._await(connect)
        except (OSError, ValueError) as error:
            raise TransferError("pair_down", f"{connect.store_address} can't be reached: {error}") from error
        try:
            with self._meeting(connection):
                if connect.secret:
                    prove_both(connection, Secret(connect.secret), visits=rank == SENDER, timeout_s=self._timeout_s)
                return self._transport(connection, rank)
        except (OSError, RuntimeError) as error:
            raise TransferError("pair_down", f"the peer did not come: {first_sentence(error)}") from error

    def close(self) -> None:
        self._door.close()
        with self._changed:
            self._closed = True
            for connection in self._meetings:
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it, which closes it
            for connection in self._visitors.values():
                connection.close()
            self._visitors.clear()
            self._changed.notify_all()

    def _visit(self, connect: Connect) -> socket.socket:
        host, _, port = connect.store_address.rpartition(":")
        connection = socket.create_connection((host, int(port)), self._timeout_s)
        connection.sendall(_name(connect))
        return connection

    def _await(self, connect: Connect) -> socket.socket:
        name = _name(connect)
        with self._changed:
            self._changed.wait_for(lambda: name in self._visitors or self._closed, self._timeout_s)
            if (connection := self._visitors.pop(name, None)) is None:
                raise TransferError("pair_down", f"the peer did not come within {self._timeout_s:g} s")
            return connection

    def _take_in(self, name: bytes, connection: socket.socket) -> None:
        with self._changed:
            left = [self._visitors.pop(name, None)]
            self._visitors[name] = connection
            if len(self._visitors) > MAX_VISITORS:
                left.append(self._visitors.popitem(last=False)[1])
            self._changed.notify_all()
        for older in left:
            if older is not None:
                older.close()

    @contextlib.contextmanager
    def _meeting(self, connection: socket.socket) -> Iterator[None]:
        """`close` ends it."""
        with self._changed:
            if self._closed:
                connection.close()
            self._meetings.add(connection)
        try:
            yield
        except BaseException:
            connection.close()
            raise
        finally:
            with self._changed:
                self._meetings.discard(connection)

    def _transport(self, connection: socket.socket, rank: int) -> Transport:
        store = PairStore(connection, self._timeout_s)
        chosen = self._choose(store, rank)
        if chosen == "tcp":
            return TCPTransport(connection)
        if chosen == "shm":
            transport = self._shared_memory(store, rank)
            connection.close()
            return transport
        gloo = self._gloo_group(dist.PrefixStore("gloo", store), rank)
        if chosen == "gloo":
            connection.close()
            return ProcessGroupTransport(gloo, None, 1 - rank, self._device)
        nccl = self._nccl_group(dist.PrefixStore("nccl", store), rank)
        return ProcessGroupTransport(gloo, nccl, 1 - rank, self._device, keep=store)

    def _choose(self, store: PairStore, rank: int) -> str:
        """TransferError `incompatible`, on both sides, where there is nothing that both will have."""
        ours = Offer(self._config.backend, self._device.type, self._shared_host, self._gpu())
        store.set(f"offer/{rank}", ours.pack())
        theirs = Offer.unpack(store.get(f"offer/{1 - rank}"))
        return choose(ours, theirs) if rank == SENDER else choose(theirs, ours)

    def _shared_memory(self, store: PairStore, rank: int) -> Transport:
        if rank == SENDER:
            invitation = Invitation(self._config.max_staging_bytes)
            with self._meeting(invitation.socket), invitation.socket:
                store.set("memory", invitation.address)
                return invitation.accept(self._timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        with self._meeting(connection):
            return visit(connection, store.get("memory"), self._timeout_s)

    def _gpu(self) -> str:
        """What names this worker's GPU, on any machine; empty where it won't use NCCL."""
        return str(torch.cuda.get_device_properties(self._device).uuid) if self._with_nccl else ""

    def _gloo_group(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = timedelta(seconds=self._timeout_s)
        options._threads = 1
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def _nccl_group(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _WATCHDOG_TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, 2, options)


def _name(connect: Connect) -> bytes:
    """What the two sides of a pair call it: 16 bytes, which nobody can tell who does not have its secret."""
    text = f"{connect.prefill_incarnation}\n{connect.decode_incarnation}\n{connect.epoch}"
    return hashlib.blake2b(text.encode(), digest_size=NAME_BYTES, key=connect.secret).digest()

"""A worker's two ways out, each through a proxy: to the router, and to the other workers of its pairs."""

from __future__ import annotations

import socket
import struct
import threading
from datetime import timedelta
from typing import Any, Literal

import torch

from kv_transfer.config import TransferConfig
from kv_transfer.pair_store import dist
from kv_transfer.rendezvous import SENDER, GroupRendezvous
from tests.faults.proxy import Proxy, Weather

Way = Literal["kv", "session"]
HIGHER_HOST = "127.0.0.2"
"""Of two gloo peers the one with the higher address connects: decode workers get this one, and come by the proxy."""


class Network:
    """Obeys `net WAY WHAT DELAY_S JITTER_S`; WHAT is open, held or cut."""

    def __init__(self) -> None:
        self.proxies: dict[str, Proxy] = {"kv": Proxy(1), "session": Proxy(2)}

    def obey(self, way: str, what: str, delay_s: str, jitter_s: str) -> None:
        if what == "cut":
            self.proxies[way].cut()
        else:
            self.proxies[way].turn(Weather(float(delay_s), float(jitter_s), held=what == "held"))


class ProxiedRendezvous(GroupRendezvous):
    """Peers come to the door, which is all that tcp needs, and to gloo's own sockets, through a proxy."""

    def __init__(self, host: str, device: torch.device, config: TransferConfig, proxy: Proxy) -> None:
        super().__init__(host, device, config)
        self._proxy = proxy
        self.address = proxy.forward(self.address)

    def _gloo_group(self, store: Any, rank: int) -> Any:
        return super()._gloo_group(ProxiedStore(store, self._proxy) if rank == SENDER else store, rank)


class ProxiedStore(dist.Store):  # type: ignore[misc]
    """What gloo says of its own address is that of the proxy."""

    def __init__(self, inner: Any, proxy: Proxy) -> None:
        super().__init__()
        self._inner, self._proxy, self._lock = inner, proxy, threading.Lock()

    def set(self, key: str, value: bytes) -> None:
        self._inner.set(key, self._behind_the_proxy(bytes(value)))

    def get(self, key: str) -> bytes:
        return bytes(self._inner.get(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self._inner.wait(keys)
        else:
            self._inner.wait(keys, timeout)

    def check(self, keys: list[str]) -> bool:
        return bool(self._inner.check(keys))

    def _behind_the_proxy(self, value: bytes) -> bytes:
        """`value` with the port of the sockaddr_in in it, if there is one, replaced."""
        family, loopback = struct.pack("=H", socket.AF_INET), socket.inet_aton("127.0.0.1")
        at = value.find(loopback) - 4
        if at < 0 or value[at : at + 2] != family:
            return value
        (port,) = struct.unpack("!H", value[at + 2 : at + 4])
        new = int(self._proxy.forward(f"127.0.0.1:{port}").rpartition(":")[2])
        return value[: at + 2] + struct.pack("!H", new) + value[at + 4 :]

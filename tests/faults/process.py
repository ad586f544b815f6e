"""What `cluster.process` is, with a worker to which a test can let something happen at a step.

`python -m tests.faults.process router | worker ADDRESS`; PENSTOCK_TEST_STEPS is the socket of a `StepControl`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from torch import Tensor

from cluster import process
from cluster.config import from_json
from cluster.spec import Started, WorkerSpec
from cluster.steps import Step
from cluster.worker_process import WorkerProcess
from core.clock import Clock
from core.messages import Connect, WorkerRole
from core.ticket import AttemptKey
from engine.kv_storage import KVStorage
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify
from kv_transfer.plane import KVPlane
from kv_transfer.rendezvous import GroupRendezvous, Rendezvous
from kv_transfer.transport import Delivery, Transport
from tests.faults.network import HIGHER_HOST, Network, ProxiedRendezvous

SOCKET = "PENSTOCK_TEST_STEPS"
NETWORK = "PENSTOCK_TEST_NETWORK"
"""Set where workers reach each other and the router through proxies."""


class Faults:
    """Obeys a `StepControl`: `arm STEP LAYER ACTION SECONDS` says what happens at the next such step."""

    def __init__(self, worker_id: str, path: str, network: Network | None) -> None:
        self._network = network
        self._armed: tuple[Step, int, str, float] | None = None
        self._go = threading.Event()
        self._damage = ""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("r")
        self._say(f"{worker_id} {os.getpid()}")
        threading.Thread(target=self._obey, name="faults", daemon=True).start()

    def __call__(self, step: Step, layer: int = 0, /) -> None:
        armed = self._armed
        if armed is None or armed[:2] != (step, layer):
            return
        self._armed, action, seconds = None, armed[2], armed[3]
        match action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hold":
                self._go.clear()
                self._say("at")
                self._go.wait()
            case "freeze":
                self._say("at")
                os.kill(os.getpid(), signal.SIGSTOP)
            case "sleep":
                self._go.clear()
                self._go.wait(seconds)
            case "nap":  # of the whole process
                subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            case "damage" | "cut":
                self._damage = action
                self._say("at")

    def take_damage(self) -> str:
        """What is to happen to the payload that leaves now: `damage`, `cut` or nothing."""
        damage, self._damage = self._damage, ""
        return damage

    def hear_cancels(self, plane: KVPlane) -> KVPlane:
        """Have the plane tell when a cancel comes to it."""
        cancel = plane.cancel

        def told(key: AttemptKey) -> None:
            cancel(key)
            self._say(f"cancelled {time.monotonic()}")

        plane.cancel = told  # type: ignore[method-assign]
        return plane

    def _obey(self) -> None:
        for line in self._lines:
            match line.split():
                case ["arm", step, layer, action, seconds]:
                    self._armed = (Step(step), int(layer), action, float(seconds))
                    self._say("armed")
                case ["go"]:
                    self._go.set()
                case ["net", way, what, delay_s, jitter_s] if self._network is not None:
                    self._network.obey(way, what, delay_s, jitter_s)
                    self._say("armed")
        self._go.set()

    def _say(self, text: str) -> None:
        self._socket.sendall(f"{text}\n".encode())


class FaultyTransport:
    """A transport whose payload can be damaged on its way, or cut off."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner, self._faults = inner, faults
        self.payload_device = inner.payload_device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
        if parts:
            match self._faults.take_damage():
                case "damage":
                    parts[0][parts[0].numel() // 2] ^= 0x10
                case "cut":
                    self._inner.abort()
        return self._inner.send(frame, parts, timeout_s)


class FaultyRendezvous:
    def __init__(self, inner: Rendezvous, faults: Faults) -> None:
        self._inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def meet(self, connect: Connect, rank: int) -> Any:
        return FaultyTransport(self._inner.meet(connect, rank), self._faults)


class ProxiedWorker(WorkerProcess):
    """A worker to which the router comes through a proxy, where there is a network of them."""

    network: Network | None = None

    def _serve(self) -> grpc.Server:
        server = super()._serve()
        if self.network is not None:
            self._address = self.network.proxies["session"].forward(self._address)
        return server


def start(arguments: list[str], spec: str) -> tuple[Started, process.Process]:
    if arguments[0] != "worker":
        return process.start(arguments, spec)
    process.prepare_for_torch()
    parsed = from_json(WorkerSpec, spec)
    network = Network() if os.environ.get(NETWORK) else None
    faults = Faults(parsed.worker_id, os.environ[SOCKET], network)

    def make_plane(
        incarnation: str, storage: KVStorage, host: str, config: TransferConfig, clock: Clock, notify: Notify
    ) -> KVPlane:
        if network is None:
            inner = GroupRendezvous(host, storage.device, config)
        else:
            kv_host = HIGHER_HOST if parsed.role is WorkerRole.DECODE else host
            inner = ProxiedRendezvous(kv_host, storage.device, config, network.proxies["kv"])
        rendezvous: Any = FaultyRendezvous(inner, faults)
        plane = KVPlane(incarnation, storage, host, config, clock, notify, rendezvous)
        return faults.hear_cancels(plane)

    worker = ProxiedWorker(parsed, lambda: arguments[1], faults, make_plane)
    worker.network = network
    worker.start()
    return Started(), worker


if __name__ == "__main__":
    sys.exit(process.main(sys.argv[1:], start))

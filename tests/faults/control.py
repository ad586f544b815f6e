"""The test's end of faults at steps: which worker is to stop, die or lie where; and the cluster this happens to."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cluster.cluster import Cluster, worker_specs
from cluster.config import ClusterConfig, PoolConfig
from cluster.launcher import SubprocessLauncher
from cluster.steps import Step
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from penstock import Client, PairInfo, ServerInfo, UnavailableError
from router.config import DispatchConfig, PlacementConfig, RouterConfig
from tests.faults.network import Way
from tests.faults.process import NETWORK, SOCKET

MODEL = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
WAIT_S = 30.0
Action = Literal["hold", "kill", "freeze", "damage", "cut", "sleep", "nap"]
"""Wait for `go`; die; stop as a whole, for SIGCONT; damage or cut off what is sent next; wait or stop for a while."""


@dataclass
class _Worker:
    """One life of a worker. `said` brings `armed` and `at`, `cancels` when each cancel came, in s."""

    connection: socket.socket
    pid: int
    said: queue.Queue[str] = field(default_factory=queue.Queue)
    cancels: queue.Queue[float] = field(default_factory=queue.Queue)

    def tell(self, line: str) -> None:
        self.connection.sendall(f"{line}\n".encode())

    def expect(self, word: str) -> None:
        """Wait for it; what else was said is forgotten."""
        while (said := self.said.get(timeout=WAIT_S)) != word:
            assert said != "gone", "the worker is gone"


class StepControl:
    """Where the workers of `tests.faults.process` come for orders. One order at a time to each."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is where they come; None where this world has no such workers."""
        self._workers: dict[str, _Worker] = {}
        self._changed = threading.Condition()
        self._server = socket.socket(socket.AF_UNIX)
        if path is not None:
            self._server.bind(str(path))
            self._server.listen()
            threading.Thread(target=self._welcome, name="steps", daemon=True).start()

    def arm(self, worker_id: str, step: Step, action: Action, layer: int = 0, seconds: float = 0.0) -> None:
        """What happens to a worker at its next such step; takes the place of what was to happen before."""
        worker = self._of(worker_id)
        worker.tell(f"arm {step.value} {layer} {action} {seconds}")
        worker.expect("armed")  # it may be at an earlier step that nobody waited for

    def weather(
        self,
        worker_id: str,
        way: Way,
        what: Literal["open", "held", "cut"] = "open",
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
    ) -> None:
        """What becomes of the bytes on one of a worker's ways, from now on: late, kept back, or cut off."""
        worker = self._of(worker_id)
        worker.tell(f"net {way} {what} {delay_s} {jitter_s}")
        worker.expect("armed")

    def reached(self, worker_id: str) -> int:
        """Wait until it is there; its process id."""
        worker = self._of(worker_id)
        assert worker.said.get(timeout=WAIT_S) == "at"
        return worker.pid

    def forget_cancels(self, worker_id: str) -> None:
        worker = self._of(worker_id)
        while not worker.cancels.empty():
            worker.cancels.get_nowait()

    def cancelled(self, worker_id: str) -> float:
        """When the next cancel came to the worker, by `time.monotonic`, which all processes of a host share; waits."""
        return self._of(worker_id).cancels.get(timeout=WAIT_S)

    def go(self, worker_id: str) -> None:
        """End a hold."""
        self._of(worker_id).tell("go")

    def are_here(self) -> list[str]:
        """Workers that take orders now."""
        with self._changed:
            return sorted(self._workers)

    def pid(self, worker_id: str) -> int:
        return self._of(worker_id).pid

    def close(self) -> None:
        self._server.close()

    def _of(self, worker_id: str) -> _Worker:
        with self._changed:
            assert self._changed.wait_for(lambda: worker_id in self._workers, WAIT_S), f"{worker_id} is away"
            return self._workers[worker_id]

    def _welcome(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r") as lines:
            worker_id, pid = next(lines).split()
            worker = _Worker(connection, int(pid))
            with self._changed:
                self._workers[worker_id] = worker
                self._changed.notify_all()
            try:
                for line in lines:
                    kind, _, value = line.strip().partition(" ")
                    if kind == "cancelled":
                        worker.cancels.put(float(value))
                    else:
                        worker.said.put(kind)
            except OSError:
                pass  # it was killed
            worker.said.put("gone")
        with self._changed:
            if self._workers.get(worker_id) is worker:
                del self._workers[worker_id]


@dataclass(frozen=True)
class World:
    """A running cluster of processes, and what may happen to them."""

    cluster: Cluster
    steps: StepControl

    @property
    def target(self) -> str:
        return self.cluster.endpoints.grpc

    def client(self, timeout_s: float = 60.0) -> Client:
        return Client(self.target, timeout_s=timeout_s)

    def info(self) -> ServerInfo:
        with self.client() as client:
            return client.server_info()

    def kill(self, name: str) -> None:
        """`kill -9` of a worker or of the `router`."""
        os.kill(self.pid(name), signal.SIGKILL)

    def pid(self, name: str) -> int:
        """Of a worker or of the `router`."""
        return self.cluster.launcher.pids()[name]

    @contextmanager
    def slowed(self, name: str, share: float = 0.8) -> Iterator[None]:
        """A process that is given no time for a `share` of every 50 ms, as on a host that is overloaded."""
        pid, over = self.pid(name), threading.Event()

        def slow() -> None:
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.05 * share)
                os.kill(pid, signal.SIGCONT)
                over.wait(0.05 * (1 - share))

        thread = threading.Thread(target=slow, name=f"slow-{name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(WAIT_S)

    def wait_until(self, condition: Callable[[ServerInfo], bool], timeout_s: float = WAIT_S) -> None:
        deadline, pause, info = time.monotonic() + timeout_s, threading.Event(), None
        while time.monotonic() < deadline:
            with contextlib.suppress(UnavailableError):  # the router is being started again
                if condition(info := self.info()):
                    return
            pause.wait(0.05)  # between two questions to a server that has nothing to subscribe to
        pytest.fail(f"not within {timeout_s} s: {info}")

    def wait_until_nothing_is_held(self, timeout_s: float) -> None:
        self.wait_until(nothing_is_held, timeout_s)

    def wait_until_whole(self, timeout_s: float = WAIT_S) -> None:
        """Every worker is there, every pair by which prompts go is up, and nothing is held for anybody."""
        num_workers = len(worker_specs(self.cluster.config))
        pools = self.cluster.config
        num_pairs = pools.prefill.num_workers * pools.decode.num_workers
        self.wait_until(
            lambda info: (
                sum(w.connected for w in info.workers) == num_workers
                and sum(pair.up for pair in info.pairs if goes_to_decode(pair)) == num_pairs
                and nothing_is_held(info)
            ),
            timeout_s,
        )


def goes_to_decode(pair: PairInfo) -> bool:
    """Others, by which prefill workers are brought what a decode worker wrote, come and go."""
    return pair.prefill_worker.startswith("prefill")


def nothing_is_held(info: ServerInfo) -> bool:
    return info.num_queued == info.num_running == 0 and all(
        w.num_free_blocks == w.num_blocks and w.num_running == w.num_waiting == 0 for w in info.workers if w.connected
    )


QUICK = TransferConfig(lease_s=2.0, silence_timeout_s=1.5, keepalive_s=0.3)


@contextmanager
def world(
    num_prefill: int = 2,
    num_decode: int = 2,
    *,
    engine: EngineConfig | None = None,
    transfer: TransferConfig = QUICK,
    max_attempts: int = 6,
    proxied: bool = False,
) -> Iterator[World]:
    """Processes with little patience and little memory; none is left afterwards.

    `proxied`: workers reach each other and the router through proxies, so that `steps.weather` may change.
    """
    engine = engine or EngineConfig(num_blocks=512, max_num_batched_tokens=64, num_threads=1, device="cpu")
    config = ClusterConfig(
        model=MODEL,
        launcher="subprocess",
        log_level="error",
        prefill=PoolConfig(num_workers=num_prefill),
        decode=PoolConfig(num_workers=num_decode),
        engine=engine,
        transfer=transfer,
        router=RouterConfig(
            grpc_port=0,
            http_port=0,
            dispatch=DispatchConfig(max_attempts=max_attempts),
            placement=PlacementConfig(disaggregate="require"),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        control = StepControl(Path(folder) / "steps")
        with environment({SOCKET: str(Path(folder) / "steps"), NETWORK: "1" if proxied else ""}):
            cluster = Cluster(config, SubprocessLauncher("tests.faults.process"))
            try:
                cluster.start()
                made = World(cluster, control)
                made.wait_until_whole()
                yield made
            finally:
                cluster.close()
                control.close()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield

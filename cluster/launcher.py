"""Starts and restarts processes: the interface, and the launcher that needs no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Protocol

from cluster.config import from_json, to_json
from cluster.spec import Endpoints, RouterSpec, WorkerSpec
from core.errors import UnavailableError

RESTART_DELAYS_S = (0.1, 0.5, 2.0, 5.0)
"""Waited before a restart, by the number of exits in a row that came within `STABLE_S` of their start."""
STABLE_S = 30.0


class Launcher(Protocol):
    """Owns the processes it started: a process that dies is started again until `stop_worker` or `close`."""

    def start_router(self, spec: RouterSpec, deadline_s: float) -> Endpoints:
        """Start the router and wait until it is bound. Raises UnavailableError with the reason."""

    def start_worker(self, spec: WorkerSpec) -> None:
        """Start a worker; it registers with the router once it has loaded."""

    def stop_worker(self, worker_id: str, drain_timeout_s: float) -> None:
        """Let the worker finish what it has, at most so long, then end it for good."""

    def pids(self) -> dict[str, int]:
        """Process ids by worker id, the router under `router`; those that run now."""

    def failure(self) -> str | None:
        """Why the cluster can't come up, once that is certain (a worker that fails at each start), else None."""

    def close(self) -> None:
        """End everything; returns when no process is left."""


class SubprocessLauncher:
    """Plain child processes of this one: tests, one-GPU machines, debugging. They die with their parent."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}
        self._endpoints: Endpoints | None = None

    def start_router(self, spec: RouterSpec, deadline_s: float) -> Endpoints:
        child = self._children["router"] = _Child("router", ["router"], to_json(spec))
        self._endpoints = from_json(Endpoints, child.first_line(deadline_s))
        return self._endpoints

    def start_worker(self, spec: WorkerSpec) -> None:
        if self._endpoints is None:
            raise UnavailableError("start the router before its workers")
        arguments = ["worker", self._endpoints.grpc]
        self._children[spec.worker_id] = _Child(spec.worker_id, arguments, to_json(spec))

    def stop_worker(self, worker_id: str, drain_timeout_s: float) -> None:
        self._children.pop(worker_id).stop(drain_timeout_s + 5)

    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self._children.items() if child.alive}

    def failure(self) -> str | None:
        return next((child.failure for child in self._children.values() if child.failure), None)

    def close(self) -> None:
        children = list(self._children.values())
        self._children.clear()
        for child in children:
            child.stop(0)


class _Child:
    """One supervised process. Its specification goes in on stdin, its first line comes out on stdout."""

    def __init__(self, name: str, arguments: list[str], spec: str) -> None:
        self.name = name
        self.failure: str | None = None
        self._command = [sys.executable, "-m", "cluster.process", *arguments]
        self.spec = spec
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no restart once `_stopping` is set
        self._started, self._line = threading.Event(), ""
        self._process = self._spawn()
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervise-{name}", daemon=True)
        self._supervisor.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def first_line(self, deadline_s: float) -> str:
        if not self._started.wait(deadline_s) or not self._line:
            raise UnavailableError(self.failure or f"{self.name} did not start within {deadline_s:g} s")
        return self._line

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` (0: at once)."""
        with self._lock:
            self._stopping.set()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM if grace_s else signal.SIGKILL)
        try:
            self._process.wait(grace_s or 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._supervisor.join(5)

    def _spawn(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(BrokenPipeError), _pipe(process.stdin) as stdin:
            stdin.write(self.spec)
        return process

    def _supervise(self) -> None:
        num_quick_exits = 0
        while True:
            started_at = time.monotonic()
            with _pipe(self._process.stdout) as stdout:
                self._line = self._line or stdout.readline().strip()
                self._started.set()
                code = self._process.wait()
            if self._stopping.is_set():
                return
            num_quick_exits = num_quick_exits + 1 if time.monotonic() - started_at < STABLE_S else 0
            if num_quick_exits >= len(RESTART_DELAYS_S):
                self.failure = f"{self.name} ended {num_quick_exits} times in a row, last with code {code}"
            if self._stopping.wait(RESTART_DELAYS_S[min(num_quick_exits, len(RESTART_DELAYS_S)) - 1]):
                return
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._spawn()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # asked for with PIPE
    return pipe

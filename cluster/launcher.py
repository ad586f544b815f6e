"""Starts and restarts processes: the interface, and the launcher that needs no Ray."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any, Protocol

from cluster.config import from_json, to_json
from cluster.spec import Endpoints, RouterSpec, Started, WorkerSpec
from core.errors import UnavailableError

log = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.1, 0.5, 2.0, 5.0)
"""Waited before a restart: the longer, the more exits in a row came within `STABLE_S` of their start."""
STABLE_S = 30.0
KILL_TIMEOUT_S = 5.0


def router_name(index: int) -> str:
    """The name of the process of one of the routers."""
    return f"router-{index}" if index else "router"


def nth_router(spec: RouterSpec, index: int) -> RouterSpec:
    """The specification of one of the routers: each has ports of its own."""
    ports = {name: getattr(spec.config, name) for name in ("grpc_port", "http_port", "registry_port")}
    own: dict[str, Any] = {name: port + index if port else 0 for name, port in ports.items()}
    return replace(spec, config=replace(spec.config, **own))


def registries(endpoints: Endpoints) -> str:
    """Where workers register: at every router."""
    return ",".join(each.registry for each in (endpoints, *endpoints.others))


class Launcher(Protocol):
    """Owns the processes it started: a process that dies is started again until `stop_worker` or `close`."""

    def start(self, router: RouterSpec, workers: Sequence[WorkerSpec], deadline_s: float) -> Endpoints:
        """Start all of them and wait until the router is bound. Raises UnavailableError with the reason."""

    def start_worker(self, spec: WorkerSpec) -> None:
        """Start a worker; it registers with the router once it has loaded."""

    def stop_worker(self, worker_id: str, drain_timeout_s: float) -> None:
        """Let the worker finish what it has, at most so long, then end it for good."""

    def pids(self) -> dict[str, int]:
        """Process ids by worker id, the router under `router`; those that run now."""

    def failure(self, *, final: bool = False) -> str | None:
        """Why the cluster can't come up, once that is certain (a worker that fails at each start), else None.

        With `final`, time is up: what is still missing counts too.
        """

    def close(self) -> None:
        """End everything; returns when no process is left."""


class SubprocessLauncher:
    """Plain child processes of this one: tests, one-GPU machines, debugging. They die with their parent.

    `module` is run in each of them, and takes what `cluster.process` takes.
    """

    def __init__(self, module: str = "cluster.process") -> None:
        self._module = module
        self._children: dict[str, _Child] = {}
        self._endpoints: Endpoints | None = None

    def start(self, router: RouterSpec, workers: Sequence[WorkerSpec], deadline_s: float) -> Endpoints:
        specs = {router_name(index): nth_router(router, index) for index in range(router.num_routers)}
        for name, spec in specs.items():
            self._children[name] = _Child(name, self._command("router"), to_json(spec))
        ends_at = time.monotonic() + deadline_s
        first, *others = [self._bind(name, spec, ends_at) for name, spec in specs.items()]
        self._endpoints = replace(first, others=tuple(others))
        for worker in workers:
            self.start_worker(worker)
        return self._endpoints

    def _bind(self, name: str, router: RouterSpec, ends_at: float) -> Endpoints:
        """Where a router answers; started again, it will answer there as well."""
        child = self._children[name]
        endpoints = child.endpoints(max(0.0, ends_at - time.monotonic()))
        grpc, http, registry = (
            int(address.rpartition(":")[2]) for address in (endpoints.grpc, endpoints.http, endpoints.registry)
        )  # where workers and clients look for it
        fixed = replace(router.config, grpc_port=grpc, http_port=http, registry_port=registry)
        child.spec = to_json(replace(router, config=fixed))
        return endpoints

    def start_worker(self, spec: WorkerSpec) -> None:
        if self._endpoints is None:
            raise UnavailableError("start the router before its workers")
        command = self._command("worker", registries(self._endpoints))
        self._children[spec.worker_id] = _Child(spec.worker_id, command, to_json(spec))

    def stop_worker(self, worker_id: str, drain_timeout_s: float) -> None:
        self._children.pop(worker_id).stop(drain_timeout_s + 5)

    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self._children.items() if child.alive}

    def failure(self, *, final: bool = False) -> str | None:  # noqa: ARG002 (a process is never just missing)
        return next((child.failure for child in self._children.values() if child.failure), None)

    def close(self) -> None:
        children = list(self._children.values())
        self._children.clear()
        for child in children:
            child.stop(0)

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", self._module, *arguments]


class _Child:
    """One supervised process. Its specification goes in on stdin, which stays open for as long as this process lives;
    its `Started` comes out on stdout."""

    def __init__(self, name: str, command: list[str], spec: str) -> None:
        self.name = name
        self.spec = spec
        self.failure: str | None = None
        self._command = command
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # no restart once `_stopping` is set
        self._answer: Started | None = None
        self._answered = threading.Event()
        self._process = self._spawn()
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervise-{name}", daemon=True)
        self._supervisor.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def endpoints(self, deadline_s: float) -> Endpoints:
        """Where it answers, once it does. Raises UnavailableError where it can't start, or takes too long."""
        self._answered.wait(deadline_s)
        if self._answer is None:
            raise UnavailableError(f"{self.name} did not start within {deadline_s:g} s")
        if self._answer.endpoints is None:
            raise UnavailableError(f"{self.name} can't start: {self._answer.error}")
        return self._answer.endpoints

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` (0: at once)."""
        with self._lock:
            self._stopping.set()
        if grace_s:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self._process.kill()  # which does nothing to a process that has ended
        self._supervisor.join(KILL_TIMEOUT_S)

    def _spawn(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # a terminal's ctrl-C goes to this process, which decides
        )
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).write(f"{self.spec}\n")
            _pipe(process.stdin).flush()
        return process

    def _supervise(self) -> None:
        num_quick_exits = 0
        while True:
            started_at = time.monotonic()
            code = self._follow(self._process)
            if self._stopping.is_set():
                return
            num_quick_exits = num_quick_exits + 1 if time.monotonic() - started_at < STABLE_S else 1
            if self.failure is None and num_quick_exits >= len(RESTART_DELAYS_S):
                self.failure = f"{self.name} ended {num_quick_exits} times in a row, last with code {code}"
            log.warning("%s ended with code %d and is started again", self.name, code)
            if self._stopping.wait(RESTART_DELAYS_S[min(num_quick_exits, len(RESTART_DELAYS_S)) - 1]):
                return
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._spawn()

    def _follow(self, process: subprocess.Popen[str]) -> int:
        """Hear what the process says, until it has ended; its exit code."""
        with _pipe(process.stdout) as stdout:
            line = stdout.readline()
        self._answer = from_json(Started, line) if line else Started(error="it ended before it had started")
        self.failure = f"{self.name} can't start: {self._answer.error}" if line and self._answer.error else None
        self._answered.set()
        code = process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what it never read
            _pipe(process.stdin).close()
        return code


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # asked for with PIPE
    return pipe

"""Entry of a process that the subprocess launcher starts: `python -m cluster.process router | worker ROUTER_ADDRESS`.

The specification comes as one JSON line on stdin, `Started` goes out as one on stdout. The end of stdin means that the
launcher is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from cluster.config import from_json, to_json
from cluster.spec import RouterSpec, Started, WorkerSpec
from core.errors import ConfigError, PenstockError

log = logging.getLogger(__name__)


class Process(Protocol):
    def drain(self) -> None:
        """Finish what there is, take nothing new; returns at once."""

    def wait(self) -> int:
        """Until it has ended by itself or through drain; the exit code."""


def end_with_parent() -> None:
    """End this process when stdin does: the parent holds its other end, and lets go of it however it ends."""
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold at the end of a process
        pass
    os._exit(1)


def prepare_for_torch() -> None:
    """What torch reads when it is loaded. A user's own settings win.

    OpenMP's threads sleep while they wait, for workers of a host share its cores: on two cores with one of them busy,
    two spinning threads took ten times as long for a token. And a peer that dies is news for our log, in one line; the
    C++ stack that torch would print belongs to nobody's fault.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def run(process: Process) -> int:
    """Drain on SIGTERM; the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: process.drain())
    done: list[int] = []
    waiter = threading.Thread(target=lambda: done.append(process.wait()), name="wait", daemon=True)
    waiter.start()
    while waiter.is_alive():  # a join without a limit would keep Python's signal handlers from running
        waiter.join(3600)
    return done[0] if done else 1


Start = Callable[[list[str], str], tuple[Started, Process]]
"""From the arguments and the specification as JSON to a process that runs. Raises PenstockError or OSError."""


def start(arguments: list[str], spec: str) -> tuple[Started, Process]:
    match arguments:
        case ["router"]:
            from cluster.router_process import RouterProcess  # a router never loads what a worker needs, torch first

            router = RouterProcess(from_json(RouterSpec, spec), node_host="127.0.0.1")
            return Started(router.start()), router
        case ["worker", address]:
            prepare_for_torch()
            from cluster.worker_process import WorkerProcess

            worker = WorkerProcess(from_json(WorkerSpec, spec), router_address=lambda: address)
            worker.start()
            return Started(), worker
        case _:
            raise ConfigError("arguments", arguments, "must be: router | worker ROUTER_ADDRESS")


def main(arguments: list[str], start: Start = start) -> int:
    """The exit code; 2 where the process can't start and has said why."""
    spec, out = sys.stdin.readline(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    try:
        started, process = start(arguments, spec)
    except (PenstockError, OSError) as error:
        log.error("%s can't start: %s", " ".join(arguments), error)
        print(to_json(Started(error=str(error))), file=out, flush=True)
        return 2
    print(to_json(started), file=out, flush=True)
    return run(process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

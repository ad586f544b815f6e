"""Entry of a process that the subprocess launcher starts: `python -m cluster.process router|worker ADDRESS`.

The specification comes as JSON on stdin. A router answers with its endpoints, one JSON line on stdout.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from typing import Protocol

from cluster.config import from_json, to_json
from cluster.spec import RouterSpec, WorkerSpec

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process(Protocol):
    def drain(self) -> None:
        """Finish what there is, take nothing new; returns at once."""

    def wait(self) -> int:
        """Until it has ended by itself or through drain; the exit code."""


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends, however it ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def run(process: Process) -> int:
    """Drain on SIGTERM (a terminal's ctrl-C goes to the parent, which decides); the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.drain())
    done: list[int] = []
    waiter = threading.Thread(target=lambda: done.append(process.wait()), name="wait", daemon=True)
    waiter.start()
    while waiter.is_alive():  # a join without a limit would keep Python's signal handlers from running
        waiter.join(3600)
    return done[0] if done else 1


def main(arguments: list[str]) -> int:
    die_with_parent()
    match arguments:
        case ["router"]:
            from cluster.router_process import RouterProcess  # a router never loads what a worker needs, torch first

            router = RouterProcess(from_json(RouterSpec, sys.stdin.read()), node_host="127.0.0.1")
            print(to_json(router.start()), flush=True)
            return run(router)
        case ["worker", address]:
            from cluster.worker_process import WorkerProcess

            worker = WorkerProcess(from_json(WorkerSpec, sys.stdin.read()), router_address=lambda: address)
            worker.start()
            return run(worker)
        case _:
            print("usage: python -m cluster.process router | worker ROUTER_ADDRESS", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

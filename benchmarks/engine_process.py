"""An engine in a process of its own, which stands still while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.driver import Run

CLOSE_S = 10.0


class EngineError(Exception):
    """An engine did not start, ended, was silent for too long, or says itself that it failed."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to start one. `label` names it in rows."""

    label: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    """What sets it apart from what one would expect of its label."""
    fallback: EngineSpec | None = None
    """Another one to take its place, where it does not start."""
    start_timeout_s: float = 120.0
    answer_timeout_s: float = 180.0


class EngineProcess:
    """Speaks the protocol of `benchmarks.peers.driver`.

    Process groups are how all of an engine's processes are stopped and continued together. A group that is left behind
    is continued and hung up on by the kernel.
    """

    def __init__(self, spec: EngineSpec, log: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the process, and does not wait for it."""
        self.spec = spec
        self._log = log
        self._clock = clock
        self._started_s = clock()
        self._pending = b""
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                spec.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **spec.environment},
                process_group=0,
                bufsize=0,
            )
        self.name = ""
        self.load_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> None:
        answer = self._answer(self.spec.start_timeout_s)
        self.name, self.load_s = str(answer["engine"]), float(answer["load_s"])

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Seconds from the start of the process to its first token. Call it once, instead of `wait_ready`."""
        self.wait_ready()
        self.run([prompt], 1)
        return self._clock() - self._started_s

    def run(self, prompts: Sequence[Sequence[int]], num_outputs: int) -> Run:
        return Run(**self._ask({"prompts": [list(prompt) for prompt in prompts], "outputs": num_outputs}))

    def peak_rss_bytes(self) -> int:
        return int(self._ask({"memory": True})["peak_rss_bytes"])

    def pause(self) -> None:
        """When this returns, the process has stopped, or ended."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def hang_up(self) -> None:
        """Ask it to end, and don't wait for it."""
        self.resume()
        if self._process.stdin:
            self._process.stdin.close()

    def close(self) -> None:
        """End it, whatever state it is in, and all that it started."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._error("it is gone") from error
        return self._answer(self.spec.answer_timeout_s)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline_s = self._clock() + timeout_s
        while b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline_s - self._clock()))[0]:
                self._signal(signal.SIGKILL)
                raise self._error(f"no answer within {timeout_s:.0f} s")
            if not (data := self._process.stdout.read(1 << 16)):
                raise self._error(f"it ended with code {self._process.wait()}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _error(self, reason: str) -> EngineError:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            cause = root_cause(log.read().decode(errors="replace"))
        known = cause is None or cause in reason
        return EngineError(f"{self.spec.label}: {reason}{'' if known else f' ({cause})'}")


def root_cause(log: str) -> str | None:
    """The first error that a log of tracebacks tells of; those after it mostly say that there was one."""
    for line in log.splitlines():
        if found := re.search(r"\b(\w+(?:Error|Exception)): (.{1,400})", line):
            return found[0]
    return None


def own_spec(label: str, model: Path, root: Path, **config: object) -> EngineSpec:
    """Penstock's engine without its prefix cache; `config` are fields of `EngineConfig`."""
    fields = json.dumps({"enable_prefix_caching": False, **config})
    command = (sys.executable, "-m", "benchmarks.peers.run_penstock", str(model), fields)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return EngineSpec(label, command, {"PYTHONPATH": path})

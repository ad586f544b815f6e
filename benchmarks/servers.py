"""Whole servers, ours and vLLM's, that are started, stand still while another one is measured, and end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.engine_process import EngineError, root_cause
from benchmarks.serve.http_stream import HttpError, HttpStream, Url, request_bytes

ROOT = Path(__file__).resolve().parent.parent
POLL_S, ANSWER_S, CLOSE_S = 0.25, 5.0, 20.0
MAX_MODEL_LEN = 2048
SERVED_NAME = "served"
"""Of the model, by every server."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start one. In `command`, {port} stands for the port of its HTTP. `keep`: it takes long to start, so it
    stands still between two turns instead of ending."""

    label: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    keep: bool = False
    start_timeout_s: float = 120.0


class Server:
    """Its processes are one group. Raises `EngineError` where it does not start, or ends."""

    def __init__(self, spec: ServerSpec, log: Path) -> None:
        self.spec = spec
        self._log = log
        port = free_port()
        self.base_url = f"http://127.0.0.1:{port}"
        command = [part.format(port=port) for part in spec.command]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                process_group=0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> float:
        """Seconds until /health says that it can serve."""
        begun_s = time.perf_counter()
        while (waited_s := time.perf_counter() - begun_s) < self.spec.start_timeout_s:
            if self._process.poll() is not None:
                raise self._error(f"it ended with code {self._process.returncode}")
            if asyncio.run(self._healthy()):
                return waited_s
            time.sleep(POLL_S)
        raise self._error(f"not ready within {self.spec.start_timeout_s:.0f} s")

    async def _healthy(self) -> bool:
        url = Url.parse(self.base_url, "/health")
        with contextlib.suppress(HttpError, TimeoutError):
            async with asyncio.timeout(ANSWER_S), HttpStream(url, request_bytes("GET", url, {})) as stream:
                return stream.status == 200
        return False

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _error(self, reason: str) -> EngineError:
        cause = root_cause(self._log.read_text(errors="replace"))
        return EngineError(f"{self.spec.label}: {reason}{f' ({cause})' if cause else ''}; see {self._log.name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def penstock_server(label: str, model: Path, *, mixed: bool, flags: tuple[str, ...] = ()) -> ServerSpec:
    """One prefill and one decode worker, which share the cores, or one mixed worker that has them all."""
    pools = ("--prefill.num-workers", "0", "--decode.num-workers", "0", "--mixed.num-workers", "1") if mixed else ()
    start = "import sys; from cluster.cli import main; sys.exit(main(sys.argv[1:]))"
    command = (
        *(sys.executable, "-c", start, "serve", "--model", str(model), "--launcher", "subprocess"),
        *("--router.http-port", "{port}", "--router.grpc-port", "0", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--served-model-name", SERVED_NAME, "--no-enable-prefix-caching", "--startup-timeout-s", "300"),
        *(*pools, *flags),
    )
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH")]))
    return ServerSpec(label, command, {"PYTHONPATH": path}, start_timeout_s=320.0)


def vllm_server(
    label: str, python: Path, model: Path, cache: Path, num_threads: int, batched_tokens: int | None
) -> ServerSpec:
    """On all cores; with `batched_tokens` prompts are cut so that a step computes at most so many tokens."""
    limits = ("--max-num-batched-tokens", str(batched_tokens), "--max-num-seqs", "64") if batched_tokens else ()
    command = (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", "{port}", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--served-model-name", SERVED_NAME, "--no-enable-prefix-caching", "--disable-uvicorn-access-log", *limits),
    )
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return ServerSpec(label, command, environment, keep=True, start_timeout_s=420.0)


def described(spec: ServerSpec) -> str:
    """The command for a result, without telling whose machine it was."""
    words = [Path(word).name if word.startswith("/") else word for word in spec.command]
    return json.dumps(words)

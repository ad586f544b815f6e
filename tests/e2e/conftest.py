"""A real cluster, as a user has it: `penstock serve` with Ray, one router, one prefill and one decode worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock import Client, ServerInfo

MODEL = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
START_TIMEOUT_S = 120.0
MAX_TIE = 1e-3
"""Logits this near may be told apart differently by float32 arithmetic in another order."""


@dataclass(frozen=True)
class Serving:
    """A running `penstock serve`."""

    process: subprocess.Popen[str]
    grpc: str
    http: str

    def client(self) -> Client:
        return Client(self.grpc, timeout_s=90.0)

    def info(self) -> ServerInfo:
        with self.client() as client:
            return client.server_info()

    def pid(self, worker_id: str) -> int:
        """The process that listens where the worker says it does. Raises LookupError while the worker is away."""
        addresses = [w.address for w in self.info().workers if w.worker_id == worker_id and w.connected]
        if not addresses:
            raise LookupError(worker_id)
        port = int(addresses[0].rpartition(":")[2])
        for process in [*psutil.Process(self.process.pid).children(recursive=True), *psutil.process_iter()]:
            try:
                if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections("tcp")):
                    return process.pid
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        raise LookupError(worker_id)

    def wait_until(self, condition: Callable[[ServerInfo], bool], timeout_s: float = 30.0) -> ServerInfo:
        """The first state that meets the condition; fails with the last one seen."""
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while not condition(info := self.info()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_s} s: {info}")
            pause.wait(0.05)  # between two questions to a server that has nothing to subscribe to
        return info

    def wait_until_nothing_is_held(self) -> None:
        """Every worker is there, idle, and has all its blocks."""
        self.wait_until(
            lambda info: (
                len(info.workers) >= 1
                and info.num_queued == info.num_running == 0
                and all(
                    w.connected and w.num_free_blocks == w.num_blocks and w.num_running == w.num_waiting == 0
                    for w in info.workers
                )
            )
        )


def start(*flags: str) -> Serving:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(MODEL), "--json"]
    ports = ["--router.grpc-port", "0", "--router.http-port", "0"]
    process = subprocess.Popen([*command, *ports, *flags], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    timer.cancel()
    if not line:
        pytest.fail(f"`penstock serve` ended with {process.wait(10)}")
    endpoints = json.loads(line)
    return Serving(process, endpoints["grpc"], endpoints["http"])


def stop(serving: Serving) -> list[int]:
    """Ctrl-C; the pids of the processes that were left behind."""
    family = psutil.Process(serving.process.pid).children(recursive=True)
    serving.process.send_signal(signal.SIGINT)
    serving.process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=10)
    return [process.pid for process in alive]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Serving]:
    serving = start("--router.placement.disaggregate", "require")  # short prompts would run on one worker
    try:
        yield serving
        left = stop(serving)
    finally:
        serving.process.kill()
    assert left == [], f"ctrl-C left processes behind: {left}"


@pytest.fixture
def cluster(ray_cluster: Serving) -> Iterator[Serving]:
    """The shared cluster, checked after each test: nothing may be held for anybody."""
    yield ray_cluster
    ray_cluster.wait_until_nothing_is_held()


@pytest.fixture(scope="session")
def colocated() -> Iterator[Serving]:
    """One mixed worker, without Ray and without a transfer."""
    pools = ["--prefill.num-workers", "0", "--decode.num-workers", "0", "--mixed.num-workers", "1"]
    serving = start("--launcher", "subprocess", *pools)
    try:
        yield serving
        left = stop(serving)
    finally:
        serving.process.kill()
    assert left == [], f"ctrl-C left processes behind: {left}"


class Oracle:
    """transformers in float32 on the same checkpoint."""

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self._model.eval()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def check_greedy(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> int:
        """Each token must be the reference's best after those before it; the number of near-ties taken otherwise."""
        ids = torch.tensor([[*prompt, *output]])
        logits = self._model(ids).logits[0, len(prompt) - 1 : -1]
        gaps = logits.max(dim=1).values - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        worst = float(gaps.max())
        assert worst <= MAX_TIE, f"token {int(gaps.argmax())} of {len(output)} is {worst} from the best"
        return int((gaps > 0).sum())


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    torch.set_num_threads(1)
    return Oracle()

"""The launcher without Ray, over real processes: what dies comes back, what can't start says why, and nobody stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest

from cluster.cluster import Cluster
from cluster.config import ClusterConfig, PoolConfig, to_json
from cluster.launcher import SubprocessLauncher
from cluster.spec import RouterSpec, WorkerSpec
from core.errors import CheckpointError, UnavailableError
from core.messages import WorkerRole
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from penstock import Client
from router.config import RouterConfig

MODEL = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
ENGINE = EngineConfig(num_threads=1, num_blocks=64, device="cpu")
FREE = RouterConfig(grpc_port=0, http_port=0)
WAIT_S = 30.0
ROUTER = RouterSpec(MODEL, "tiny", None, FREE, "error")
WORKER = WorkerSpec(
    "w0", WorkerRole.MIXED, MODEL, "tiny", ENGINE, (), TransferConfig(), "127.0.0.1", 1.0, 0.0, 30.0, "error"
)


def config(model: Path = MODEL, engine: EngineConfig = ENGINE) -> ClusterConfig:
    nobody = PoolConfig()
    return ClusterConfig(
        model=model,
        launcher="subprocess",
        startup_timeout_s=90.0,
        log_level="error",
        prefill=nobody,
        decode=nobody,
        mixed=PoolConfig(num_workers=1),
        engine=engine,
        router=FREE,
    )


def wait_until_gone(*pids: int) -> None:
    """Or fail: a process that nobody waited for counts as gone."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(alive, timeout=WAIT_S)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


# ---- a cluster that runs


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(config()) as cluster:
        yield cluster
        pids = cluster.launcher.pids().values()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoints.grpc, timeout_s=60.0) as client:
        yield client


def complete(client: Client) -> str:
    """Waits in the router's queue for a worker, where there is none."""
    return client.generate("def __init__(self", max_tokens=8, temperature=0).text


@pytest.mark.timeout(150)
def test_a_killed_worker_comes_back_and_serves(cluster: Cluster, client: Client) -> None:
    text, pids = complete(client), cluster.launcher.pids()
    os.kill(pids["mixed-0"], signal.SIGKILL)
    wait_until_gone(pids["mixed-0"])
    assert complete(client) == text
    now = cluster.launcher.pids()
    assert now["mixed-0"] != pids["mixed-0"]
    assert now["router"] == pids["router"]


@pytest.mark.timeout(150)
def test_a_worker_that_is_asked_to_end_finishes_what_it_has(cluster: Cluster, client: Client) -> None:
    complete(client)
    pid = cluster.launcher.pids()["mixed-0"]
    generation = client.generate("import os", max_tokens=200, temperature=0, ignore_eos=True)
    next(generation)
    os.kill(pid, signal.SIGTERM)
    for _ in generation:
        pass
    assert len(generation.token_ids) == 200
    assert generation.stats is not None
    assert generation.stats.num_attempts == 1
    wait_until_gone(pid)
    assert complete(client)


@pytest.mark.timeout(150)
def test_a_killed_router_comes_back_where_it_was(cluster: Cluster, client: Client) -> None:
    text, pids = complete(client), cluster.launcher.pids()
    os.kill(pids["router"], signal.SIGKILL)
    wait_until_gone(pids["router"])
    with grpc.insecure_channel(cluster.endpoints.grpc) as channel:
        grpc.channel_ready_future(channel).result(WAIT_S)
    with Client(cluster.endpoints.grpc, timeout_s=60.0) as client:
        assert complete(client) == text
    now = cluster.launcher.pids()
    assert now["router"] != pids["router"]
    assert now["mixed-0"] == pids["mixed-0"], "its workers go on"


# ---- ends


@pytest.fixture
def launcher() -> Iterator[SubprocessLauncher]:
    launcher = SubprocessLauncher()
    yield launcher
    launcher.close()


def test_close_leaves_no_process(launcher: SubprocessLauncher) -> None:
    launcher.start(ROUTER, [WORKER, replace(WORKER, worker_id="w1")], WAIT_S)
    pids = launcher.pids()
    assert pids.keys() == {"router", "w0", "w1"}
    launcher.close()
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
    assert launcher.pids() == {}


def test_a_worker_that_is_stopped_stays_away(launcher: SubprocessLauncher) -> None:
    launcher.start(ROUTER, [WORKER], WAIT_S)
    pid = launcher.pids()["w0"]
    launcher.stop_worker("w0", 1.0)
    assert not psutil.pid_exists(pid)
    assert launcher.pids().keys() == {"router"}
    assert launcher.failure() is None


PARENT = """
import json, sys
from cluster.config import from_json
from cluster.launcher import SubprocessLauncher
from cluster.spec import RouterSpec, WorkerSpec
launcher = SubprocessLauncher()
launcher.start(from_json(RouterSpec, sys.argv[1]), [from_json(WorkerSpec, sys.argv[2])], 60.0)
print(json.dumps(launcher.pids()), flush=True)
sys.stdin.read()
"""


def test_children_end_with_their_parent_however_it_ends() -> None:
    """The router runs by then, the worker is still loading."""

    command = [sys.executable, "-c", PARENT, to_json(ROUTER), to_json(WORKER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids: dict[str, int] = json.loads(parent.stdout.readline())
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        parent.kill()
        parent.wait(WAIT_S)
        wait_until_gone(*pids.values())


# ---- what can't start


def test_a_folder_without_checkpoint_starts_nothing(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Cluster(config(tmp_path)).start()
    assert children() == before


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The model with its weights cut short."""
    for file in MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 10_000 if file.suffix == ".safetensors" else None])
    return tmp_path


def test_weights_that_are_cut_short_are_named(broken: Path) -> None:
    before = children()
    with pytest.raises(UnavailableError, match=r"can't start: .*/model\.safetensors: "):
        Cluster(config(broken)).start()
    assert children() == before


def test_a_worker_that_fails_at_each_start_says_why() -> None:
    before, started_at = children(), time.monotonic()
    tight = replace(ENGINE, num_blocks=None, kv_cache_memory_gib=1e-6)
    with pytest.raises(UnavailableError, match=r"^mixed-0 can't start: engine\.kv_cache_memory_gib: got 1e-06, must"):
        Cluster(config(engine=tight)).start()
    assert time.monotonic() - started_at < 60, "well before startup_timeout_s"
    assert children() == before


def test_a_router_whose_port_is_taken_says_so(launcher: SubprocessLauncher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = replace(ROUTER, config=replace(FREE, http_port=port))
        with pytest.raises(UnavailableError, match=rf"^router can't start: router\.http_port: got {port}, "):
            launcher.start(taken, [], WAIT_S)


def test_a_router_that_dies_without_a_word_is_told_at_once(launcher: SubprocessLauncher) -> None:
    impossible: RouterSpec = replace(ROUTER, log_level="no such level")
    with pytest.raises(UnavailableError, match=r"^router can't start: it ended before it had started$"):
        launcher.start(impossible, [], WAIT_S)


def test_a_worker_needs_a_router(launcher: SubprocessLauncher) -> None:
    with pytest.raises(UnavailableError, match="start the router before its workers"):
        launcher.start_worker(WORKER)

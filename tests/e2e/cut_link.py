"""Run by test_cut_link.py in a network namespace of its own: two hosts, a link between them that is cut and restored.

The router, a prefill and a decode worker are on the near host, another decode worker is on the far one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cluster.cluster import Cluster
from cluster.config import ClusterConfig, PoolConfig, to_json
from cluster.launcher import SubprocessLauncher, _Child
from cluster.spec import WorkerSpec
from engine.config import EngineConfig
from penstock import Client, ServerInfo
from router.config import DispatchConfig, RouterConfig, SessionConfig
from tests.faults.control import QUICK, StepControl, World
from tests.faults.jobs import all_kinds, run, run_all

NEAR, FAR = "10.77.0.1", "10.77.0.2"
FAR_WORKER = "decode-0"


class Host:
    """A network namespace with a link to this one; gone with its process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._process.stdout.readline()  # it is in its namespace
        pid = self._process.pid
        self.enter = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        run_command("ip", "link", "set", "lo", "up")
        run_command("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
        run_command("ip", "link", "set", "far", "netns", str(pid))
        run_command("ip", "addr", "add", f"{NEAR}/24", "dev", "near")
        run_command("ip", "link", "set", "near", "up")
        run_command(*self.enter, "ip", "link", "set", "lo", "up")
        run_command(*self.enter, "ip", "addr", "add", f"{FAR}/24", "dev", "far")
        self.restore()

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        run_command(*self.enter, "ip", "link", "set", "far", "down")

    def restore(self) -> None:
        run_command(*self.enter, "ip", "link", "set", "far", "up")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)


def run_command(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


class TwoHosts(SubprocessLauncher):
    def __init__(self, far: Host) -> None:
        super().__init__()
        self._far = far

    def start_worker(self, spec: WorkerSpec) -> None:
        if spec.worker_id != FAR_WORKER:
            super().start_worker(spec)
            return
        assert self._endpoints is not None
        command = [*self._far.enter, *self._command("worker", self._endpoints.grpc)]
        self._children[spec.worker_id] = _Child(spec.worker_id, command, to_json(replace(spec, host=FAR)))


def config(model: Path) -> ClusterConfig:
    sessions = SessionConfig(heartbeat_interval_s=0.3, dead_after_s=2.5, connect_timeout_s=1.0)
    router = RouterConfig(
        host=NEAR, grpc_port=0, http_port=0, sessions=sessions, dispatch=DispatchConfig(max_attempts=6)
    )
    return ClusterConfig(
        model=model,
        launcher="subprocess",
        host=NEAR,
        log_level="error",
        prefill=PoolConfig(num_workers=1),
        decode=PoolConfig(num_workers=2),
        engine=EngineConfig(num_blocks=512, max_num_batched_tokens=64, num_threads=1, device="cpu"),
        transfer=QUICK,
        router=router,
    )


def on_the_far_host(info: ServerInfo) -> bool:
    return any(worker.worker_id == FAR_WORKER and worker.num_running > 1 for worker in info.workers)


def main(model: Path) -> None:
    jobs = [{**job, "max_tokens": 150} for job in all_kinds(6, 8)]
    far = Host()
    try:
        with Cluster(config(model), TwoHosts(far)) as cluster, Client(cluster.endpoints.grpc, timeout_s=60.0) as client:
            world = World(cluster, StepControl())
            world.wait_until_whole()
            transports = {pair.decode_worker: pair.transport for pair in world.info().pairs}
            undisturbed = [run(client, job) for job in jobs]
            with ThreadPoolExecutor(1) as threads:
                asked = threads.submit(run_all, client, jobs)
                world.wait_until(on_the_far_host)
                far.cut()
                cut_at = time.monotonic()
                during = asked.result()
                took_s = time.monotonic() - cut_at
            alone = run_all(client, jobs)
            world.wait_until(lambda info: not all(worker.connected for worker in info.workers))
            far.restore()
            world.wait_until_whole()
            after = run_all(client, jobs)
            world.wait_until_nothing_is_held(10.0)
        same = {"during": during, "alone": alone, "after": after}
        told = {name: answers == undisturbed for name, answers in same.items()}
        print(json.dumps({**told, "transports": transports, "took_s": took_s}))
    finally:
        far.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

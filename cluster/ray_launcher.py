"""The launcher for clusters: every process is a Ray actor in a placement group, restarted by Ray."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig, from_json, to_json
from cluster.launcher import nth_router, router_name
from cluster.process import Process, prepare_for_torch
from cluster.spec import Endpoints, RouterSpec, WorkerSpec
from core.errors import UnavailableError

CALL_TIMEOUT_S = 10.0


def drain_on_sigterm(process: Process) -> None:
    """SIGTERM drains, then ends this actor's process. Called in `__init__`, which Ray runs in the main thread."""

    def end() -> None:
        code = process.wait()
        os._exit(code)  # Ray's main loop does not return; everything of ours is closed

    threading.Thread(target=end, name="wait", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: process.drain())


class RouterActor:
    """The router in an actor."""

    def __init__(self, spec: str) -> None:
        from cluster.router_process import RouterProcess  # here, where it runs

        self._router = RouterProcess(from_json(RouterSpec, spec), node_host=_node_address())
        self._endpoints = self._router.start()
        drain_on_sigterm(self._router)

    def endpoints(self) -> str:
        return to_json(self._endpoints)

    def pid(self) -> int:
        return os.getpid()


class WorkerActor:
    """A worker in an actor: started again by Ray, it loads and registers anew."""

    def __init__(self, spec: str, router_names: Sequence[str]) -> None:
        prepare_for_torch()
        from cluster.worker_process import WorkerProcess

        def router_address() -> str:
            found, problem = [], "there is none"
            for name in router_names:
                try:
                    router: Any = ray.get_actor(name)
                    endpoints: str = ray.get(router.endpoints.remote(), timeout=CALL_TIMEOUT_S)
                except (RayError, ValueError) as error:  # ValueError: no actor of that name
                    problem = str(error)
                    continue
                found.append(from_json(Endpoints, endpoints).registry)
            if not found:
                raise ConnectionError(f"no router's actor answers: {problem}")
            return ",".join(found)

        worker = from_json(WorkerSpec, spec)
        self._worker = WorkerProcess(replace(worker, host=worker.host or _node_address()), router_address)
        self._worker.start()
        drain_on_sigterm(self._worker)

    def pid(self) -> int:
        return os.getpid()

    def drain(self) -> None:
        """Returns when nothing is left to do; the process ends at about that moment."""
        self._worker.drain()
        self._worker.wait()


class RayLauncher:
    """Owns its actors and placement groups, and the local Ray where it started one."""

    def __init__(self, config: ClusterConfig) -> None:
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}
        self._router_names = [f"router-{uuid.uuid4().hex}" for _ in range(config.num_routers)]
        self._owns_ray = config.ray_address is None
        pools = {"prefill": config.prefill, "decode": config.decode, "mixed": config.mixed}
        num_cpus = sum(pool.num_workers * pool.num_cpus for pool in pools.values())
        local: dict[str, Any] = {
            "num_cpus": max(math.ceil(num_cpus), os.cpu_count() or 1),
            "resources": {role: pool.num_workers for role, pool in pools.items() if pool.num_workers},
            "include_dashboard": False,
        }
        ray.init(
            address=config.ray_address or "local",
            namespace="penstock",
            log_to_driver=config.log_level in ("debug", "info"),
            logging_level=getattr(logging, config.log_level.upper()),
            **(local if self._owns_ray else {}),
        )

    def start(self, router: RouterSpec, workers: Sequence[WorkerSpec], deadline_s: float) -> Endpoints:
        # no CPU of its own: it must not keep a worker from the node that has just room enough
        routers = []
        for index, name in enumerate(self._router_names):
            actor = _actor(RouterActor, num_cpus=0, name=name).remote(to_json(nth_router(router, index)))
            self._actors[router_name(index)] = actor
            routers.append(actor)
        for worker in workers:  # they load their model while the router starts, then ask where it is
            self.start_worker(worker)
        try:
            told = ray.get([actor.endpoints.remote() for actor in routers], timeout=deadline_s)
            first, *others = [from_json(Endpoints, each) for each in told]
            return replace(first, others=tuple(others))
        except GetTimeoutError as error:
            raise UnavailableError(f"the router did not start within {deadline_s:g} s") from error
        except RayActorError as error:
            raise UnavailableError(f"the router did not start: {_cause(error)}") from error

    def start_worker(self, spec: WorkerSpec) -> None:
        resources = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, spec.role.value: 1.0}
        bundle = {name: share for name, share in resources.items() if share}
        group: PlacementGroup = placement_group([bundle], strategy="STRICT_PACK", name=f"penstock-{spec.worker_id}")
        self._groups[spec.worker_id] = group
        worker = _actor(
            WorkerActor,
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            resources={spec.role.value: 1.0},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        self._actors[spec.worker_id] = worker.remote(to_json(spec), self._router_names)

    def stop_worker(self, worker_id: str, drain_timeout_s: float) -> None:
        worker = self._actors.pop(worker_id)
        with contextlib.suppress(RayError):
            ray.get(worker.drain.remote(), timeout=drain_timeout_s)
        ray.kill(worker)
        remove_placement_group(self._groups.pop(worker_id))

    def pids(self) -> dict[str, int]:
        calls = {name: actor.pid.remote() for name, actor in self._actors.items()}
        pids = {}
        for name, call in calls.items():
            with contextlib.suppress(RayError):
                pids[name] = ray.get(call, timeout=CALL_TIMEOUT_S)
        return pids

    def failure(self, *, final: bool = False) -> str | None:
        for name, group in self._groups.items():
            if final and placement_group_table(group)["state"] != "CREATED":
                return f"no Ray node has {group.bundle_specs[0]} free for {name}"
        for name, actor in self._actors.items():
            try:
                ray.get(actor.pid.remote(), timeout=0)
            except GetTimeoutError:
                continue
            except RayActorError as error:
                return f"{name} did not start: {_cause(error)}"
        return None

    def close(self) -> None:
        if not ray.is_initialized():
            return
        for actor in self._actors.values():
            ray.kill(actor)
        for group in self._groups.values():
            remove_placement_group(group)
        self._actors.clear()
        self._groups.clear()
        ray.shutdown()


def _actor(kind: type, **options: Any) -> Any:
    # `__init__` runs in the main thread, which may then handle signals; calls run beside it
    return ray.remote(kind).options(max_restarts=-1, max_concurrency=4, **options)


def _node_address() -> str:
    address: str = get_node_ip_address()
    return address


def _cause(error: RayActorError) -> str:
    """The last line of a remote traceback: what went wrong, without where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

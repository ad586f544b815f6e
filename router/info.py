"""The cluster as the router sees it, for people and dashboards."""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import Load, WorkerRole


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """`problem` says why a worker is not connected; empty where it is."""

    worker_id: str
    incarnation: str
    role: WorkerRole
    address: str
    connected: bool
    draining: bool
    load: Load
    num_blocks: int
    credits: int
    num_credits_used: int
    device: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PairInfo:
    """`reason` says why a pair is not up, `transport` what carries its payload while it is. Workers by their ids."""

    prefill_worker: str
    decode_worker: str
    epoch: int
    up: bool
    reason: str = ""
    transport: str = ""


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    workers: tuple[WorkerInfo, ...]
    pairs: tuple[PairInfo, ...]
    num_queued: int
    num_running: int

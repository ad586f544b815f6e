"""What the SDK hands out about tokens and the cluster: plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.types import PairInfo, WorkerInfo


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a prompt. `token_strs` are the vocabulary's names of them, where asked for."""

    token_ids: tuple[int, ...]
    token_strs: tuple[str, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy a worker is. `num_held` requests wait for a transfer, `num_waiting_tokens` of prompts for compute."""

    worker_id: str
    num_running: int
    num_waiting: int
    num_held: int
    num_blocks: int
    num_free_blocks: int
    num_waiting_tokens: int
    num_preemptions: int
    draining: bool


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """How busy the router and the workers connected to it are."""

    num_queued: int
    num_running: int
    workers: tuple[WorkerLoad, ...]


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """`workers` and `pairs` are new, or not what they were. `gone_pairs` are (prefill worker, decode worker)."""

    workers: tuple[WorkerInfo, ...] = ()
    pairs: tuple[PairInfo, ...] = ()
    gone_workers: tuple[str, ...] = ()
    gone_pairs: tuple[tuple[str, str], ...] = ()

"""Model and cluster to the public API's messages."""

from __future__ import annotations

from core.messages import WorkerRole
from core.model_info import ModelInfo
from penstock.v1 import inference_pb2 as pb
from router.cluster_watch import ClusterChange
from router.info import ClusterInfo, PairInfo, WorkerInfo

_ROLES = {
    WorkerRole.PREFILL: pb.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: pb.WORKER_ROLE_DECODE,
    WorkerRole.MIXED: pb.WORKER_ROLE_MIXED,
}


def to_model(model: ModelInfo, *, max_model_len: int, has_chat_template: bool) -> pb.GetModelResponse:
    return pb.GetModelResponse(
        name=model.name,
        architecture=model.architecture,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=has_chat_template,
    )


def to_server_info(info: ClusterInfo, *, version: str, model: str, uptime_s: float) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version=version,
        model=model,
        uptime_s=uptime_s,
        num_queued=info.num_queued,
        num_running=info.num_running,
        workers=[_worker(worker) for worker in info.workers],
        pairs=[_pair(pair) for pair in info.pairs],
    )


def _worker(worker: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        role=_ROLES[worker.role],
        address=worker.address,
        connected=worker.connected,
        draining=worker.draining,
        num_running=worker.load.num_running,
        num_waiting=worker.load.num_waiting,
        num_blocks=worker.num_blocks,
        num_free_blocks=worker.load.num_free_blocks,
        device=worker.device,
    )


def _pair(pair: PairInfo) -> pb.PairInfo:
    return pb.PairInfo(
        prefill_worker=pair.prefill_worker,
        decode_worker=pair.decode_worker,
        epoch=pair.epoch,
        up=pair.up,
        reason=pair.reason,
        transport=pair.transport,
    )


def to_load(info: ClusterInfo) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(
        num_queued=info.num_queued,
        num_running=info.num_running,
        workers=[_load(worker) for worker in info.workers if worker.connected],
    )


def _load(worker: WorkerInfo) -> pb.WorkerLoad:
    load = worker.load
    return pb.WorkerLoad(
        worker_id=worker.worker_id,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_held=load.num_held,
        num_blocks=worker.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_waiting_tokens=load.num_waiting_tokens,
        num_preemptions=load.num_preemptions,
        draining=worker.draining,
    )


def to_change(change: ClusterChange) -> pb.WatchClusterResponse:
    return pb.WatchClusterResponse(
        workers=[_worker(worker) for worker in change.workers],
        pairs=[_pair(pair) for pair in change.pairs],
        gone_workers=change.gone_workers,
        gone_pairs=[pb.PairName(prefill_worker=prefill, decode_worker=decode) for prefill, decode in change.gone_pairs],
    )

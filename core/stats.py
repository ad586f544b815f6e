"""Where the time of one request went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestStats:
    """Filled in by the router as a request goes along; None where a stage has not happened. Durations in seconds.

    `transfer_s` is the time the sending channel spent on this request's segments, `transfer_exposed_s` the part of it
    after the end of compute; both, like `kv_bytes`, are told by the prefill worker. `commit_wait_s` is decode's wait
    from Accept to the last verified segment. `num_cached_tokens`: those of the prompt that were
    found in the cache of the worker that read it.
    """

    prefill_worker: str = ""
    decode_worker: str = ""
    num_attempts: int = 0
    queue_s: float | None = None
    reserve_s: float | None = None
    prefill_s: float | None = None
    commit_wait_s: float | None = None
    first_decode_step_s: float | None = None
    transfer_s: float | None = None
    transfer_exposed_s: float | None = None
    kv_bytes: int | None = None
    num_cached_tokens: int | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None

    @property
    def overlap_ratio(self) -> float | None:
        """Share of the transfer that was hidden behind compute, in [0, 1]."""
        if not self.transfer_s or self.transfer_exposed_s is None:
            return None
        return max(0.0, 1.0 - self.transfer_exposed_s / self.transfer_s)

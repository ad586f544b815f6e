"""What is measured of each kind of worker, for the predictions of placement."""

from __future__ import annotations

from collections import Counter

from router.policies.fleet import Fleet, Kind, Worker

NUM_OWN_READINGS = 4
"""From so many on, a kind of worker goes by what was measured of itself alone."""


class Learner:
    """Fits the fleet's speeds to what attempts took. Of workers that are gone nothing is learned."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._num_read: Counter[Kind] = Counter()

    def num_tokens_ahead(self, incarnation: str) -> int:
        """That a worker has to read before a prompt that comes now."""
        worker = self._fleet.workers.get(incarnation)
        return worker.num_waiting_tokens if worker else 0

    def on_prefilled(self, incarnation: str, num_tokens: int, took_s: float) -> None:
        """A prompt was read, `num_tokens` with those ahead of it and without those cached."""
        if worker := self._worker(incarnation):
            kind = worker.kind
            self._num_read[kind] += 1
            kind.prefill.observe(num_tokens, took_s)
            for other in self._fleet.kinds.values():  # those who never read go by others on the same hardware
                same = other is not kind and other.key.device == kind.key.device
                if same and self._num_read[other] < NUM_OWN_READINGS:
                    other.prefill.observe(num_tokens, took_s)

    def on_step(self, incarnation: str, took_s: float) -> None:
        """A token came so long after the one before."""
        if worker := self._worker(incarnation):
            worker.kind.step.observe(max(1, worker.num_active), took_s)

    def on_handover(self, prefill: str, decode: str, num_tokens: int, took_s: float) -> None:
        """Reserving and what came between the first token and the start of decode, for so many tokens sent."""
        p, d = self._worker(prefill), self._worker(decode)
        if p and d:
            p.kind.link(d.kind).observe(num_tokens, took_s)

    def on_answer(self, num_tokens: int) -> None:
        """An answer ended by itself."""
        self._fleet.output_tokens.observe(num_tokens)

    def _worker(self, incarnation: str) -> Worker | None:
        return self._fleet.workers.get(incarnation)

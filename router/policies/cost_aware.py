"""Cost-aware, for hardware that differs: the cheapest workers that are fast enough, by the price of their time."""

from __future__ import annotations

import random
from collections.abc import Mapping

from router.policies.fleet import USUAL_BATCH, Kind, Lane
from router.policies.least_loaded import fastest
from router.policies.model import Need
from router.policies.search import NO_LIMIT, Candidates, Choice, Offer, Search


class CostAware:
    """Money is price times the seconds that the request keeps a worker busy; waiting costs nothing, but has a limit.

    The limit is the request's targets; without a target for the first token, a wait of `overflow_s`.
    """

    name = "cost_aware"

    def __init__(self, prices: Mapping[str, float], margin: float, overflow_s: float) -> None:
        self._prices, self._margin, self._overflow_s = prices, margin, overflow_s

    def choose(self, search: Search, rng: random.Random) -> Choice | None:  # noqa: ARG002 - nothing is drawn
        fleet = search.fleet
        writers = [self._writers(search, lane) for lane in search.lanes(fleet.decode_lanes)]
        both = [self._both(search, lane) for lane in search.local_lanes]
        choice = search.cheapest(
            [self._readers(search, lane).of(search, with_room=False) for lane in search.lanes(fleet.prefill_lanes)],
            lambda _: [offer.of(search, with_room=True) for offer in writers],
            both,
            "cheapest",
            min((offer.base for offer in writers), default=0.0),
        )
        return choice or fastest(search, "none_cheap_is_fast_enough")

    def _readers(self, search: Search, lane: Lane) -> Offer:
        """Those that begin in time, all of a kind at one price."""
        slope, wait_s = lane.kind.prefill.slope, self._wait_limit_s(search.need, lane.kind)
        most = wait_s / slope if slope > 0 else 0.0
        return Offer(lane, self._read_price(search, lane.kind), 0.0, most)

    def _writers(self, search: Search, lane: Lane) -> Offer:
        line, itl_s = lane.kind.step, search.need.itl_s
        most = NO_LIMIT
        if itl_s is not None:
            spare_s = itl_s * self._margin - line.at(1)
            most = spare_s / line.slope if line.slope > 0 else spare_s * NO_LIMIT
        return Offer(lane, self._write_price(search, lane.kind), 0.0, most)

    def _both(self, search: Search, lane: Lane) -> Candidates:
        slope, wait_s = lane.kind.prefill.slope, self._wait_limit_s(search.need, lane.kind)
        money = self._read_price(search, lane.kind) + self._write_price(search, lane.kind)
        most = self._writers(search, lane).most
        return (
            (money, worker)
            for _, worker in Offer(lane, 0.0, 0.0).of(search, with_room=True)
            if worker.num_waiting_tokens * slope <= wait_s and worker.num_active <= most
        )

    def _price(self, kind: Kind) -> float:
        return self._prices.get(kind.key.device, 1.0)

    def _read_price(self, search: Search, kind: Kind) -> float:
        return self._price(kind) * kind.prefill.at(search.need.num_tokens)

    def _write_price(self, search: Search, kind: Kind) -> float:
        return self._price(kind) * kind.step.at(USUAL_BATCH) / USUAL_BATCH * search.num_output_tokens

    def _wait_limit_s(self, need: Need, kind: Kind) -> float:
        """How long the prompt may wait for its turn."""
        if need.ttft_s is None:
            return self._overflow_s
        return need.ttft_s * self._margin - kind.prefill.at(need.num_tokens)

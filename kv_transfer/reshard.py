"""Which rank sends which K and V to which rank, where the two workers of a pair divide one model differently. Pure.

L layers, K KV heads. A worker is a group of ranks (tensor parallelism); only a group of one exists so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from core.errors import TransferError
from core.kv_layout import KVLayout
from core.ticket import CommitRecord, Segment

_Place = tuple[int, int, int, int, int]
"""A segment without its tokens: layer, sender rank, receiver rank, first KV head, the one after the last."""


@dataclass(frozen=True, slots=True)
class Group:
    """How the ranks of a worker divide a cache. `layout` is of the whole model.

    KV heads go to the ranks in order, equally many to each. Where there are more ranks than heads, neighbours hold the
    same head: `num_replicas` ranks each. The latent cache of MLA is one head, so every rank holds all of it.
    """

    layout: KVLayout
    tp_size: int = 1

    @property
    def num_replicas(self) -> int:
        return max(1, self.tp_size // self.layout.num_kv_heads)

    def kv_heads(self, rank: int) -> range:
        """The KV heads that a rank holds."""
        num_heads = max(1, self.layout.num_kv_heads // self.tp_size)
        start = rank // self.num_replicas * num_heads
        return range(start, start + num_heads)


@dataclass(frozen=True, slots=True)
class Route:
    """What `sender_rank` sends to `receiver_rank`: KV heads [kv_head_start, kv_head_end) of some of the layers."""

    sender_rank: int
    receiver_rank: int
    kv_head_start: int
    kv_head_end: int
    layers: tuple[int, ...]


def refusal(sender: Group, receiver: Group) -> str | None:
    """Why the cache of one group can't become that of the other: the field and both values. None where it can.

    Block sizes may differ: a segment is a range of tokens, and its payload has no blocks.
    """
    if mismatch := sender.layout.mismatch(receiver.layout):
        return mismatch
    num_kv_heads = sender.layout.num_kv_heads
    for side, size in (("sender", sender.tp_size), ("receiver", receiver.tp_size)):
        if size < 1 or (num_kv_heads % size and size % num_kv_heads):
            return f"tp_size: {size} on the {side}, num_kv_heads: {num_kv_heads}: one must divide the other"
    return None


class ReshardPlan:
    """Every rank of the receiver gets each (layer, KV head) that it holds from exactly one rank of the sender.

    Where several ranks of the sender hold a head, they take turns over its layers and the ranks that need it: what they
    send differs by one layer at most, and each has something to send while the next layer computes. Both sides derive
    the same plan. Raises TransferError `layout_mismatch` where `refusal` names a reason.
    """

    def __init__(self, sender: Group, receiver: Group) -> None:
        if reason := refusal(sender, receiver):
            raise TransferError("layout_mismatch", reason)
        self.sender, self.receiver = sender, receiver
        self.routes = tuple(_routes(sender, receiver))
        self._outgoing: dict[tuple[int, int], list[Route]] = {}
        for route in self.routes:
            for layer in route.layers:
                self._outgoing.setdefault((route.sender_rank, layer), []).append(route)
        self._places = frozenset(
            (layer, r.sender_rank, r.receiver_rank, r.kv_head_start, r.kv_head_end)
            for r in self.routes
            for layer in r.layers
        )

    def outgoing(self, rank: int, layer: int, start: int, end: int, max_cells: int) -> Iterator[Segment]:
        """What `rank` of the sender sends once it has positions [start, end) of a layer.

        `max_cells`: how many (token, KV head) pairs a segment may hold; must be K at least.
        """
        for route in self._outgoing.get((rank, layer), ()):
            head, head_end = route.kv_head_start, route.kv_head_end
            num_tokens = max_cells // (head_end - head)
            for first in range(start, end, num_tokens):
                last = min(end, first + num_tokens)
                yield Segment(layer, head, head_end, first, last, rank, route.receiver_rank)

    def expects(self, segment: Segment) -> bool:
        """Whether a segment, its tokens aside, is one of the plan."""
        return _place(segment) in self._places

    def gap(self, record: CommitRecord) -> str | None:
        """What of the plan `record` does not cover exactly once for its tokens that were not skipped, or None."""
        spans: dict[_Place, list[tuple[int, int]]] = {place: [] for place in self._places}
        for sent in record.segments:
            if (found := spans.get(_place(sent.segment))) is None:
                return f"a segment outside of the plan: {sent.segment}"
            found.append((sent.segment.token_start, sent.segment.token_end))
        for place in sorted(spans):
            position = record.num_skipped_tokens
            for start, end in sorted(spans[place]):
                if start != position or end <= start:
                    return f"{_words(place)}: tokens [{start}, {end}) come after {position}"
                position = end
            if position != record.num_tokens:
                return f"{_words(place)}: {position} of {record.num_tokens} tokens"
        return None


def _routes(sender: Group, receiver: Group) -> Iterator[Route]:
    """In the order of ranks.

    Of each head, need number n is layer n // R for the (n % R)-th of R ranks that hold it; the (n % S)-th of S senders
    serves it. With S > 1 each rank of the sender holds one head, so that all needs weigh the same.
    """
    num_senders, num_receivers = sender.num_replicas, receiver.num_replicas
    for source, target in product(range(sender.tp_size), range(receiver.tp_size)):
        ours, theirs = sender.kv_heads(source), receiver.kv_heads(target)
        start, end = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
        layers = tuple(
            layer
            for layer in range(sender.layout.num_layers)
            if (layer * num_receivers + target % num_receivers) % num_senders == source % num_senders
        )
        if start < end and layers:
            yield Route(source, target, start, end, layers)


def _place(segment: Segment) -> _Place:
    s = segment
    return s.layer, s.sender_rank, s.receiver_rank, s.kv_head_start, s.kv_head_end


def _words(place: _Place) -> str:
    layer, sender, receiver, head, head_end = place
    return f"layer {layer}, KV heads [{head}, {head_end}), rank {sender} to rank {receiver}"

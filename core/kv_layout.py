"""What the K and V of a worker look like: two workers pair only where these agree."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, cast, get_args

from core.errors import InvalidRequestError

WireDtype = Literal["auto", "int8"]
"""How K and V travel from worker to worker: as the cache holds them, or rounded."""


def wire_dtype(name: str) -> WireDtype:
    """`InvalidRequestError` where it is none."""
    for dtype in get_args(WireDtype):
        if dtype == name:
            return cast("WireDtype", dtype)
    raise InvalidRequestError("kv_wire_dtype", name, f"must be one of {', '.join(get_args(WireDtype))}")


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = {"float32": 0, "bfloat16": 0, "float16": 0, "int8": 4}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache of one model on one worker. `fingerprint` is of its config and weights.

    `dtype` is what the cache holds; "int8" has a float32 scale for each vector. `kind` says of what: "heads" is K and V
    of each KV head; "latent" the one vector a token that all heads share (MLA), so that `num_kv_heads` is 1, and
    `head_size` counts the compressed and the rotary part. `weights` is the precision that the model computes in: other
    roundings give other K and V.
    """

    model: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    kind: str = "heads"
    weights: str = "float32"

    @property
    def bytes_per_cell(self) -> int:
        """What one layer holds of one (token, KV head)."""
        num_vectors = 2 if self.kind == "heads" else 1
        return num_vectors * (self.head_size * _ITEM_BYTES[self.dtype] + _SCALE_BYTES[self.dtype])

    @property
    def bytes_per_token_per_layer(self) -> int:
        return self.num_kv_heads * self.bytes_per_cell

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token_per_layer * self.num_layers * self.block_size

    @property
    def contents(self) -> str:
        """What K and V depend on beside the tokens, shapes aside: the `model` of `core.block_hash.root_hash`."""
        return f"{self.fingerprint} {self.weights} {self.dtype}"

    def on_wire(self, dtype: WireDtype) -> KVLayout:
        """What travels: with "int8", K and V of a float cache get a scale for each vector, as in an int8 cache.

        The latent vectors of MLA are never rounded: one scale would hide their small compressed part behind the rotary
        one.
        """
        return replace(self, dtype=dtype) if dtype == "int8" and self.kind == "heads" else self

    def mismatch(self, other: KVLayout) -> str | None:
        """Why KV of `self` can't be used as KV of `other`, or None where it can.

        Block sizes may differ: segments are ranges of tokens, not of blocks.
        """
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name not in ("block_size", "model") and ours != theirs:
                return f"{f.name}: {ours} on one side, {theirs} on the other"
        return None

"""What a step must read and multiply at least, from a checkpoint's shapes; with the ceilings, how fast it can be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.ceilings import Ceilings

ACTIVATION_BYTES = 4  # of a float32 K or V


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A decoder of equal layers, dense (`num_experts` 1, all used) or with experts."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    """Of one expert."""
    num_experts: int
    num_experts_used: int
    vocab_size: int

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        c = json.loads((folder / "config.json").read_text())
        num_experts = c.get("num_local_experts") or c.get("num_experts") or 1
        moe = num_experts > 1
        return cls(
            hidden_size=c["hidden_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c["num_key_value_heads"],
            head_size=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            mlp_size=c["moe_intermediate_size" if moe else "intermediate_size"],
            num_experts=num_experts,
            num_experts_used=c["num_experts_per_tok"] if moe else 1,
            vocab_size=c["vocab_size"],
        )

    @property
    def _attention_weights(self) -> int:
        """Of one layer, the router of its experts included."""
        rows = 2 * (self.num_heads + self.num_kv_heads) * self.head_size
        return self.hidden_size * (rows + (self.num_experts if self.num_experts > 1 else 0))

    @property
    def _expert_weights(self) -> int:
        return 3 * self.hidden_size * self.mlp_size

    @property
    def num_weights(self) -> int:
        """Of all matrices; the embedding is taken to be the output matrix too."""
        layer = self._attention_weights + self.num_experts * self._expert_weights
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_size * ACTIVATION_BYTES

    def bytes_read(self, num_tokens: int, kv_tokens: int, weight_bytes: float) -> float:
        """By a step of `num_tokens`, whose sequences have `kv_tokens` in the cache together.

        Each token picks its experts by itself: so many different ones are expected to be read.
        """
        unused = (1 - self.num_experts_used / self.num_experts) ** num_tokens
        layer = self._attention_weights + self.num_experts * (1 - unused) * self._expert_weights
        weights = self.num_layers * layer + self.hidden_size * self.vocab_size
        return weights * weight_bytes + kv_tokens * self.kv_bytes_per_token

    def linear_flops(self, num_tokens: int, num_sampled: int) -> float:
        """Only rows that draw a token need logits, and more of the last layer than K and V."""
        layer = self._attention_weights + self.num_experts_used * self._expert_weights
        kv = 2 * self.hidden_size * self.num_kv_heads * self.head_size
        for_all = num_tokens * ((self.num_layers - 1) * layer + kv)
        return 2.0 * (for_all + num_sampled * (layer - kv + self.hidden_size * self.vocab_size))

    def attention_flops(self, num_pairs: float, num_last_pairs: float) -> float:
        """For that many (query, key) pairs of tokens in each layer, and in the last one."""
        pairs = num_pairs * (self.num_layers - 1) + num_last_pairs
        return 4.0 * pairs * self.num_heads * self.head_size


def prefill_s(cost: ModelCost, machine: Ceilings, precision: str, num_sequences: int, num_tokens: int) -> float:
    """The least time to read `num_sequences` prompts of `num_tokens`: multiplications at the rate of large products."""
    linear = cost.linear_flops(num_sequences * num_tokens, num_sequences)
    pairs = num_sequences * num_tokens * (num_tokens + 1) / 2
    attention = cost.attention_flops(pairs, num_sequences * num_tokens)
    return linear / machine.flops(precision) + attention / machine.flops("float32")


def decode_step_s(cost: ModelCost, machine: Ceilings, precision: str, num_sequences: int, context: float) -> float:
    """The least time of a step of that many sequences with `context` tokens each: reading, or multiplying."""
    kv_tokens = num_sequences * context
    read = cost.bytes_read(num_sequences, int(kv_tokens), WEIGHT_BYTES[precision]) / machine.read_bytes_per_s
    linear = cost.linear_flops(num_sequences, num_sequences) / machine.flops(precision)
    return max(read, linear + cost.attention_flops(kv_tokens, kv_tokens) / machine.flops("float32"))


WEIGHT_BYTES = {"float32": 4.0, "int8": 1.0}

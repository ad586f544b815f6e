"""What K and V rounded on the wire save and cost: bytes, and greedy tokens of the embedded model that change.

    python -m benchmarks.kv_wire --json

A prompt is computed, its K and V are put through the wire format and back, and decoding goes on from them, as on
another worker. With --json the last line is one object, {"machine": ..., "rows": [...]}. `gap` is how much less likely
than the best a token is, in nats, by exact K and V of all before it. The text is that of `benchmarks.perplexity`.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.machine import machine
from benchmarks.perplexity import CONTEXT, TINY, held_out_texts, logits_of
from core.kv_layout import WireDtype
from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from kv_transfer.wire import from_wire, to_wire

NUM_OUTPUT = 64
CACHES = ("float32", "bfloat16")
_CONFIG = EngineConfig(device="cpu", num_blocks=CONTEXT // 16, enable_prefix_caching=False)


@dataclass(frozen=True, slots=True)
class Row:
    cache: str
    bytes_ratio: float
    """Bytes on the wire over those of the cache."""
    num_requests: int
    num_diverged: int
    num_tokens: int
    num_equal: int
    """Of the tokens in the same place; after the first that differs, few are equal."""
    max_gap: float


def generate(engine: Engine, prompt: Sequence[int], dtype: WireDtype) -> list[int]:
    """Greedy tokens after a prompt whose K and V have travelled as `dtype`."""
    request = Request("r", list(prompt), SamplingParams(max_tokens=NUM_OUTPUT, temperature=0))
    engine.scheduler.add(request)
    while not request.output_token_ids:
        engine.step()
    travel(engine, len(prompt), dtype)
    while request.finish_reason is None:
        engine.step()
    return request.output_token_ids


def travel(engine: Engine, num_tokens: int, dtype: WireDtype) -> None:
    """Put the first positions of the one request through the wire format."""
    storage, table = engine.storage, engine.pool.table("r")
    for layer in range(engine.layout.num_layers):
        payload = to_wire(storage.read(layer, table, 0, num_tokens), engine.layout, dtype)
        storage.write(layer, table, 0, num_tokens, from_wire(payload, engine.layout, dtype))


def row(cache: str, prompts: Sequence[Sequence[int]]) -> Row:
    engine = Engine.from_checkpoint(TINY, replace(_CONFIG, kv_cache_dtype=cache))  # type: ignore[arg-type]
    num_diverged = num_equal = 0
    gaps: list[float] = []
    for prompt in prompts:
        exact, rounded = generate(engine, prompt, "auto"), generate(engine, prompt, "int8")
        num_diverged += exact != rounded
        num_equal += sum(map(operator.eq, exact, rounded))
        logits = logits_of(engine, [*prompt, *rounded])[len(prompt) - 1 : -1]
        taken = logits.gather(1, torch.tensor(rounded).unsqueeze(1)).squeeze(1)
        gaps.append((logits.amax(dim=1) - taken).max().item())
    ratio = engine.layout.on_wire("int8").bytes_per_cell / engine.layout.bytes_per_cell
    num_tokens = len(prompts) * NUM_OUTPUT
    return Row(cache, round(ratio, 4), len(prompts), num_diverged, num_tokens, num_equal, round(max(gaps), 4))


def prompts_of(texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Beginnings of different lengths, which leave room for the output."""
    lengths = (16, 64, 200, CONTEXT - NUM_OUTPUT)
    return [text[:length] for text in texts for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    prompts = prompts_of(held_out_texts(arguments.texts))
    rows = [row(cache, prompts) for cache in CACHES]
    for each in rows:
        print(f"{each.cache}: {each.bytes_ratio:.2%} of the bytes; {each.num_diverged} of {each.num_requests} requests")
        print(
            f"  differ, {each.num_equal / each.num_tokens:.2%} of tokens are equal, the largest gap is {each.max_gap}"
        )
    if arguments.json:
        print(json.dumps({"machine": machine(), "texts": arguments.texts, "rows": [asdict(each) for each in rows]}))


if __name__ == "__main__":
    main()

"""What each precision costs in quality: the perplexity of the embedded model on text that it was not trained on.

    python -m benchmarks.perplexity --json

With --json the last line is one object, {"machine": ..., "rows": [...]}; a row's `change` is perplexity / that of
float32 - 1. The text is the beginning of each of the longest modules of this interpreter that training held out. The
checkpoint is in bfloat16, so that of weights in bfloat16 nothing is lost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry
from engine.step_inputs import build_step_inputs

MODELS = Path(__file__).parent.parent / "models"
TINY = MODELS / "penstock-tiny"
CONTEXT = 512
_FLOAT32 = EngineConfig(device="cpu", num_blocks=CONTEXT // 16)
PRECISIONS: Mapping[str, EngineConfig] = MappingProxyType(
    {
        "float32": _FLOAT32,
        "bfloat16, bfloat16 KV": replace(_FLOAT32, dtype="bfloat16"),
        "int8": replace(_FLOAT32, quantization="int8"),
        "int8, output matrix in float32": replace(_FLOAT32, quantization="int8", quantize_lm_head=False),
        "int4": replace(_FLOAT32, quantization="int4"),
        "int8 KV": replace(_FLOAT32, kv_cache_dtype="int8"),
        "int8, int8 KV": replace(_FLOAT32, quantization="int8", kv_cache_dtype="int8"),
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    precision: str
    perplexity: float
    """Per token."""
    change: float


@torch.inference_mode()
def logits_of(engine: Engine, token_ids: Sequence[int]) -> Tensor:
    """[T, V]: of the token after each. The engine must have blocks for all of them, and no requests."""
    block_ids = tuple(range(-(-len(token_ids) // engine.layout.block_size)))
    plan = Plan((PlanEntry("text", tuple(token_ids), 0, block_ids, None),))
    vocab_size, storage = engine.model_config.vocab_size, engine.storage
    inputs = build_step_inputs(plan, engine.layout.block_size, vocab_size, storage.device)
    return engine.model.logits(engine.model.forward(inputs, storage.layers))


def log_likelihood(engine: Engine, token_ids: Sequence[int]) -> float:
    """Of all tokens but the first, in nats."""
    logits = logits_of(engine, token_ids)
    return -F.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]), reduction="sum").item()


def perplexity(engine: Engine, texts: Sequence[Sequence[int]]) -> float:
    """texts: token ids, each text on its own."""
    total = sum(log_likelihood(engine, text) for text in texts)
    return math.exp(-total / sum(len(text) - 1 for text in texts))


def held_out_texts(num_texts: int) -> list[list[int]]:
    """The first tokens of the longest held-out modules, after the token that ends a file."""
    sys.path.insert(0, str(MODELS))
    try:
        data = importlib.import_module("tiny_data")  # a script's module, of no package
    finally:
        sys.path.remove(str(MODELS))
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    longest = sorted(data.library_files()[1], key=len)[-num_texts:]
    return [[0, *tokenizer.encode(text[: 8 * CONTEXT]).ids[: CONTEXT - 1]] for text in longest]


def rows(num_texts: int) -> list[Row]:
    texts = held_out_texts(num_texts)
    values = {name: perplexity(Engine.from_checkpoint(TINY, config), texts) for name, config in PRECISIONS.items()}
    return [Row(name, round(value, 5), round(value / values["float32"] - 1, 6)) for name, value in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    found = rows(arguments.texts)
    for row in found:
        print(f"{row.precision:32} {row.perplexity:9.4f} {row.change:+9.4%}")
    if arguments.json:
        result = {"machine": machine(), "texts": arguments.texts, "rows": [asdict(row) for row in found]}
        print(json.dumps(result))


if __name__ == "__main__":
    main()

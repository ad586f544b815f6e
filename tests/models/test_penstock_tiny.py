"""The embedded model is as small and as good as its card says."""

from __future__ import annotations

import gzip
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).resolve().parents[2] / "models"
TINY = MODELS / "penstock-tiny"
MAX_BITS_PER_BYTE = 1.6
NUM_BYTES = 4000
"""Of each held-out file."""


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    """The beginnings of this interpreter's modules that training does not touch."""
    sys.path.insert(0, str(MODELS))
    try:
        data = importlib.import_module("tiny_data")  # a script's module, of no package
    finally:
        sys.path.remove(str(MODELS))
    _, texts = data.library_files()
    return [text[:NUM_BYTES] for text in sorted(texts, key=len)[-8:]]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 12e6
    assert (TINY / "MODEL_CARD.md").is_file()


@torch.inference_mode()
def test_it_needs_few_bits_for_code_that_it_has_not_seen(network: Any, held_out: list[str]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    bits = num_bytes = zipped = 0.0
    for text in held_out:
        ids = torch.tensor([[0, *tokenizer(text).input_ids[:511]]])
        logits = network(ids).logits[0, :-1]
        bits += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item() / math.log(2)
        seen = tokenizer.decode(ids[0, 1:].tolist()).encode()
        num_bytes += len(seen)
        zipped += 8 * len(gzip.compress(seen, 9))
    assert num_bytes > 8000
    assert bits / num_bytes <= MAX_BITS_PER_BYTE < zipped / num_bytes


@torch.inference_mode()
def test_a_completion_looks_like_python(network: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer("def __init__(self", return_tensors="pt").input_ids
    output = network.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    lines = tokenizer.decode(output[0]).splitlines()
    assert lines[0].startswith("def __init__(self")
    assert lines[0].endswith("):")
    assert lines[1].startswith("        self.")

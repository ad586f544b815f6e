"""Measure the shipped `penstock-tiny` with `transformers`, apart from the code that trained it; takes a few minutes.

    python models/measure_tiny.py

Writes `held_out.json` into the model's folder: bits per byte and gzip's figure, for all held-out files and for those
that share little text with the training files, and samples of three seeds, none of them chosen.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tiny_data import library_files
from transformers import AutoTokenizer, Qwen3MoeForCausalLM


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure."""

    folder: Path = Path("models/penstock-tiny")
    context: int = 512
    fresh_below: float = 0.05
    """A file is fresh when a smaller share of its text stands in passages that training files hold as well."""
    passage: int = 50
    """Characters that a shared passage has at least."""
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Measure:
    """One held-out file: its size, what the model and gzip need for it, and how much of it training files hold."""

    n_bytes: int
    model_bits: float
    gzip_bits: int
    shared: float


@torch.no_grad()
def model_bits(network: Any, ids: list[int], context: int) -> float:
    """Bits for `ids` and the end of file, in windows of `context` tokens that overlap by half."""
    row, half, nats = torch.tensor([0, *ids, 0]), context // 2, 0.0
    for begin in range(0, max(1, len(row) - 1 - half), half):
        window = row[begin : begin + context + 1]
        logits = network(window[None, :-1]).logits[0]
        fresh = 0 if begin == 0 else half
        nats += F.cross_entropy(logits[fresh:], window[1 + fresh :], reduction="sum").item()
    return nats / math.log(2)


def passages(text: str, length: int) -> list[int]:
    """Hash of the `length` characters that start at each place of `text`."""
    return [hash(text[i : i + length]) for i in range(len(text) - length + 1)]


def shared_text(text: str, known: set[int], length: int) -> float:
    """Share of the characters of `text` that lie in a passage of `length` characters found in `known`."""
    covered = bytearray(len(text))
    for i, passage in enumerate(passages(text, length)):
        if passage in known:
            covered[i : i + length] = b"\1" * length
    return sum(covered) / max(1, len(covered))


def summary(files: list[Measure]) -> dict[str, float]:
    """Totals over `files`, in bits for one byte."""
    n_bytes = sum(f.n_bytes for f in files)
    return {
        "files": len(files),
        "bytes": n_bytes,
        "model_bits_per_byte": round(sum(f.model_bits for f in files) / n_bytes, 4),
        "gzip_bits_per_byte": round(sum(f.gzip_bits for f in files) / n_bytes, 4),
        "shared_text": round(sum(f.shared * f.n_bytes for f in files) / n_bytes, 4),
    }


def sample(network: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    """What the model writes after `prompt`: at most 120 tokens, at temperature 0.8."""
    torch.manual_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    return str(tokenizer.decode(network.generate(tokens, max_new_tokens=120, do_sample=True, temperature=0.8)[0]))


def main(settings: Settings) -> None:
    """Measure every held-out file and write the report."""
    torch.set_num_threads(settings.threads)
    network = Qwen3MoeForCausalLM.from_pretrained(settings.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder)
    texts, unseen = library_files()
    known = {passage for text in texts for passage in passages(text, settings.passage)}
    files = [
        Measure(
            n_bytes=len(text.encode()),
            model_bits=model_bits(network, tokenizer(text, verbose=False).input_ids, settings.context),
            gzip_bits=8 * len(gzip.compress(text.encode(), 9)),
            shared=shared_text(text, known, settings.passage),
        )
        for text in unseen
        if text
    ]
    chat = [{"role": "user", "content": "Return the number of lines in a file."}]
    chat_prompt = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    report = {
        "settings": asdict(settings) | {"folder": settings.folder.as_posix()},
        "all": summary(files),
        "fresh": summary([f for f in files if f.shared < settings.fresh_below]),
        "samples": [sample(network, tokenizer, "def __init__(self", seed) for seed in range(3)],
        "chat_sample": sample(network, tokenizer, chat_prompt, 0),
    }
    (settings.folder / "held_out.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))

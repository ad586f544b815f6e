"""Text and tokenizer of `penstock-tiny`: Python's standard library, cut into training and held-out files."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
{{- '<|endoftext|>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# A newline keeps the indentation that follows it, a word may take one leading sign (`.join`, `(self`, ` in`).
WORDS = r"\s*\n[ \t]*|[^\n\p{L}\p{N}_]?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def library_files() -> tuple[list[str], list[str]]:
    """Text of the standard library's modules, as (training, held-out); a hash of the path holds out one in twenty.

    Left out: installed packages, tests, what the build of Python wrote for one machine, and the generated tables of
    `encodings` and `pydoc_data`, which would flatter the measure.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        of_the_build = name.parts[0].startswith(("_sysconfigdata", "config-"))
        if skipped.isdisjoint(name.parts) and not of_the_build:
            text = path.read_text(encoding="utf-8", errors="ignore")
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            (held_out if digest[0] % 20 == 0 else train).append(text)
    return train, held_out


def questions(source: str) -> Iterator[str]:
    """Chats drawn from one module: the first paragraph of a function's docstring asks, the function answers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            code = ast.get_source_segment(source, node)
            if code and len(code) < 1200 and node.col_offset == 0:
                ask = " ".join(doc.split("\n\n")[0].split())
                yield f"{USER}\n{ask}\n{ASSISTANT}\n{code}{END}"


def learn_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer of `vocab` entries; the special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tensor]:
    """Token ids of each text, on the processor."""
    return [torch.tensor(item.ids) for item in tokenizer.encode_batch(texts)]


def batches(files: list[Tensor], chats: list[Tensor], batch: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches `[batch, size]`: all files and chats, shuffled anew each epoch and cut into sequences."""
    rng = random.Random(seed)
    while True:
        epoch = files + chats
        rng.shuffle(epoch)
        stream = torch.cat(epoch)[rng.randrange(size) :]
        rows = list(stream[: len(stream) // size * size].view(-1, size))
        rng.shuffle(rows)
        for start in range(0, len(rows) - batch + 1, batch):
            yield torch.stack(rows[start : start + batch])

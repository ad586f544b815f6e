"""Small tokenizers, trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def light(self): return 'naïve café – 水門 🌊'",
    "the pipe that feeds a turbine",
    "ab abc bcd\n\n    cde",
] * 3


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen write theirs: merges over bytes, so a token may hold a part of a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["水門 gate"])
    return tokenizer


def sentence_piece() -> tokenizers.Tokenizer:
    """As Llama 2 and Mixtral write theirs: `▁` for a space, bytes for characters without a token."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz'é", "▁t", "▁th", "▁the"]
    vocab = {token: i for i, token in enumerate([*special, *bytes_, *letters])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture(scope="session", params=[byte_level, sentence_piece], ids=["byte-level", "sentence-piece"])
def any_backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    make: Callable[[], tokenizers.Tokenizer] = request.param
    return make()


@pytest.fixture(scope="session")
def byte_level_backend() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture(scope="session")
def sentence_piece_backend() -> tokenizers.Tokenizer:
    return sentence_piece()


@pytest.fixture
def checkpoint(tmp_path: Path, byte_level_backend: tokenizers.Tokenizer) -> Path:
    """A folder with a tokenizer.json and nothing else."""
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path

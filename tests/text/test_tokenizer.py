from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from core.errors import CheckpointError, InvalidRequestError
from text.chat_template import Chat, ChatMessage
from text.tokenizer import Tokenizer

USER = Chat((ChatMessage("user", "hi"),))


def write_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(any_backend: tokenizers.Tokenizer, text: str) -> None:
    tokenizer = Tokenizer(any_backend, {})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}],
    ids=["silent", "bos", "no bos", "bos and eos"],
)
def test_special_tokens_are_added_as_transformers_adds_them(checkpoint: Path, config: dict[str, bool]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    begin = backend.token_to_id("<s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    backend.save(str(checkpoint / "tokenizer.json"))
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    write_config(checkpoint, **named, **config)
    theirs = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(checkpoint / "tokenizer.json"), bos_token="<s>", eos_token="</s>", **config
    )
    ours = Tokenizer.from_folder(checkpoint)
    assert ours.encode("the pipe") == theirs("the pipe")["input_ids"]
    assert begin not in ours.encode("the pipe", add_special_tokens=False)


def test_truncation_and_padding_of_the_file_are_ignored(checkpoint: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(checkpoint / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(checkpoint)
    assert tokenizer.decode(tokenizer.encode("the pipe that feeds")) == "the pipe that feeds"


def test_the_template_file_wins_over_the_config(checkpoint: Path) -> None:
    write_config(checkpoint, chat_template="config", eos_token="</s>")
    assert Tokenizer.from_folder(checkpoint).chat_prompt(USER) == "config"
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}", encoding="utf-8")
    assert Tokenizer.from_folder(checkpoint).chat_prompt(USER) == "hi</s>"


def test_a_chat_without_a_template_says_what_to_send(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"messages: .* no chat template: send a prompt"):
        tokenizer.chat_prompt(USER)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "voc'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"{% if %}"),
    ],
)
def test_a_missing_or_broken_file_is_named(checkpoint: Path, name: str, content: bytes | None) -> None:
    path = checkpoint / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(checkpoint)


def test_a_begin_token_to_add_that_is_no_token_is_refused(checkpoint: Path) -> None:
    write_config(checkpoint, add_bos_token=True, bos_token="<nowhere>")
    with pytest.raises(CheckpointError, match="bos_token names no token"):
        Tokenizer.from_folder(checkpoint)


def test_other_threads_run_while_a_long_text_is_encoded(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    encoding, done = threading.Event(), threading.Event()

    def encode() -> None:
        encoding.set()
        tokenizer.encode("the pipe that feeds a turbine " * 20_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    assert encoding.wait(30)
    turns = 0
    while not done.is_set() and turns < 100:
        done.wait(0.0001)
        turns += 1
    thread.join(60)
    assert turns == 100

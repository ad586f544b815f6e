from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from core.errors import CheckpointError
from text.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TINY = Path(__file__).parents[2] / "models" / "penstock-tiny"


def stream(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int], prompt: list[int] | None = None) -> list[str]:
    """The deltas, where `cuts` says how many tokens come at a time."""
    detokenizer = tokenizer.detokenizer(prompt or [])
    deltas = []
    start = 0
    for cut in [*cuts, len(token_ids)]:
        deltas.append(detokenizer.push(token_ids[start : start + cut]))
        start += cut
    return [*deltas, detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 4), max_size=40))
def test_deltas_of_any_byte_level_tokens_add_up_to_the_full_decode(
    byte_level_backend: tokenizers.Tokenizer, data: st.DataObject, cuts: list[int]
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, byte_level_backend.get_vocab_size() + 3), max_size=50))
    deltas = stream(Tokenizer(byte_level_backend, {}), token_ids, cuts)
    assert "".join(deltas) == byte_level_backend.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=TEXT, cuts=st.lists(st.integers(0, 4), max_size=40))
def test_deltas_of_an_encoded_text_add_up_to_it_and_split_no_character(
    any_backend: tokenizers.Tokenizer, text: str, cuts: list[int]
) -> None:
    token_ids = any_backend.encode(text, add_special_tokens=False).ids
    deltas = stream(Tokenizer(any_backend, {}), token_ids, cuts)
    assert "".join(deltas) == any_backend.decode(token_ids) == text
    assert text.count("\ufffd") == sum(delta.count("\ufffd") for delta in deltas)
    assert deltas[-1] == ""


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def embedded_library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 4), max_size=40))
def test_the_embedded_models_tokens_stream_to_their_full_decode(
    embedded: Tokenizer, embedded_library: tokenizers.Tokenizer, data: st.DataObject, cuts: list[int]
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, embedded.vocab_size), max_size=50))
    assert "".join(stream(embedded, token_ids, cuts)) == embedded_library.decode(token_ids)


def test_a_character_appears_with_its_last_byte(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    token_ids = tokenizer.encode("𝔓")
    assert len(token_ids) == 4
    assert stream(tokenizer, token_ids, [1, 1, 1, 1]) == ["", "", "", "𝔓", "", ""]


def test_an_unfinished_character_is_flushed_as_a_replacement(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    assert stream(tokenizer, tokenizer.encode("𝔓")[:2], [1, 1]) == ["", "", "", "\ufffd"]


def test_special_tokens_have_no_text(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    assert tokenizer.decode(tokenizer.encode("<|user|>the</s> pipe<s>")) == "the pipe"


def test_an_added_token_outside_of_the_byte_alphabet_is_its_own_text(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    token_ids = tokenizer.encode("水門 gate")
    assert len(token_ids) == 1
    assert tokenizer.decode(token_ids) == "水門 gate"


def test_ids_beyond_the_vocabulary_have_no_text(byte_level_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level_backend, {})
    assert tokenizer.decode([10**6, *tokenizer.encode("the"), 10**6]) == "the"


def test_a_space_after_a_prompt_is_kept(sentence_piece_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentence_piece_backend, {})
    token_ids = tokenizer.encode("the")
    begin_of_text = 1
    assert "".join(stream(tokenizer, token_ids, [])) == "the"
    assert "".join(stream(tokenizer, token_ids, [], prompt=[begin_of_text])) == "the"
    assert "".join(stream(tokenizer, token_ids, [], prompt=[begin_of_text, *token_ids])) == " the"


def test_only_the_first_space_of_a_text_is_dropped(sentence_piece_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentence_piece_backend, {})
    assert "".join(stream(tokenizer, tokenizer.encode("the the  b"), [1] * 9)) == "the the  b"


def test_characters_in_a_partly_valid_run_of_bytes_stay(sentence_piece_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentence_piece_backend, {})
    euro = tokenizer.encode("€")[1:]
    assert len(euro) == 3
    assert stream(tokenizer, [*euro, euro[0]], [1, 1, 1, 1]) == ["", "", "€", "", "", "\ufffd"]


def test_a_metaspace_decoder_is_read(sentence_piece_backend: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(sentence_piece_backend.to_str())
    backend.decoder = decoders.Metaspace()
    token_ids = backend.encode("the pipe").ids
    assert Tokenizer(backend, {}).decode(token_ids) == backend.decode(token_ids) == "the pipe"


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.CTC()])])
def test_an_unknown_decoder_is_refused(byte_level_backend: tokenizers.Tokenizer, decoder: decoders.Decoder) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
    backend.decoder = decoder
    with pytest.raises(CheckpointError, match=r"decoder is .* must be ByteLevel"):
        Tokenizer(backend, {})

"""Names of KV blocks: equal only where everything before and in them is."""

from hypothesis import assume, given
from hypothesis import strategies as st

from core.block_hash import block_hash, root_hash

texts = st.text(max_size=4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=6)


def test_a_name_is_the_same_on_every_machine() -> None:
    first = block_hash(root_hash("m"), [1, 2, 70000])
    assert first.hex() == "13dbc7d366008277c8ce34d8f2319de7788783c691d0b8e3e015a5e3e93f59d4"


@given(texts, texts, texts, texts)
def test_roots_differ_where_model_or_salt_do(model: str, salt: str, other_model: str, other_salt: str) -> None:
    assume((model, salt) != (other_model, other_salt))
    assert root_hash(model, salt) != root_hash(other_model, other_salt)


def test_model_and_salt_do_not_run_into_each_other() -> None:
    assert root_hash("ab", "c") != root_hash("a", "bc")


@given(tokens, tokens)
def test_names_differ_where_tokens_do(a: list[int], b: list[int]) -> None:
    assume(a != b)
    root = root_hash("m")
    assert block_hash(root, a) != block_hash(root, b)


def test_equal_tokens_after_different_ones_have_another_name() -> None:
    root = root_hash("m")
    assert block_hash(block_hash(root, [1]), [2]) != block_hash(block_hash(root, [3]), [2])

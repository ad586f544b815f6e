"""KV layouts: what two workers must agree on to pair."""

from dataclasses import replace

import pytest

from core.kv_layout import KVLayout

LAYOUT = KVLayout("m", "f" * 8, num_layers=4, num_kv_heads=2, head_size=64, block_size=16, dtype="float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "other"),
        ("num_layers", 5),
        ("num_kv_heads", 4),
        ("head_size", 32),
        ("dtype", "int8"),
        ("kind", "latent"),
        ("weights", "int8"),
    ],
)
def test_a_difference_that_matters_is_named_with_both_values(field: str, value: object) -> None:
    other = replace(LAYOUT, **{field: value})  # type: ignore[arg-type]
    assert LAYOUT.mismatch(other) == f"{field}: {getattr(LAYOUT, field)} on one side, {value} on the other"
    assert other.mismatch(LAYOUT) is not None


def test_block_size_and_the_name_of_the_model_may_differ() -> None:
    assert LAYOUT.mismatch(replace(LAYOUT, block_size=32, model="alias")) is None


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_count_k_and_v_of_all_heads(dtype: str, item_bytes: int) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    assert layout.bytes_per_token_per_layer == 2 * 2 * 64 * item_bytes
    assert layout.bytes_per_block == 4 * 16 * layout.bytes_per_token_per_layer


def test_int8_has_a_scale_for_each_vector() -> None:
    assert replace(LAYOUT, dtype="int8").bytes_per_token_per_layer == 2 * 2 * (64 + 4)


def test_a_latent_is_one_vector_a_token() -> None:
    latent = replace(LAYOUT, kind="latent", num_kv_heads=1, head_size=576, dtype="bfloat16")
    assert latent.bytes_per_token_per_layer == 576 * 2

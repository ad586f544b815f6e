"""Sampling parameters: each bad value is refused by the name of its field."""

import math

import pytest

from core.errors import ErrorCode, InvalidRequestError
from core.sampling import MAX_SEED, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 9),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: got ") as error:
        SamplingParams(**{"max_tokens": 8, field: value})  # type: ignore[arg-type]
    assert (error.value.field, error.value.code) == (field, ErrorCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("top_p", 1e-9), ("top_p", 1.0), ("top_k", 0), ("seed", MAX_SEED), ("min_tokens", 8)],
)
def test_the_ends_of_a_range_are_inside(field: str, value: float) -> None:
    assert getattr(SamplingParams(**{"max_tokens": 8, field: value}), field) == value  # type: ignore[arg-type]


def test_temperature_zero_is_greedy_and_nothing_else_is() -> None:
    assert SamplingParams(max_tokens=1, temperature=0.0).greedy
    assert not SamplingParams(max_tokens=1, temperature=1e-6, top_k=1).greedy

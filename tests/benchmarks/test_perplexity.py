"""What the precisions cost on the embedded model, held to bounds."""

import pytest

from benchmarks.perplexity import PRECISIONS, TINY, held_out_texts, perplexity
from engine.engine import Engine

MAX_CHANGE = {
    "bfloat16, bfloat16 KV": 0.002,
    "int8": 0.004,
    "int8, output matrix in float32": 0.004,
    "int4": 0.05,
    "int8 KV": 0.002,
    "int8, int8 KV": 0.004,
}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return held_out_texts(8)


@pytest.fixture(scope="module")
def exact(texts: list[list[int]]) -> float:
    return perplexity(Engine.from_checkpoint(TINY, PRECISIONS["float32"]), texts)


def test_every_precision_has_a_bound() -> None:
    assert PRECISIONS.keys() - MAX_CHANGE.keys() == {"float32"}


@pytest.mark.parametrize("precision", MAX_CHANGE)
def test_perplexity_changes_by_little(precision: str, texts: list[list[int]], exact: float) -> None:
    """By something it must, or the precision was not used."""
    change = perplexity(Engine.from_checkpoint(TINY, PRECISIONS[precision]), texts) / exact - 1
    assert 0 < abs(change) < MAX_CHANGE[precision]

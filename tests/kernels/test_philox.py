"""Philox against the vectors its authors publish, and the numbers made of it."""

import numpy as np
import pytest

from kernels.philox import philox4x32, uniforms

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and output of philox4x32 with 10 rounds: `kat_vectors` of the Random123 distribution."""


def column(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_known_answers_one_by_one() -> None:
    for counter, key, answer in KNOWN_ANSWERS:
        words = philox4x32(np.array([column(counter)], np.uint64).T, np.array([column(key)], np.uint64).T)
        assert words[:, 0].tolist() == column(answer)


def test_known_answers_side_by_side() -> None:
    columns = zip(*KNOWN_ANSWERS, strict=True)
    counters, keys, answers = (np.array([column(text) for text in texts], np.uint64).T for texts in columns)
    assert philox4x32(counters, keys).tolist() == answers.tolist()


def test_a_number_depends_on_its_own_seed_and_position_only() -> None:
    many = uniforms([7, 2**64 - 1, 7, 0], [5, 6, 2**40, 5])
    alone = [uniforms([seed], [position])[0] for seed, position in [(7, 5), (2**64 - 1, 6), (7, 2**40), (0, 5)]]
    assert many.tolist() == alone
    assert len(set(alone)) == 4
    assert uniforms([7], [5], draw=1)[0] != alone[0]


def test_both_halves_of_seed_and_position_count() -> None:
    assert len({uniforms([s], [p])[0] for s in (1, 1 << 32) for p in (1, 1 << 32)}) == 4


@pytest.mark.parametrize("by", ["seed", "position"])
def test_numbers_are_even_over_seeds_and_positions(by: str) -> None:
    """Chi-square over 100 bins, 99 degrees of freedom: beyond 149 once in a thousand."""
    index, ones = list(range(50_000)), [1] * 50_000
    numbers = uniforms(index, ones) if by == "seed" else uniforms(ones, index)
    assert 0 <= numbers.min() < 0.001 < 0.999 < numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 149
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02

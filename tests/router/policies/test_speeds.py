"""Lines fitted on line: right, robust, never absurd."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies.speeds import Average, Line

sizes = st.floats(0, 1e5)
times = st.floats(0, 1e3)


@given(st.floats(1e-5, 0.1), st.floats(1e-7, 1e-2), st.integers(0, 1000))
def test_a_line_is_found_again_whatever_the_prior_says(intercept: float, slope: float, seed: int) -> None:
    line, rng = Line(0.005, 1e-4, 512.0), random.Random(seed)
    for _ in range(200):
        x = rng.choice([16, 100, 700, 2048])
        line.observe(x, (intercept + slope * x) * rng.uniform(0.9, 1.1))
    for x in (100, 700, 2048):
        assert line.at(x) == pytest.approx(intercept + slope * x, rel=0.3)


@given(st.lists(st.tuples(sizes, times), max_size=60), sizes)
def test_predictions_are_never_negative_and_grow_with_size(readings: list[tuple[float, float]], x: float) -> None:
    line = Line(0.005, 1e-4, 512.0)
    for size, took_s in readings:
        line.observe(size, took_s)
    assert 0 <= line.at(x) <= line.at(x + 1) < math.inf


@given(st.integers(0, 100))
def test_one_wild_reading_changes_little(seed: int) -> None:
    line, rng = Line(0.005, 1e-4, 512.0), random.Random(seed)
    for _ in range(60):
        x = rng.choice([16, 100, 700, 2048])
        line.observe(x, (0.01 + 1e-5 * x) * rng.uniform(0.95, 1.05))
    before = line.at(500)
    line.observe(500, 60.0)
    assert line.at(500) == pytest.approx(before, rel=0.1)


def test_a_change_that_lasts_is_believed() -> None:
    line = Line(0.005, 1e-4, 512.0)
    for took_s in (0.01, 0.5):
        for i in range(120):
            line.observe(100 + i % 7, took_s)
    assert line.at(103) == pytest.approx(0.5, rel=0.15)


def test_where_all_readings_are_of_one_size_the_prior_tells_the_others() -> None:
    line = Line(0.0, 1e-4, 512.0)
    for _ in range(50):
        line.observe(1000, 0.01)
    assert line.at(1000) == pytest.approx(0.01, rel=0.05)
    assert line.at(2000) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("reading", [(-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_what_is_no_reading_is_ignored(reading: tuple[float, float]) -> None:
    line = Line(0.005, 1e-4, 512.0)
    line.observe(*reading)
    assert line.num_readings == 0


def test_an_average_starts_with_its_first_reading_and_forgets() -> None:
    average = Average(128.0)
    average.observe(10.0)
    assert average.value == 10.0
    for _ in range(400):
        average.observe(30.0)
    assert average.value == pytest.approx(30.0, rel=0.01)

"""The model of both sides of a transfer is worth something: it finds each bug that is planted."""

from __future__ import annotations

import pytest

from core.errors import IntegrityError
from tests.cluster.ownership_bugs import BUGS
from tests.cluster.test_ownership_model import history

MAX_HISTORIES = 300


@pytest.mark.parametrize("name", BUGS)
def test_the_model_finds_that(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    BUGS[name](monkeypatch)
    with pytest.raises((AssertionError, IntegrityError)):
        sum(map(history, range(MAX_HISTORIES)))

"""What a shared secret proves, and what it does not show."""

from __future__ import annotations

import pytest

from core.secret import Part, Secret

SECRET = Secret(b"a secret of the cluster")


@pytest.mark.parametrize(
    ("purpose", "parts"),
    [
        ("other", ("a", "b")),
        ("ticket", ("b", "a")),
        ("ticket", ("ab", "")),
        ("ticket", ("a", "b", "")),
        ("ticketa", ("b",)),
        ("ticket", ("a",)),
    ],
)
def test_a_proof_is_good_for_its_own_words_alone(purpose: str, parts: tuple[Part, ...]) -> None:
    proof = SECRET.prove("ticket", "a", "b")
    assert SECRET.accepts(proof, "ticket", "a", "b")
    assert not SECRET.accepts(proof, purpose, *parts)


@pytest.mark.parametrize("other", [Secret(b"another secret"), SECRET.derive("session"), Secret(b"")])
def test_who_has_another_secret_proves_nothing(other: Secret) -> None:
    assert not SECRET.accepts(other.prove("ticket", "a"), "ticket", "a")
    assert not SECRET.accepts(b"", "ticket", "a")


def test_no_secret_shows() -> None:
    assert "cluster" not in f"{SECRET!r} {SECRET} {[SECRET]}"

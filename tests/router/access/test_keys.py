"""Keys: whose one is, what the file says, and how much their owners may ask."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.errors import ConfigError, ForbiddenError, InvalidRequestError, OverloadedError, UnauthenticatedError
from router.access.access import Access
from router.access.bucket import Bucket
from router.access.config import SecurityConfig, from_environment
from router.access.keys import KeyRing, add_to_file, new_key, read_file

SALT, HASH = "0" * 32, "0" * 64


def line(**values: object) -> str:
    return json.dumps({"id": "a", "salt": SALT, "sha256": HASH, **values})


def make_file(folder: Path, *ids: str, **limits: Any) -> tuple[Path, list[str]]:
    path, keys = folder / "keys.jsonl", []
    for key_id in ids:
        key, record = new_key(key_id, **limits)
        add_to_file(path, record)
        keys.append(key)
    return path, keys


def test_each_key_of_the_file_is_its_owners_and_a_changed_one_is_nobodys(tmp_path: Path) -> None:
    path, keys = make_file(tmp_path, "team-a", "team-b")
    ring = KeyRing((), path, ManualClock())
    assert [getattr(ring.find(key), "id", None) for key in keys] == ["team-a", "team-b"]
    a, b = keys
    mixed = a.split(".")[0] + "." + b.split(".")[1]
    assert [ring.find(wrong) for wrong in (a[:-1], a + "x", mixed, "", "sk-", "é" * 9, a * 99)] == [None] * 7


def test_the_file_has_no_key_in_it_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    path, (key,) = make_file(tmp_path, "team-a")
    assert key not in path.read_text()
    assert key.split(".")[1] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_key_of_one_id_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path, "team-a")
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"id: got 'team-a', is in .* already"):
        make_file(tmp_path, "team-a")
    assert path.read_text() == before


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path, (old,) = make_file(tmp_path, "old")
    clock = ManualClock()
    ring = KeyRing((), path, clock)
    key, record = new_key("new")
    add_to_file(path, record)
    assert ring.find(key) is None  # looked at a moment ago
    clock.advance(1.0)
    assert ring.find(key) == record
    path.write_text("{ not json")
    clock.advance(1.0)
    assert ring.find(key) == record
    path.write_text("# both are revoked\n")
    clock.advance(1.0)
    assert (ring.find(key), ring.find(old)) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: got 'a line', must be JSON"),
        ("[]", "line 1: got 'a line', must be a JSON object"),
        (line(secret="hunter2"), "line 1: got 'a line', must be a JSON object"),
        (line() + "\n\n# two\n" + line(), "line 4: got 'a', is there twice"),
        (line(id="a b"), "line 1: id: got 'a b', must be 1 to 63 of"),
        (line(salt="xyz"), "line 1: salt: got 'a value', must be 32 hexadecimal"),
        (line(sha256=5), "line 1: sha256: got 'a value', must be 64 hexadecimal"),
        (line(tokens_per_minute=0), "line 1: tokens_per_minute: got 0, must be a number > 0"),
        (line(requests_per_minute=True), "line 1: requests_per_minute: got True, must be a number > 0"),
        (line(admin="yes"), "line 1: admin: got 'yes', must be true or false"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as failure:
        read_file(path)
    assert message in str(failure.value)
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize("header", [None, "", "Basic eDp5", "Bearer", "Bearer ", "Bearer wrong-wrong-wrong-wrong"])
def test_without_the_key_nobody_enters(header: str | None) -> None:
    access = Access(SecurityConfig(api_key=("a-key-of-16-chars",)), ManualClock())
    with pytest.raises(UnauthenticatedError):
        access.enter(header, counts=False, admin=False)


def test_with_no_keys_configured_everybody_may_do_everything() -> None:
    assert Access(SecurityConfig(), ManualClock()).enter(None, counts=True, admin=True) is None


def test_only_admins_may_do_what_is_for_admins(tmp_path: Path) -> None:
    path, (key,) = make_file(tmp_path, "team-a")
    access = Access(SecurityConfig(api_key=("a-key-of-16-chars",), api_keys_file=path), ManualClock())
    assert access.enter("bearer a-key-of-16-chars", counts=False, admin=True)
    with pytest.raises(ForbiddenError, match="'team-a' is not one of an admin"):
        access.enter(f"Bearer {key}", counts=False, admin=True)


def test_requests_over_the_quota_are_told_exactly_how_long_to_wait(tmp_path: Path) -> None:
    path, (key,) = make_file(tmp_path, "a", requests_per_minute=2)
    clock = ManualClock()
    access = Access(SecurityConfig(api_keys_file=path), clock)
    for _ in range(2):
        access.enter(f"Bearer {key}", counts=True, admin=False)
    with pytest.raises(OverloadedError, match="has used up its 2 requests per minute") as refusal:
        access.enter(f"Bearer {key}", counts=True, admin=False)
    assert refusal.value.retry_after_s == pytest.approx(30.0)
    access.enter(f"Bearer {key}", counts=False, admin=False)
    clock.advance(refusal.value.retry_after_s)
    access.enter(f"Bearer {key}", counts=True, admin=False)


def test_tokens_are_taken_as_they_come_and_a_debt_is_paid_before_the_next_request(tmp_path: Path) -> None:
    path, (key,) = make_file(tmp_path, "a", tokens_per_minute=60)
    clock = ManualClock()
    access = Access(SecurityConfig(api_keys_file=path), clock)
    caller = access.enter(f"Bearer {key}", counts=False, admin=False)
    assert caller is not None
    caller.check_tokens(60)
    caller.spend(60)
    caller.spend(20)
    with pytest.raises(OverloadedError, match="60 tokens per minute") as refusal:
        caller.check_tokens(10)
    assert refusal.value.retry_after_s == pytest.approx(30.0)
    clock.advance(30.0)
    caller.check_tokens(10)
    with pytest.raises(InvalidRequestError, match="must be at most 60 tokens: the key's quota"):
        caller.check_tokens(61)


def test_quotas_outlive_a_reload_that_does_not_change_them(tmp_path: Path) -> None:
    path, (key,) = make_file(tmp_path, "a", requests_per_minute=1)
    clock = ManualClock()
    access = Access(SecurityConfig(api_keys_file=path), clock)
    access.enter(f"Bearer {key}", counts=True, admin=False)
    make_file(tmp_path, "b")
    clock.advance(1.0)
    with pytest.raises(OverloadedError):
        access.enter(f"Bearer {key}", counts=True, admin=False)


@given(
    per_minute=st.floats(0.1, 1e6),
    steps=st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 1.0)), max_size=30),
)
def test_whoever_waits_as_told_never_gets_more_than_the_pace_and_one_bucket(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now_s, taken = Bucket(per_minute, 0.0), 0.0, 0.0
    for pause_s, share in steps:
        now_s += pause_s
        amount = share * per_minute
        now_s += bucket.wait_s(amount, now_s) * (1 + 1e-9) + 1e-9
        assert bucket.wait_s(amount, now_s) <= 1e-6
        bucket.take(amount, now_s)
        taken += amount
        assert taken <= (per_minute + now_s * per_minute / 60.0) * (1 + 1e-6) + 1e-6
    assert math.isinf(bucket.wait_s(per_minute * 1.01, now_s))


WRONG: list[tuple[dict[str, object], str]] = [
    ({"api_key": ("short",)}, "security.api_key: got 'a key of 5 characters', must be at least 16"),
    ({"ssl_keyfile": Path("k")}, "security.ssl_certfile: got None, must be set"),
    ({"ssl_certfile": Path("c")}, "security.ssl_keyfile: got None, must be set"),
    ({"ssl_cert_reqs": 1}, "security.ssl_cert_reqs: got 1, must be 0 (no) or 2 (required)"),
    ({"ssl_cert_reqs": 2}, "security.ssl_ca_certs: got None, must be set where ssl_cert_reqs is 2"),
    ({"api_keys_file": Path("/none")}, "security.api_keys_file: got '/none', must be a file that exists"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_what_can_not_be_is_refused_at_the_start(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        SecurityConfig(**values)  # type: ignore[arg-type]
    assert message in str(failure.value)


def test_keys_show_in_no_repr() -> None:
    assert "a-key-of-16-chars" not in repr(SecurityConfig(api_key=("a-key-of-16-chars",)))


def test_the_environments_key_counts_where_none_is_configured() -> None:
    environment = {"PENSTOCK_API_KEY": "environments-own-key"}
    assert from_environment(SecurityConfig(), environment).api_key == ("environments-own-key",)
    assert from_environment(SecurityConfig(api_key=("a-key-of-16-chars",)), environment).api_key == (
        "a-key-of-16-chars",
    )

"""API keys: how they look, how they are kept, and whose a given one is.

A key is `sk-ID.SECRET`, where SECRET is 256 random bits. The file keeps SHA-256 over a salt and the key. A slow hash
(scrypt) protects what people choose, for that can be guessed; 256 random bits can't, whatever a guess costs, and a slow
hash at the door would be a way to keep the router busy without a key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from core.clock import Clock
from core.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "sk-"
CHECK_INTERVAL_S = 1.0
"""How old news of a changed file may get."""
MAX_PRESENTED_LEN = 512
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One line of a key file. `id` names its owner, the tenant; limits are None where there are none."""

    id: str
    salt: str
    sha256: str
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    admin: bool = False

    def matches(self, key: str) -> bool:
        """In a time that tells nothing."""
        return hmac.compare_digest(_hash(self.salt, key), self.sha256)


_FIELDS = {f.name for f in fields(KeyRecord)}
_NOBODY = KeyRecord("", "00" * _SALT_BYTES, "00" * 32)


def new_key(
    key_id: str,
    *,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    admin: bool = False,
) -> tuple[str, KeyRecord]:
    """A fresh key and what to keep of it. `ConfigError` where the name or a limit can't be."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    key, salt = f"{PREFIX}{key_id}.{secret}", secrets.token_hex(_SALT_BYTES)
    record = KeyRecord(key_id, salt, _hash(salt, key), requests_per_minute, tokens_per_minute, admin)
    _check(record, "key")
    return key, record


def add_to_file(path: Path, record: KeyRecord) -> None:
    """Made where it is not there, for its owner's eyes only. `ConfigError` where the id is taken, or it can't be
    written."""
    known = read_file(path) if path.exists() else []
    if any(other.id == record.id for other in known):
        raise ConfigError("id", record.id, f"is in {path} already: delete its line to revoke it")
    lines = [json.dumps(_sparse(each)) for each in [*known, record]]
    new = path.with_name(f".{path.name}.new")
    try:
        new.touch(0o600)
        new.chmod(0o600)
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        new.replace(path)  # a router that reads just now sees the old file or the new one
    except OSError as error:
        raise ConfigError("file", str(path), f"can't be written: {error.strerror}") from error


def read_file(path: Path) -> list[KeyRecord]:
    """One JSON object a line; empty lines and such that begin with # are passed over. `ConfigError` names the line,
    never what stands there."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("security.api_keys_file", str(path), "can't be read as text") from error
    records: dict[str, KeyRecord] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        record = _parse(line, f"security.api_keys_file, line {number}")
        if record.id in records:
            raise ConfigError(f"security.api_keys_file, line {number}", record.id, "is there twice")
        records[record.id] = record
    return [*records.values()]


class KeyRing:
    """Whose a key is. Reads `path` again when it has changed; where that fails, what was read before stays valid."""

    def __init__(self, plain: Sequence[str], path: Path | None, clock: Clock) -> None:
        self._plain = [_plain_record(index, key) for index, key in enumerate(plain)]
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._by_id = {record.id: record for record in read_file(path)} if path else {}
        self._checked_s = clock()

    def find(self, presented: str) -> KeyRecord | None:
        """None for a key of nobody's."""
        if len(presented) > MAX_PRESENTED_LEN:
            return None
        self._refresh()
        key_id = presented.removeprefix(PREFIX).partition(".")[0]
        candidates = [*self._plain, self._by_id.get(key_id, _NOBODY)]
        found = [record for record in candidates if record.matches(presented)]  # all of them: no early way out
        return found[0] if found else None

    def _refresh(self) -> None:
        now_s = self._clock()
        if self._path is None or now_s - self._checked_s < CHECK_INTERVAL_S:
            return
        self._checked_s = now_s
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._by_id = {record.id: record for record in read_file(self._path)}
            log.info("the key file has changed: it has %d keys now", len(self._by_id))
        except ConfigError as error:
            log.error("the key file has changed and is of no use; the keys read before stay valid: %s", error)


def _plain_record(index: int, key: str) -> KeyRecord:
    salt = secrets.token_hex(_SALT_BYTES)
    return KeyRecord("default" if index == 0 else f"default-{index}", salt, _hash(salt, key), admin=True)


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + key.encode()).hexdigest()


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status else None


def _sparse(record: KeyRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value not in (None, False)}


def _parse(line: str, where: str) -> KeyRecord:
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or not {"id", "salt", "sha256"} <= values.keys() <= _FIELDS:
            raise ConfigError(where, "a line", f"must be a JSON object with some of {', '.join(sorted(_FIELDS))}")
        record = KeyRecord(**values)
    except ValueError as error:
        raise ConfigError(where, "a line", "must be JSON, as `penstock keys add` writes it") from error
    _check(record, where)
    return record


def _check(record: KeyRecord, where: str) -> None:
    if not isinstance(record.id, str) or not _ID.fullmatch(record.id):
        raise ConfigError(f"{where}: id", record.id, "must be 1 to 63 of A-Z a-z 0-9 _ -, the first a letter or digit")
    for name, length in (("salt", 2 * _SALT_BYTES), ("sha256", 64)):
        value = getattr(record, name)
        if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{length}}}", value):
            raise ConfigError(f"{where}: {name}", "a value", f"must be {length} hexadecimal digits")
    for name in ("requests_per_minute", "tokens_per_minute"):
        value = getattr(record, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{where}: {name}", value, "must be a number > 0, or left out")
    if not isinstance(record.admin, bool):
        raise ConfigError(f"{where}: admin", record.admin, "must be true or false")

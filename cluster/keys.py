"""`penstock keys add`: make an API key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from router.access.keys import add_to_file, new_key


@dataclass(frozen=True, slots=True)
class KeysAdd:
    """Make an API key, add its hash to a file, and print the key: nobody can tell it a second time.

    A router with `--api-keys-file FILE` takes it within a second. Who deletes its line revokes it.
    """

    id: Annotated[str, tyro.conf.Positional]
    """Names the owner: the tenant of its requests."""
    file: Path
    """The file with the hashes; made where it is not there."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and outputs together."""
    admin: bool = False
    """May also drain workers and flush caches, and cancel others' requests."""
    json: bool = False
    """Print one JSON object."""


def add(command: KeysAdd) -> int:
    key, record = new_key(
        command.id,
        requests_per_minute=command.requests_per_minute,
        tokens_per_minute=command.tokens_per_minute,
        admin=command.admin,
    )
    add_to_file(command.file, record)
    if command.json:
        limits = {name: value for name, value in asdict(record).items() if name not in ("salt", "sha256")}
        print(json.dumps({"key": key, **limits}))
    else:
        print(key)
    return 0

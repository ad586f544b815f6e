"""How a client says who it is, and knows whom it talks to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import grpc

API_KEY_VARIABLE = "PENSTOCK_API_KEY"
HEADER = "authorization"

PathLike = str | os.PathLike[str]


def authorization(api_key: str | None, metadata: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What to send besides `metadata`, whose own authorization wins. `ValueError` where the key can't be one."""
    if any(name.lower() == HEADER for name, _ in metadata):
        return []
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    if not (key.isascii() and key.isprintable()):
        raise ValueError("api_key: must be printable ASCII")
    return [(HEADER, f"Bearer {key}")] if key else []


def tls_credentials(
    ca_certs: PathLike | None, certfile: PathLike | None, keyfile: PathLike | None
) -> grpc.ChannelCredentials | None:
    """None where none of them is given: no TLS. `ValueError` for half of a pair, `OSError` for a file that can't be
    read."""
    if (certfile is None) != (keyfile is None):
        missing = "ssl_certfile" if certfile is None else "ssl_keyfile"
        raise ValueError(f"{missing}: must be given, for the other of certificate and key is")
    if ca_certs is None and certfile is None:
        return None
    return grpc.ssl_channel_credentials(_read(ca_certs), _read(keyfile), _read(certfile))


def _read(path: PathLike | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()

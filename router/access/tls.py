"""TLS of the front doors."""

from __future__ import annotations

from pathlib import Path

import grpc

from core.errors import ConfigError
from router.access.config import SecurityConfig


def grpc_credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """None where clients speak in the clear. Files are read once. `ConfigError` where one can't be."""
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        return None
    pair = (_read("ssl_keyfile", config.ssl_keyfile), _read("ssl_certfile", config.ssl_certfile))
    roots = _read("ssl_ca_certs", config.ssl_ca_certs) if config.ssl_ca_certs else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=config.ssl_cert_reqs == 2)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.{name}", str(path), f"can't be read: {error.strerror}") from error

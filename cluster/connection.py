"""How the `penstock` commands reach a cluster that has keys or certificates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from penstock import Client


@dataclass(frozen=True, slots=True)
class Connection:
    """What a client needs beside the target."""

    api_key: str | None = field(default=None, repr=False)
    """The environment's PENSTOCK_API_KEY by default, which others of this machine can't see."""
    ssl_ca_certs: Path | None = None
    """Certificates that the server's own must be signed by, PEM: the connection then is TLS."""
    ssl_certfile: Path | None = None
    """A certificate of this client, PEM, where the server asks for one."""
    ssl_keyfile: Path | None = None
    """The private key that belongs to it, PEM."""

    def client(self, target: str) -> Client:
        return Client(
            target,
            api_key=self.api_key,
            ssl_ca_certs=self.ssl_ca_certs,
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
        )

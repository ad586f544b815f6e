"""Between routers and workers: the cluster's secret, and mutual TLS where it has a certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from core.errors import ConfigError
from core.secret import MIN_SECRET_LEN, Secret
from router.access.config import SecurityConfig

SERVER_NAME = "penstock"
"""What the cluster's certificate is for, on whatever host it is shown: a DNS name among its subjectAltNames."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM."""

    key: bytes = field(repr=False)
    chain: bytes
    authorities: bytes


@dataclass(frozen=True, slots=True)
class WorkerNetwork:
    """What routers and workers of one cluster share, each with both ends of every connection."""

    secret: Secret | None = None
    certificate: Certificate | None = None

    @classmethod
    def of(cls, config: SecurityConfig) -> WorkerNetwork:
        """Reads the files. `ConfigError` where one is of no use."""
        value = config.cluster_secret.encode()
        if config.cluster_secret_file is not None:
            value = _read("cluster_secret_file", config.cluster_secret_file).strip()
            if len(value) < MIN_SECRET_LEN:
                fix = f"must hold at least {MIN_SECRET_LEN} characters, better 32 random ones"
                raise ConfigError("security.cluster_secret_file", str(config.cluster_secret_file), fix)
        names = ("cluster_ssl_keyfile", "cluster_ssl_certfile", "cluster_ssl_ca_certs")
        files = {name: getattr(config, name) for name in names}
        certificate = Certificate(*(_read(name, path) for name, path in files.items())) if all(files.values()) else None
        return cls(Secret(value) if value else None, certificate)

    def listen(self, server: grpc.Server | grpc.aio.Server, address: str) -> int:
        """The port. RuntimeError where the address can't be had."""
        if self.certificate is None:
            return server.add_insecure_port(address)
        pair, roots = (self.certificate.key, self.certificate.chain), self.certificate.authorities
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair], roots, require_client_auth=True))

    def dial(self, address: str, options: tuple[tuple[str, str | int], ...] = ()) -> grpc.Channel:
        if (credentials := self._credentials()) is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, credentials, (*options, ("grpc.ssl_target_name_override", SERVER_NAME)))

    def dial_aio(self, address: str, options: tuple[tuple[str, str | int], ...] = ()) -> grpc.aio.Channel:
        if (credentials := self._credentials()) is None:
            return grpc.aio.insecure_channel(address, options)
        options = (*options, ("grpc.ssl_target_name_override", SERVER_NAME))
        return grpc.aio.secure_channel(address, credentials, options)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if (own := self.certificate) is None:
            return None
        return grpc.ssl_channel_credentials(own.authorities, own.key, own.chain)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.{name}", str(path), f"can't be read: {error.strerror}") from error

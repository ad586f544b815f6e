"""Keys and certificates of the front doors, as a user writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from core.errors import ConfigError
from core.secret import MIN_SECRET_LEN

MIN_KEY_LEN = 16
API_KEY_VARIABLE = "PENSTOCK_API_KEY"
SECRET_VARIABLE = "PENSTOCK_CLUSTER_SECRET"


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Who may use the cluster, and how connections are protected. By default anybody may who can reach it."""

    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients must send one of, as `Authorization: Bearer KEY`; each may do everything. The environment's
    PENSTOCK_API_KEY counts where none is given. Others of this machine may see it; `api_keys_file` is better."""
    api_keys_file: Path | None = None
    """Keys with names and limits, as `penstock keys add` writes them; read again when it changes."""
    ssl_keyfile: Path | None = None
    """Private key of the front doors, PEM: clients then speak TLS, gRPC and HTTP alike."""
    ssl_certfile: Path | None = None
    """Certificate that belongs to it, PEM, with those it is signed by."""
    ssl_ca_certs: Path | None = None
    """Certificates that clients' own must be signed by, PEM; needed with `ssl_cert_reqs` 2."""
    ssl_cert_reqs: int = 0
    """Whether clients must have a certificate (mutual TLS): 0 no, 2 yes, as Python's `ssl.CERT_REQUIRED`."""
    cluster_secret: str = field(default="", repr=False)
    """What routers and workers prove to each other that they know, and sign tickets with. The environment's
    PENSTOCK_CLUSTER_SECRET counts where none is given."""
    cluster_secret_file: Path | None = None
    """A file with it, on every machine of the cluster."""
    cluster_ssl_keyfile: Path | None = None
    """Private key of the cluster's certificate, PEM: routers and workers then speak mutual TLS."""
    cluster_ssl_certfile: Path | None = None
    """The certificate of all its routers and workers, PEM, for the DNS name `penstock`."""
    cluster_ssl_ca_certs: Path | None = None
    """Certificates that it must be signed by, PEM."""

    def __post_init__(self) -> None:
        for key in self.api_key:
            if len(key) < MIN_KEY_LEN or not key.isascii() or not key.isprintable() or " " in key:
                fix = f"must be at least {MIN_KEY_LEN} printable ASCII characters without spaces"
                raise ConfigError("security.api_key", f"a key of {len(key)} characters", fix)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            missing = "ssl_keyfile" if self.ssl_keyfile is None else "ssl_certfile"
            raise ConfigError(f"security.{missing}", None, "must be set: the other of key and certificate is")
        if self.ssl_cert_reqs not in (0, 2):
            raise ConfigError("security.ssl_cert_reqs", self.ssl_cert_reqs, "must be 0 (no) or 2 (required)")
        if self.ssl_cert_reqs and (self.ssl_ca_certs is None or self.ssl_certfile is None):
            missing = "ssl_ca_certs" if self.ssl_ca_certs is None else "ssl_certfile"
            raise ConfigError(f"security.{missing}", None, "must be set where ssl_cert_reqs is 2")
        for name in (f.name for f in fields(self) if f.name.endswith(("file", "ca_certs"))):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"security.{name}", str(path), "must be a file that exists")

        if self.cluster_secret and len(self.cluster_secret) < MIN_SECRET_LEN:
            length = f"a secret of {len(self.cluster_secret)} characters"
            raise ConfigError("security.cluster_secret", length, f"must have at least {MIN_SECRET_LEN}")
        if self.cluster_secret and self.cluster_secret_file:
            raise ConfigError("security.cluster_secret", "a secret", "must be left out: cluster_secret_file is set")
        names = ("cluster_ssl_keyfile", "cluster_ssl_certfile", "cluster_ssl_ca_certs")
        unset = [name for name in names if getattr(self, name) is None]
        if 0 < len(unset) < len(names):
            raise ConfigError(f"security.{unset[0]}", None, "must be set: others of key, certificate and CA are")

    @property
    def has_worker_door(self) -> bool:
        """Whether workers register at a port of their own: they and clients have different certificates, or only some
        have."""
        return self.has_tls or self.has_cluster_tls

    @property
    def has_cluster_tls(self) -> bool:
        return self.cluster_ssl_certfile is not None

    @property
    def has_tls(self) -> bool:
        return self.ssl_certfile is not None


def from_environment(config: SecurityConfig, environment: Mapping[str, str]) -> SecurityConfig:
    """With PENSTOCK_API_KEY and PENSTOCK_CLUSTER_SECRET, where the configuration names no keys, or no secret."""
    key, secret = environment.get(API_KEY_VARIABLE), environment.get(SECRET_VARIABLE)
    if key and not (config.api_key or config.api_keys_file):
        config = replace(config, api_key=(key,))
    if secret and not (config.cluster_secret or config.cluster_secret_file):
        config = replace(config, cluster_secret=secret)
    return config

"""A whole cluster with everything on: keys, TLS, a secret, and mutual TLS between its processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import EMBEDDED_MODEL, main
from cluster.cluster import Cluster
from cluster.config import ClusterConfig
from engine.config import EngineConfig
from penstock import AuthenticationError, Client
from router.access.config import SecurityConfig
from router.access.keys import add_to_file, new_key
from router.config import RouterConfig
from tests.certificates import make_certificate

SECRET = "the cluster's own secret"


def test_it_serves_those_who_are_let_in_and_shows_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key, record = new_key("team-a", tokens_per_minute=10_000)
    add_to_file(tmp_path / "keys", record)
    (tmp_path / "secret").write_text(SECRET)
    server, inside = make_certificate(tmp_path, "server"), make_certificate(tmp_path, "penstock")
    config = ClusterConfig(
        model=EMBEDDED_MODEL,
        launcher="subprocess",
        log_level="info",
        engine=EngineConfig(num_blocks=64, num_threads=1),
        router=RouterConfig(grpc_port=0, http_port=0),
        security=SecurityConfig(
            api_keys_file=tmp_path / "keys",
            ssl_certfile=server.certfile,
            ssl_keyfile=server.keyfile,
            cluster_secret_file=tmp_path / "secret",
            cluster_ssl_certfile=inside.certfile,
            cluster_ssl_keyfile=inside.keyfile,
            cluster_ssl_ca_certs=inside.certfile,
        ),
    )
    with Cluster(config) as cluster:
        target = cluster.endpoints.grpc
        with Client(target, api_key=key, ssl_ca_certs=server.certfile, timeout_s=60) as client:
            assert client.generate("def __init__(self", max_tokens=4, temperature=0, disaggregate="require").text
            assert [pair.up for pair in client.server_info().pairs] == [True]
        with Client(target, ssl_ca_certs=server.certfile, timeout_s=60) as stranger, pytest.raises(AuthenticationError):
            stranger.server_info()
        arguments = ["status", "--target", target, "--ssl-ca-certs", str(server.certfile), "--api-key", key, "--json"]
        assert main(arguments) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["workers"]
    for secret in (key, key.split(".")[1], record.sha256, SECRET):
        assert secret not in said.out + said.err

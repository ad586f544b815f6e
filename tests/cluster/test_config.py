"""cluster.yaml: what is wrong is named by field, value and fix; what is right goes through JSON and back unchanged."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig, PoolConfig, from_json, load_config, to_json
from cluster.spec import Endpoints, RouterSpec, Started, WorkerSpec
from core.errors import ConfigError
from core.messages import WorkerRole
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from router.config import DispatchConfig, RouterConfig, SessionConfig

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "cluster.yaml"


def load(folder: Path, text: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


WRONG = [
    # ---- not a field
    ("modle: m", "modle: got 'm', is not a field; did you mean 'model'?"),
    ("{model: m, zzz: 1}", "zzz: got 1, is not a field; known: decode, drain_timeout_s, engine, host, "),
    ("{model: m, block_size: 8}", "block_size: got 8, is not a field; did you mean 'engine.block_size'?"),
    ("{model: m, engine: {blok_size: 8}}", "engine.blok_size: got 8, is not a field; did you mean 'block_size'?"),
    ("{model: m, router: {lease_s: 1}}", "router.lease_s: got 1, is not a field; known: allowed_origins, "),
    (
        "{model: m, router: {max_attempts: 1}}",
        "router.max_attempts: got 1, is not a field; did you mean 'router.dispatch.max_attempts'?",
    ),
    (
        "{model: m, router: {dispatch: {max_attempt: 1}}}",
        "router.dispatch.max_attempt: got 1, is not a field; did you mean 'max_attempts'?",
    ),
    ("{model: m, 7: x}", "7: got 'x', is not a field; known: "),
    # ---- not of the field's type
    ("model: 3", "model: got 3, must be a path"),
    ("model: [m]", "model: got ['m'], must be a path"),
    ("{model: m, served_model_name: 5}", "served_model_name: got 5, must be a valid string"),
    ("{model: m, launcher: k8s}", "launcher: got 'k8s', must be 'ray' or 'subprocess'"),
    ("{model: m, log_level: WARN}", "log_level: got 'WARN', must be 'debug', 'info', 'warning' or 'error'"),
    ("{model: m, drain_timeout_s: soon}", "drain_timeout_s: got 'soon', must be a valid number, unable to parse"),
    ("{model: m, engine: {block_size: 1.5}}", "engine.block_size: got 1.5, must be a valid integer, got a number with"),
    ("{model: m, engine: {block_size: true}}", "engine.block_size: got True, must not be a boolean"),
    ("{model: m, engine: {num_blocks: many}}", "engine.num_blocks: got 'many', must be a valid integer"),
    ("{model: m, engine: {dtype: int8}}", "engine.dtype: got 'int8', must be 'auto', 'float32', 'bfloat16' or"),
    ("{model: m, prefill: {num_workers: }}", "prefill.num_workers: got None, must be a valid integer"),
    ("{model: m, engine: 3}", "engine: got 3, must be a mapping of fields; known: block_size, "),
    ("{model: m, router: {sessions: []}}", "router.sessions: got [], must be a mapping of fields; known: heartbeat"),
    ("{model: m, prefill: }", "prefill: got None, must be a mapping of fields; known: num_workers, num_cpus, num_gpus"),
    # ---- missing
    ("", "model: got None, must be set: it has no default"),
    ("launcher: ray", "model: got None, must be set: it has no default"),
    # ---- not YAML, or not a mapping
    ("[1, 2]", "config: got [1, 2], must be a mapping of fields; known: model, "),
    ("false", "config: got False, must be a mapping of fields; known: model, "),
    # ---- out of range
    ("{model: m, startup_timeout_s: 0}", "startup_timeout_s: got 0.0, must be > 0 seconds"),
    ("{model: m, drain_timeout_s: .nan}", "drain_timeout_s: got nan, must be > 0 seconds"),
    ("{model: m, prefill: {num_workers: -1}}", "prefill.num_workers: got -1, must be >= 0"),
    ("{model: m, mixed: {num_cpus: .nan}}", "mixed.num_cpus: got nan, must be >= 0"),
    ("{model: m, decode: {num_gpus: -0.5}}", "decode.num_gpus: got -0.5, must be >= 0"),
    (
        "{model: m, prefill: {num_workers: 0}}",
        "prefill.num_workers: got 0, must be >= 1, or mixed.num_workers must be",
    ),
    ("{model: m, decode: {num_workers: 0}}", "decode.num_workers: got 0, must be >= 1, or mixed.num_workers must be"),
    (
        "{model: m, launcher: subprocess, ray_address: auto}",
        "ray_address: got 'auto', must be left out with launcher 'subprocess'",
    ),
    (
        "{model: m, prefill: {num_workers: 0}, decode: {num_workers: 0}, mixed: {num_workers: 1}, "
        "router: {placement: {disaggregate: require}}}",
        "router.placement.disaggregate: got 'require', must be prefer or local with one worker, for it takes two",
    ),
    ("{model: m, engine: {block_size: 0}}", "engine.block_size: got 0, must be >= 1"),
    ("{model: m, engine: {num_threads: 0}}", "engine.num_threads: got 0, must be >= 1, or left out"),
    ("{model: m, engine: {kv_cache_memory_gib: 0}}", "engine.kv_cache_memory_gib: got 0.0, must be > 0"),
    ("{model: m, engine: {gpu_memory_utilization: 2}}", "engine.gpu_memory_utilization: got 2.0, must be in (0, 1]"),
    ("{model: m, router: {grpc_port: 65536}}", "router.grpc_port: got 65536, must be a port, or 0 for a free one"),
    ("{model: m, router: {http_port: -1}}", "router.http_port: got -1, must be a port, or 0 for a free one"),
    ("{model: m, router: {dispatch: {max_attempts: 0}}}", "router.dispatch.max_attempts: got 0, must be > 0"),
    (
        "{model: m, router: {dispatch: {accept_timeout_s: 1}}}",
        "router.dispatch.accept_timeout_s: got 1.0, must be at least accept_deadline_s = 10.0",
    ),
    (
        "{model: m, router: {sessions: {dead_after_s: 1}}}",
        "router.sessions.dead_after_s: got 1.0, must be longer than heartbeat_interval_s = 1.0",
    ),
    ("{model: m, transfer: {lease_s: 0}}", "transfer.lease_s: got 0.0, must be a finite number > 0"),
    ("{model: m, transfer: {lease_s: .nan}}", "transfer.lease_s: got nan, must be a finite number > 0"),
    (
        "{model: m, transfer: {silence_timeout_s: 1}}",
        "transfer.silence_timeout_s: got 1.0, must be > keepalive_s = 1",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message.partition(",")[0] for _, message in WRONG])
def test_what_is_wrong_is_named_by_path_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_broken_yaml_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: got 'cluster.yaml', is not YAML: line 3, column 1: ex") as caught:
        load(tmp_path, "model: m\nengine: {block_size: 8\n")
    assert "\n" not in str(caught.value)


def test_a_tag_that_would_make_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load(tmp_path, "model: !!python/object/apply:os.getcwd []")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not YAML: 'utf-8' codec can't decode"):
        load_config(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"config: got 'none.yaml', can't be read: No such file or directory: {path}"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_config(tmp_path)


# ---- what is right


def test_a_model_alone_is_enough(tmp_path: Path) -> None:
    assert load(tmp_path, "model: /m") == ClusterConfig(model=Path("/m"))


def test_a_relative_model_starts_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = tmp_path / "deep"
    folder.mkdir()
    config = load(folder, "model: ../tiny")
    assert config.model.resolve() == tmp_path / "tiny"
    assert config.model_name == "tiny"
    assert load_config(Path(os.path.relpath(folder / "cluster.yaml"))).model.resolve() == tmp_path / "tiny"


def test_clients_ask_for_the_given_name(tmp_path: Path) -> None:
    assert load(tmp_path, "{model: /m, served_model_name: mine}").model_name == "mine"


def test_one_mixed_worker_is_a_cluster(tmp_path: Path) -> None:
    text = "{model: /m, prefill: {num_workers: 0}, decode: {num_workers: 0}, mixed: {num_workers: 1}}"
    config = load(tmp_path, text)
    assert [pool.num_workers for pool in (config.prefill, config.decode, config.mixed)] == [0, 0, 1]


def test_a_section_keeps_the_defaults_it_does_not_name(tmp_path: Path) -> None:
    config = load(tmp_path, "{model: /m, router: {http_port: 0, dispatch: {max_attempts: 7}}}")
    assert config.router == RouterConfig(http_port=0, dispatch=DispatchConfig(max_attempts=7))


# ---- the documented file


def fields_of(kind: type, prefix: str = "") -> set[str]:
    """Dotted paths of all fields of a dataclass and of those within it."""
    hints = get_type_hints(kind)
    paths = set()
    for f in dataclasses.fields(kind):
        path = f"{prefix}{f.name}"
        nested = dataclasses.is_dataclass(hints[f.name])
        paths |= fields_of(hints[f.name], f"{path}.") if nested else {path}
    return paths


def keys_of(values: dict[str, Any], prefix: str = "") -> set[str]:
    paths = set()
    for key, value in values.items():
        paths |= keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
    return paths


def test_the_documented_file_holds_the_defaults() -> None:
    config = load_config(DOCUMENTED)
    assert config == ClusterConfig(model=config.model)


def test_the_documented_file_names_every_field() -> None:
    assert keys_of(yaml.safe_load(DOCUMENTED.read_text())) == fields_of(ClusterConfig)


def test_every_field_of_the_documented_file_has_a_comment_above_it() -> None:
    """But for the pools', whose three fields are told of once, above them."""
    pool = {f.name for f in dataclasses.fields(PoolConfig)}
    above = ""
    for line in DOCUMENTED.read_text().splitlines():
        field = line.strip().partition(":")[0]
        if field and not field.startswith("#") and field not in pool and field != "router":
            assert above.startswith("#"), line
        above = line.strip()


# ---- to other processes

positive = st.floats(0.1, 1e6)
counts = st.integers(1, 10**6)
engines = st.builds(
    EngineConfig,
    block_size=counts,
    num_blocks=st.none() | counts,
    kv_cache_memory_gib=positive,
    gpu_memory_utilization=st.floats(0.01, 1),
    max_model_len=st.none() | counts,
    dtype=st.sampled_from(["auto", "float16"]),
    num_threads=st.none() | counts,
)
transfers = st.builds(TransferConfig, lease_s=positive, keepalive_s=st.floats(0.1, 4.9), max_staging_mib=counts)
routers = st.builds(
    RouterConfig,
    host=st.text(),
    grpc_port=st.integers(0, 65535),
    dispatch=st.builds(DispatchConfig, max_attempts=counts, stats_grace_s=positive),
    sessions=st.builds(SessionConfig, pair_timeout_s=positive),
)
paths = st.text("aü /.", min_size=1).map(Path)
configs = st.one_of(
    st.builds(ClusterConfig, model=paths, served_model_name=st.none() | st.text(), engine=engines, router=routers),
    st.builds(RouterSpec, paths, st.text(), st.none() | counts, routers, st.text()),
    st.builds(
        WorkerSpec,
        st.text(),
        st.sampled_from(WorkerRole),
        paths,
        st.text(),
        engines,
        st.lists(st.integers(0, 255), max_size=4).map(tuple),
        transfers,
        st.text(),
        positive,
        positive,
        positive,
        st.text(),
    ),
    st.builds(Endpoints, st.text(), st.text()),
    st.builds(Started, st.none() | st.builds(Endpoints, st.text(), st.text()), st.text()),
)


@settings(max_examples=50)
@given(configs)
def test_json_gives_back_what_it_was_made_of(config: Any) -> None:
    text = to_json(config)
    assert from_json(type(config), text) == config
    assert "\n" not in text, "a specification is one line"

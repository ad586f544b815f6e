"""Workers of one host share its cores."""

from pathlib import Path

import pytest

from cluster import cluster
from cluster.config import ClusterConfig, PoolConfig
from engine.config import EngineConfig


def config(num_prefill: int, num_decode: int, engine: EngineConfig | None = None) -> ClusterConfig:
    return ClusterConfig(
        model=Path("models/penstock-tiny"),
        prefill=PoolConfig(num_workers=num_prefill),
        decode=PoolConfig(num_workers=num_decode),
        engine=engine or EngineConfig(),
    )


@pytest.fixture
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {8, 3, 4, 5, 6, 7})


@pytest.mark.usefixtures("six_cores")
def test_each_worker_has_cores_of_its_own() -> None:
    specs = cluster.worker_specs(config(1, 2))
    assert [spec.worker_id for spec in specs] == ["prefill-0", "decode-0", "decode-1"]
    assert [spec.cpus for spec in specs] == [(3, 4), (5, 6), (7, 8)]
    assert [spec.engine.num_threads for spec in specs] == [2, 2, 2]


@pytest.mark.usefixtures("six_cores")
def test_more_workers_than_cores_share_them_all() -> None:
    specs = cluster.worker_specs(config(3, 4))
    assert {spec.cpus for spec in specs} == {()}
    assert {spec.engine.num_threads for spec in specs} == {1}


@pytest.mark.usefixtures("six_cores")
def test_a_number_of_threads_that_the_user_gave_holds() -> None:
    assert {spec.engine.num_threads for spec in cluster.worker_specs(config(1, 1, EngineConfig(num_threads=5)))} == {5}

"""Who may import whom: the contracts of `.importlinter` hold, would notice a breach, and hold at run time too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKERS = {"kernels", "engine", "kv_transfer", "prefill_worker", "decode_worker", "cluster"}
ROOMS = {"core", "text", "telemetry", "router"} | WORKERS
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of this repository, applied to the packages in `folder`."""
    command = [sys.executable, "-c", LINT, "--config", str(ROOT / ".importlinter"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_every_room_keeps_to_the_table() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The rooms of this repository, each module in its place and all of them empty."""
    for room in ROOMS | {"client/penstock"}:
        for module in (ROOT / room).rglob("*.py"):
            copy = tmp_path / module.relative_to(ROOT / "client" if room.startswith("client") else ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
    return tmp_path


BREACHES = [
    ("core imports nothing of ours", "core/clock.py", "import kernels"),
    ("kernels imports nothing of ours", "kernels/checksum.py", "from core import kv_layout"),
    ("the SDK imports nothing of ours", "penstock/__init__.py", "from core import errors"),
    ("text imports core", "text/tokenizer.py", "import engine"),
    ("telemetry imports core", "telemetry/metrics.py", "import router"),
    ("engine imports core and kernels", "engine/engine.py", "import text"),
    (
        "kv_transfer imports core, kernels and the KV storage",
        "kv_transfer/any.py",
        "from engine import block_pool",
    ),
    ("prefill_worker imports core, engine and kv_transfer", "prefill_worker/half.py", "import decode_worker.half"),
    ("decode_worker imports core, engine and kv_transfer", "decode_worker/half.py", "import prefill_worker.half"),
    (
        "router imports core, text, telemetry and the wire",
        "router/policies/model.py",
        "from engine.config import EngineConfig",
    ),
    ("torch and ray stay out", "text/detokenizer.py", "import torch"),
    ("pure modules", "engine/scheduler.py", "import time"),
    ("pure modules", "core/request.py", "from grpc import StatusCode"),
]


@pytest.mark.parametrize(("contract", "module", "breach"), BREACHES, ids=[module for _, module, _ in BREACHES])
def test_a_breach_is_noticed(house: Path, contract: str, module: str, breach: str) -> None:
    (house / module).write_text(breach)
    done = lint(house)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), done.stdout


def test_what_the_table_allows_passes(house: Path) -> None:
    (house / "kv_transfer/any.py").write_text("from engine.kv_storage import KVStorage")
    (house / "prefill_worker/half.py").write_text("import core, engine.scheduler, kv_transfer")
    (house / "router/policies/model.py").write_text("import core, text, telemetry, penstock.v1")
    (house / "cluster/worker.py").write_text("import decode_worker, prefill_worker, router, torch, ray")
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr


LOAD = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), package.__name__ + "."):
    importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def loaded_by(package: str) -> set[str]:
    """Top-level packages in a fresh process that imported `package` and all its submodules."""
    command = [sys.executable, "-c", LOAD, package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        ("penstock", {"torch", "ray", "numpy", *ROOMS}),
        ("router", {"torch", "ray", *WORKERS}),
        ("core", {"torch", "ray", "grpc", "numpy", *ROOMS - {"core"}}),
        ("engine.scheduler", {"torch", "ray", "grpc", "numpy", *ROOMS - {"core", "engine"}}),
    ],
)
def test_importing_a_package_loads_nothing_it_should_not(package: str, unwanted: set[str]) -> None:
    loaded = loaded_by(package)
    assert package.partition(".")[0] in loaded
    assert not loaded & unwanted


def test_the_probe_sees_torch_where_it_is_loaded() -> None:
    assert "torch" in loaded_by("engine.kv_storage")

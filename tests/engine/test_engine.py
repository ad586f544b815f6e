"""The parts put together: sizes taken from the configuration, and whole requests from prompt to last token."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError, ConfigError
from core.request import FinishReason, Request, RequestState
from core.sampling import SamplingParams
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture
def folder(reference: Any) -> Path:
    path: Path = reference("qwen3_moe").folder
    return path


@pytest.fixture
def config(device: torch.device) -> EngineConfig:
    where: Any = device.type
    return EngineConfig(num_blocks=200, device=where, dtype="float32")


def request(name: str, length: int = 20, sampling: SamplingParams = GREEDY) -> Request:
    rng = random.Random(name)
    return Request(name, [rng.randrange(200) for _ in range(length)], sampling)


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    for each in requests:
        engine.scheduler.add(each)
    for _ in range(3000):
        if not engine.scheduler.requests:
            return [each.output_token_ids for each in requests]
        engine.step()
    pytest.fail("the engine does not come to an end")


def test_the_layout_is_that_of_model_and_configuration(folder: Path, config: EngineConfig) -> None:
    engine = Engine.from_checkpoint(folder, replace(config, block_size=8))
    layout = engine.layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_size, layout.block_size) == (3, 2, 24, 8)
    assert (layout.dtype, layout.fingerprint) == ("float32", Checkpoint.open(folder).fingerprint())
    assert engine.storage.read(2, (199,), 0, 8).nbytes == 8 * 2 * 2 * 24 * 4
    assert engine.pool.num_blocks == engine.storage.num_blocks == 200


def test_warming_up_leaves_nothing_behind_but_what_it_wrote(folder: Path, config: EngineConfig) -> None:
    cold, warm = (Engine.from_checkpoint(folder, config) for _ in range(2))
    warm.warm_up()
    warm.scheduler.check_integrity()
    assert warm.storage.layers[0][0].any()
    assert warm.pool.num_free_blocks == config.num_blocks
    zeros = Request("zeros", [0] * 20, GREEDY)  # begins with what was warmed up with
    assert run(warm, zeros) == run(cold, Request("zeros", [0] * 20, GREEDY))
    assert zeros.num_cached_tokens == 0


def test_auto_means_float32_on_cpu(folder: Path) -> None:
    engine = Engine.from_checkpoint(folder, EngineConfig(num_blocks=4, device="cpu"))
    assert (engine.layout.dtype, engine.storage.device.type) == ("float32", "cpu")


@pytest.mark.parametrize(
    ("num_blocks", "limit", "length"), [(200, None, 256), (200, 100, 100), (3, None, 48), (3, 40, 40)]
)
def test_the_length_is_the_least_of_all_limits(
    folder: Path, config: EngineConfig, num_blocks: int, limit: int | None, length: int
) -> None:
    changed = replace(config, num_blocks=num_blocks, max_model_len=limit)
    assert Engine.from_checkpoint(folder, changed).max_model_len == length


def test_blocks_are_as_many_as_memory_holds(folder: Path) -> None:
    block_bytes = 3 * 16 * 2 * 2 * 24 * 4
    config = EngineConfig(device="cpu", kv_cache_memory_gib=10.5 * block_bytes / 2**30)
    assert Engine.from_checkpoint(folder, config).pool.num_blocks == 10


def test_blocks_are_no_more_than_requests_can_use(folder: Path) -> None:
    config = EngineConfig(device="cpu", kv_cache_memory_gib=1.0, max_num_seqs=3, max_model_len=100)
    assert Engine.from_checkpoint(folder, config).pool.num_blocks == 3 * 7


def test_memory_for_less_than_a_block_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_memory_gib: got 1e-06, must leave room"):
        Engine.from_checkpoint(folder, EngineConfig(device="cpu", kv_cache_memory_gib=1e-6))


def test_a_length_beyond_the_model_is_refused(folder: Path, config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len: got 257, must be <= 256"):
        Engine.from_checkpoint(folder, replace(config, max_model_len=257))


def test_an_unknown_quantization_is_refused_with_the_choices() -> None:
    unknown: Any = "fp8"
    with pytest.raises(ConfigError, match=r"engine.quantization: got 'fp8', must be one of int8, w8a8, int4, w4a16"):
        EngineConfig(quantization=unknown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device: got 'cuda', but torch sees no GPU"):
        Engine.from_checkpoint(folder, EngineConfig(device="cuda"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_blocks_on_a_gpu_are_measured(folder: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    engine = Engine.from_checkpoint(folder, EngineConfig(device="cuda", max_num_seqs=8))
    assert 0 < engine.pool.num_blocks * engine.layout.bytes_per_block < free
    assert run(engine, request("a"))[0]


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Engine.from_checkpoint(tmp_path, EngineConfig())


def test_sampled_tokens_do_not_depend_on_company(folder: Path, config: EngineConfig) -> None:
    """Alone, in a batch, in chunks, and preempted: seed and position fix the draw."""
    kinds: list[dict[str, Any]] = [{"temperature": 0.8}, {"top_k": 10}, {"top_p": 0.8}, {"temperature": 0}]
    params = [SamplingParams(max_tokens=20, seed=i, **kinds[i % 4]) for i in range(16)]

    def requests() -> list[Request]:
        return [request(str(i), 5 + 4 * i, p) for i, p in enumerate(params)]

    together = run(Engine.from_checkpoint(folder, config), *requests())
    alone = Engine.from_checkpoint(folder, config)
    assert [run(alone, each)[0] for each in requests()] == together
    small = Engine.from_checkpoint(
        folder, replace(config, num_blocks=24, block_size=4, max_num_batched_tokens=16, max_num_seqs=16)
    )
    assert run(small, *requests()) == together
    assert small.scheduler.num_preemptions > 0


def test_a_stop_token_ends_a_request_unless_it_is_too_early(folder: Path, config: EngineConfig) -> None:
    engine = Engine.from_checkpoint(folder, config)
    tokens = run(engine, request("a"))[0]
    stop = replace(GREEDY, stop_token_ids=(tokens[2],))
    stopped, late = request("a", sampling=stop), request("a", sampling=replace(stop, min_tokens=5))
    assert run(engine, stopped)[0] == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped.finish_reason is FinishReason.STOP
    run(engine, late)
    assert tokens[2] not in late.output_token_ids[:5]
    assert len(late.output_token_ids) > 5


def test_the_models_length_ends_a_request(folder: Path, config: EngineConfig) -> None:
    engine = Engine.from_checkpoint(folder, replace(config, max_model_len=25))
    long = request("a", 20, replace(GREEDY, max_tokens=100))
    assert len(run(engine, long)[0]) == 5
    assert long.finish_reason is FinishReason.LENGTH


def test_prefill_here_and_decode_there_gives_the_same_tokens(folder: Path, config: EngineConfig) -> None:
    """Both halves of a disaggregated request, KV carried by read and write, block sizes unequal."""
    expected = run(Engine.from_checkpoint(folder, config), request("a", 45))[0]
    prefill = Engine.from_checkpoint(folder, replace(config, max_num_batched_tokens=16, max_num_seqs=8))
    decode = Engine.from_checkpoint(folder, replace(config, block_size=8))
    sent, received = request("a", 45), request("a", 45)
    prefill.scheduler.add(sent, prefill_only=True)
    while sent.state is not RequestState.HELD:
        prefill.step()
    assert decode.scheduler.reserve(received)
    for layer in range(prefill.layout.num_layers):
        payload = prefill.storage.read(layer, prefill.pool.table("a"), 0, 45)
        decode.storage.write(layer, decode.pool.table("a"), 0, 45, payload)
    decode.scheduler.join("a", sent.output_token_ids[0])
    assert prefill.scheduler.release("a")
    while decode.scheduler.requests:
        decode.step()
    assert received.output_token_ids == expected
    for engine in (prefill, decode):
        engine.scheduler.check_integrity()
        assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_a_resumed_request_goes_on_as_if_undisturbed(folder: Path, config: EngineConfig) -> None:
    """Prompt and tokens so far are prefilled anew: draws are keyed by position, so the rest is the same."""
    sampling = SamplingParams(max_tokens=10, seed=5, min_tokens=3, stop_token_ids=(0,))
    whole = request("a", 20, sampling)
    tokens = run(Engine.from_checkpoint(folder, config), whole)[0]
    resumed = Request("a", whole.prompt_token_ids + tokens[:4], sampling, num_prompt_tokens=20)
    assert run(Engine.from_checkpoint(folder, config), resumed)[0] == tokens[4:]


def test_a_failed_step_leaves_nothing_behind(folder: Path, config: EngineConfig) -> None:
    engine = Engine.from_checkpoint(folder, config)
    engine.scheduler.add(request("a"))

    def fail(layer: int) -> None:
        raise RuntimeError("no way on")

    with pytest.raises(RuntimeError, match="no way on"):
        engine.step(fail)
    engine.scheduler.check_integrity()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    assert len(run(engine, request("b"))[0]) == 8


@pytest.mark.parametrize(
    ("options", "weights"), [({}, "float32"), ({"quantization": "int8"}, "int8"), ({"dtype": "bfloat16"}, "bfloat16")]
)
def test_the_layout_says_what_the_model_computes_in(folder: Path, options: dict[str, Any], weights: str) -> None:
    """Workers that round differently must not pair: a resumed stream would go on differently."""
    engine = Engine.from_checkpoint(folder, EngineConfig(num_blocks=4, device="cpu", **options))
    assert engine.layout.weights == weights

"""From the times of a run to tokens in a second, and from a model's shapes to the most that a machine allows."""

from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.ceilings import Ceilings
from benchmarks.model_cost import ModelCost, decode_step_s
from benchmarks.peers.driver import Run
from benchmarks.workloads import WORKLOADS, Measure, Targets, Workload

TINY = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
NONE = Targets(0, 0, 0)
DENSE = ModelCost(
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=2,
    mlp_size=8,
    num_experts=1,
    num_experts_used=1,
    vocab_size=10,
)
LAYER = 4 * 2 * (2 + 1) * 2 + 3 * 4 * 8
MACHINE = Ceilings(1e9, 1e9, 1e9, "", 4e9, "")
NO_LIMIT = 1e30


def workload(measure: Measure, num_sequences: int = 2, num_inputs: int = 10, num_outputs: int = 4) -> Workload:
    return Workload("", measure, num_sequences, num_inputs, num_outputs, NONE, NONE)


@pytest.mark.parametrize(
    ("measure", "rate"), [(Measure.PREFILL, 2 * 10 / 2.0), (Measure.DECODE, (8 - 3) / 2.5), (Measure.OUTPUT, 8 / 4.5)]
)
def test_a_measure_counts_its_own_tokens_and_its_own_time(measure: Measure, rate: float) -> None:
    run = Run(first_s=2.0, end_s=4.5, num_before=3, tokens=[[1, 2, 3, 4]] * 2)
    assert workload(measure).tokens_per_s(run) == pytest.approx(rate)


def test_prompts_are_those_of_the_seed_and_of_the_size_asked_for() -> None:
    prompts = workload(Measure.PREFILL).prompts(3, vocab_size=50)
    assert [len(prompt) for prompt in prompts] == [10, 10]
    assert all(10 <= token < 50 for prompt in prompts for token in prompt)
    assert prompts == workload(Measure.DECODE).prompts(3, 50) != workload(Measure.DECODE).prompts(4, 50)


def test_weights_are_those_of_the_checkpoint() -> None:
    with safe_open(TINY / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no iterator of its own)
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    assert ModelCost.from_folder(TINY).num_weights == matrices


def test_a_decode_step_reads_all_weights_and_the_cache_of_each_sequence() -> None:
    assert DENSE.bytes_read(3, 50, weight_bytes=4.0) == 4 * (2 * LAYER + 40) + 50 * 2 * 2 * 1 * 2 * 4


def test_a_step_reads_those_experts_that_its_tokens_pick() -> None:
    cost = ModelCost.from_folder(TINY)
    expert = 3 * 192 * 128 * 6
    one, many = cost.bytes_read(1, 0, 1.0), cost.bytes_read(10_000, 0, 1.0)
    assert many == pytest.approx(cost.num_weights)
    assert many - one == pytest.approx((8 - 2) * expert)


def test_only_what_draws_a_token_needs_the_output_matrix_and_all_of_the_last_layer() -> None:
    last_kv = 4 * 2 * 2
    assert DENSE.linear_flops(7, 1) == 2 * (7 * (LAYER + last_kv) + LAYER - last_kv + 40)
    assert DENSE.linear_flops(7, 7) == 2 * 7 * (2 * LAYER + 40)
    assert DENSE.attention_flops(28, 7) == 4 * (28 + 7) * 2 * 2


def test_a_decode_step_is_bound_by_memory_or_by_multiplying() -> None:
    read_bound = Ceilings(1e6, 1e6, NO_LIMIT, "", NO_LIMIT, "")
    assert decode_step_s(DENSE, read_bound, "int8", 1, 0) == pytest.approx((2 * LAYER + 40) / 1e6)
    multiply_bound = Ceilings(NO_LIMIT, NO_LIMIT, NO_LIMIT, "", 1e6, "")
    assert decode_step_s(DENSE, multiply_bound, "int8", 5, 0) == pytest.approx(5 * 2 * (2 * LAYER + 40) / 1e6)


def test_the_ceiling_of_a_whole_run_is_that_of_its_parts() -> None:
    prefill = 2 * 10 / workload(Measure.PREFILL).ceiling(DENSE, MACHINE, "float32")
    step = 2 / workload(Measure.DECODE).ceiling(DENSE, MACHINE, "float32")
    assert workload(Measure.OUTPUT).ceiling(DENSE, MACHINE, "float32") == pytest.approx(2 * 4 / (prefill + 3 * step))


def test_fewer_bytes_and_faster_products_raise_the_ceiling() -> None:
    for each in WORKLOADS:
        assert each.ceiling(DENSE, MACHINE, "int8") > each.ceiling(DENSE, MACHINE, "float32")

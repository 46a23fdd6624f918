"""A plan as an operator makes it: the command in a process of its own, and what it says of speed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from teacher_server.cli import main
from teacher_server.commands.plan import make
from teacher_server.errors import ModelError
from teacher_server.plan_config import PlanConfig
from teacher_server.planning.answers import AnswerSize, estimate_answers
from teacher_server.planning.gpus import GIB, GPUS, NAMES, find_gpu
from teacher_server.planning.memory import MemoryOptions
from teacher_server.planning.plan import Inputs, Plan, Speed, make_plan
from teacher_server.planning.sizes import measure_sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a Llama of 8 billion weights, and nothing else."""
    folder = tmp_path_factory.mktemp("plan") / "llama"
    llama_8b().save_pretrained(folder)
    return folder


def llama_8b() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "teacher_server", "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_command_plans_from_a_config_alone(folder: Path):
    done = run(
        *(str(folder), "--gpus", "9", "--gpu", "h200", "--length", "1024", "--targets", "top_k:64"),
        *("--tensor-parallel-size", "2", "--efficiency", "0.5", "--price-per-gpu-hour", "3"),
        *("--step-s", "2", "--step-tokens", "32768", "--json"),
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["weights"]["total"] == 8_030_261_248
    assert plan["efficiency_source"] == "given"
    assert plan["fits"]
    assert (plan["tensor_parallel_size"], plan["replicas"]) == (2, 4)
    assert [each["ranks"] for each in plan["memory"]] == [1, 2, 4, 8]
    (rate,) = plan["rates"]
    assert rate["nbytes_per_s"] == pytest.approx(rate["tokens_per_s"] * rate["nbytes_per_token"])
    assert rate["trainers"] == pytest.approx(rate["tokens_per_s"] * 2 / 32_768)
    hours = 1e9 / rate["tokens_per_s"] / 3600
    assert rate["hours_per_billion"] == pytest.approx(hours)
    # Eight GPUs work; the ninth makes no replica, and is not part of the price of the tokens.
    assert rate["price_per_billion"] == pytest.approx(hours * 8 * 3)


def test_the_table_says_what_is_assumed(folder: Path):
    done = run(str(folder), "--gpus", "2", "--targets", "sampled:64")
    assert done.returncode == 0, done.stderr
    assert "assumed, not measured" in done.stdout
    assert "8.03 B weights" in done.stdout
    assert done.stdout.splitlines()[-1] == "fits: 2 replicas of 1 GPU each"


def test_what_does_not_fit_is_said_and_ends_with_1(folder: Path):
    done = run(str(folder), "--gpu-memory", "12", "--targets", "sampled:64")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "does not fit: it needs 2 GPUs per replica, and there are 1"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "v100"), "known are " + ", ".join(NAMES)),
        (("--step-s", "1"), "needs both: --step-s and --step-tokens"),
        (("--targets", "top_k:none"), "k must be a whole number"),
        (("--measure", "--efficiency", "0.4"), "--measure or --efficiency, not both"),
        (("--measure", "--quantization", "torchao-int8"), "not with --quantization torchao-int8"),
        (("--length", "1"), "greater than or equal to 2"),
        (("--tensor-parallel-size", "3"), "must be 1, 2, 4 or 8, got 3"),
    ],
)
def test_wrong_options_are_refused(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sequences_beyond_the_context_are_refused(folder: Path):
    with pytest.raises(ModelError, match="longer than the model's context of 8192 tokens"):
        make(PlanConfig(model=str(folder), length=(8193,)))


def test_a_gpu_that_is_not_here_cannot_be_measured(folder: Path):
    with pytest.raises(ModelError, match="measures the device at hand"):
        make(PlanConfig(model=str(folder), gpu="h100", measure=True))


def plan_of(
    config: transformers.PreTrainedConfig,
    *,
    answer: AnswerSize | None = None,
    ranks: int | None = None,
    measured: dict[tuple[str, int], float] | None = None,
    gpus: int = 8,
    pack_tokens: int = 8192,
) -> Plan:
    gpu = dataclasses.replace(GPUS["h200"], link_gb_s=100.0)
    inputs = Inputs(
        gpus=gpus,
        ranks=ranks,
        lengths=[1000],
        answers=[answer or AnswerSize("sampled:64", True, 40.0, 300_000.0)],
        memory=MemoryOptions("bfloat16", "none", pack_tokens, 128 << 20, 1 << 30, 139.8 * GIB),
        step_s=None,
        step_tokens=None,
        price_per_gpu_hour=None,
    )
    return make_plan(measure_sizes(config), inputs, Speed(gpu, 0.5, "given", measured or {}))


def test_speed_is_arithmetic_by_what_is_left_of_the_peak():
    (rate,) = plan_of(llama_8b(), gpus=1).rates
    pairs = 32 * 32 * (2 * 128 + 2 * 128) * (1000 * 1001 / 2) / 1000
    flops = 2 * 6_979_321_856 + pairs + 2 * 128_256 * 4096
    assert rate.flops_per_token == pytest.approx(flops)
    selection_s = 128_256 * 74 / 4.8e12
    assert rate.selection_s_per_token == pytest.approx(selection_s)
    assert rate.tokens_per_s == pytest.approx(1 / (flops / (989.4e12 * 0.5) + selection_s))
    assert rate.encode_threads == pytest.approx(rate.tokens_per_s / 300_000)


def test_targets_that_read_no_logits_cost_no_head():
    states = AnswerSize("hidden:int8,realized=0,log_z=0", False, 4098.0, 300_000.0)
    (with_head,) = plan_of(llama_8b()).rates
    (without,) = plan_of(llama_8b(), answer=states).rates
    assert with_head.flops_per_token - without.flops_per_token == 2 * 128_256 * 4096
    assert without.selection_s_per_token == 0


def test_ranks_share_the_work_and_pay_for_their_sums():
    (one,) = plan_of(llama_8b(), ranks=1).rates
    (four,) = plan_of(llama_8b(), ranks=4).rates
    # Two sums a layer of 4,096 numbers of 2 bytes, of which each rank sends 2 * 3/4 times as much.
    link_s = 2 * 32 * 4096 * 2 * 1.5 / 100e9
    assert 2 / four.tokens_per_s == pytest.approx(8 / one.tokens_per_s / 4 + link_s)


def test_few_active_experts_wait_for_the_memory_of_all():
    sparse = transformers.MixtralConfig(
        hidden_size=4096, intermediate_size=1024, num_local_experts=128, num_experts_per_tok=1,
        num_key_value_heads=8, num_hidden_layers=32, dtype="bfloat16",
    )  # fmt: skip
    (rate,) = plan_of(sparse, gpus=1, pack_tokens=256).rates
    weights = measure_sizes(sparse).num_weights
    assert rate.tokens_per_s == pytest.approx(1 / (2 * weights / 4.8e12 / 256), rel=1e-6)


def test_a_measurement_takes_the_place_of_the_assumption():
    measured = {("sampled:64", 1000): 1 / 12_345}
    (rate,) = plan_of(llama_8b(), measured=measured).rates
    assert rate.is_measured
    assert rate.tokens_per_s == pytest.approx(8 * 12_345)


# `python -m benchmarks.codec`, V = 262,144, entropies spread by 0.5, no fitted table (docs/log.md).
BENCHMARK_NBYTES = {
    "sampled:16": 18.7,
    "sampled:64": 42.9,
    "sampled:256": 101.8,
    "top_k:64,log_z=0": 167.0,
}


def test_bytes_are_near_those_of_the_benchmark():
    answers = estimate_answers([*BENCHMARK_NBYTES], 262_144, 64)
    for answer, nbytes in zip(answers, BENCHMARK_NBYTES.values(), strict=True):
        assert answer.nbytes_per_token == pytest.approx(nbytes, rel=0.1), answer.targets


def test_bytes_of_states_are_those_of_the_format():
    answers = estimate_answers(["hidden:int8", "hidden:bf16", "features:layers=1+2"], 1000, 64)
    sizes = [answer.nbytes_per_token for answer in answers]
    assert sizes == pytest.approx([64 + 4, 2 * 64 + 2, 4 * 64 + 2], abs=0.2)
    (states,) = estimate_answers(["hidden:int8,realized=0,log_z=0"], 1000, 64)
    assert not states.reads_logits


def test_float32_has_a_peak_of_its_own(folder: Path):
    _, speed, _ = make(PlanConfig(model=str(folder), dtype="float32", gpu="h100"))
    assert speed.gpu.tflops == GPUS["h100"].float32_tflops < GPUS["h100"].tflops / 10


def test_gpus_are_known_by_the_names_that_torch_has_for_them():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    found = {name: find_gpu(name) for name in names}
    assert {name: gpu and gpu.name for name, gpu in found.items()} == names
    assert find_gpu("NVIDIA H1000") is None

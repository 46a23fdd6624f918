"""The benchmark of a GPU runs: on tiny shapes, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_tables import print_tables
from benchmarks.shapes import SHAPES, make_config, save_shape
from teacher_server.planning.sizes import measure_sizes

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert "torch finds no CUDA device" in printed.err


def test_a_cpu_is_only_for_tiny_shapes(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu"])
    assert gpu.main() == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "billions"),
    # As their model cards say: 8.03 B; Gemma 2 9B has 9.24 B with its embedding.
    [("llama-3.1-8b", 8.03), ("gemma-2-9b", 9.24)],
)
def test_shapes_have_the_size_of_their_models(name: str, billions: float) -> None:
    sizes = measure_sizes(make_config(name))
    assert sizes.num_weights / 1e9 == pytest.approx(billions, abs=0.005)
    assert sizes.dtype == "bfloat16"


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_config_and_nothing_else(name: str, tmp_path: Path) -> None:
    folder = save_shape(name, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_all_of_it_runs_on_a_cpu(tmp_path: Path, capsys) -> None:
    before = sorted((ROOT / "docs").iterdir())
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--json"),
            *("--shapes", "tiny-gemma-2", "--lengths", "64", "--output", str(output)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "docs").iterdir()) == before
    report = json.loads(output.read_text())
    assert json.loads(done.stdout) == report
    assert report["not_measured"] == {}
    shape = report["shapes"]["tiny-gemma-2"]
    assert (shape["exact"], shape["is_packed"]) == (True, True)
    found = shape["lengths"]["64"]
    assert found["tokens_per_s"].keys() == {"bare_compiled", "bare", "engine", "service"}
    assert all(rate > 0 for rate in found["tokens_per_s"].values())
    rates = found["tokens_per_s"]
    assert found["service_of_bare_compiled"] == rates["service"] / rates["bare_compiled"]
    share = found["share_of_peak"]["service"]["product"]
    peak = report["peak"]["product_tflops"] * 1e12
    assert share == pytest.approx(rates["service"] * found["flops_per_token"] / peak)
    threads = found["encode_threads"] * found["encoded_tokens_per_s_and_thread"]
    assert threads >= rates["service"]
    assert [head["vocabulary"] for head in report["head"]] == [1003, 2001]
    assert report["loading"]["gib_per_s"].keys() == {"hashed", "hash_known"}
    print_tables(report)
    printed = capsys.readouterr().out
    assert "tiny-gemma-2" in printed
    assert "exactness bytes" in printed


def test_what_cannot_be_measured_is_named_and_the_rest_goes_on(capsys) -> None:
    run = gpu.Run(gpu.TINY, torch.device("cpu"), "top_k:64", budget_s=100.0)
    run.report["not_measured"] = {}

    def fail() -> None:
        raise RuntimeError("no such kernel\nand more")

    run.section("broken", fail)
    run.section("late", fail, least_s=1000.0)
    assert run.has_failed
    assert "no such kernel" in run.report["not_measured"]["broken"]
    assert "left of 100 s" in run.report["not_measured"]["late"]
    done = []
    run.section("fine", lambda: done.append(1))
    assert done == [1]

"""Quantised teachers: what is refused, what is left alone, and that answers keep their bytes."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from student_trainer.teachers.local import LocalTeacher
from teacher_server.config import ServeConfig
from teacher_server.engine import quantization
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import load, prepare
from teacher_server.engine.packed_weights import PackedProducts
from teacher_server.engine.probe import is_exact
from teacher_server.engine.products import LARGE, SMALL, TiledProducts, Tiling
from teacher_server.engine.quantization import is_quantized, weights_nbytes
from teacher_server.errors import ModelError
from tests.support import tiny

VOCABULARY = 320
PACKAGES = {"torchao-int8": "torchao", "bitsandbytes-4bit": "bitsandbytes"}
"""Methods that run on a CPU, and the module that each needs."""
NOISY = [
    # What the packages themselves do when they are imported or used.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
needs_package = pytest.mark.parametrize("method", [pytest.param(m, marks=NOISY) for m in PACKAGES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"), "Llama", VOCABULARY)


def states_of(causal_lm) -> list:
    """Of bitsandbytes: how weights are quantised."""
    found = (getattr(one, "quant_state", None) for one in causal_lm.parameters())
    return [one for one in found if one is not None]


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_quantised_and_answers_keep_their_bytes(
    folder: Path, method: str, dtype: str
):
    pytest.importorskip(PACKAGES[method])
    plain = load(str(folder), dtype=dtype)
    model = load(str(folder), dtype=dtype, quantization=method)
    causal_lm = model.causal_lm
    names = [name for name, one in causal_lm.named_parameters() if is_quantized(one)]
    assert len(names) == 14, "q, k, v, o, gate, up and down of two layers"
    assert causal_lm.get_output_embeddings().weight.dtype == getattr(torch, dtype)
    assert causal_lm.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert weights_nbytes(causal_lm) < weights_nbytes(plain.causal_lm)
    version = importlib.metadata.version(PACKAGES[method])
    assert model.quantization == f"{method} {version}"
    assert model.teacher_fingerprint != plain.teacher_fingerprint
    again = load(str(folder), dtype=dtype, quantization=method)
    assert again.teacher_fingerprint == model.teacher_fingerprint
    assert model.is_packed
    assert not any(getattr(one, "packing_format_for_cpu", False) for one in states_of(causal_lm))
    assert is_exact(Engine(model))


class Doubled(torch.Tensor):
    """Stands for quantised weights: multiplies in its own way, and notes how many rows at a time."""

    seen: ClassVar[list[int]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        rows, weight, bias = (*args, None)[:3]
        cls.seen.append(rows.numel() // rows.shape[-1])
        return 2 * F.linear(rows, weight.as_subclass(torch.Tensor), bias)


@torch.library.custom_op("logitstream_test::gemm_4bit", mutates_args=())
def multiply_doubled(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An operator of the name that bitsandbytes gives its own."""
    Doubled.seen.append(rows.numel() // rows.shape[-1])
    return 2 * F.linear(rows, weight)


@pytest.mark.parametrize("is_operator", [False, True])
def test_quantised_weights_multiply_tile_by_tile(is_operator: bool):
    torch.manual_seed(0)
    weight, rows = torch.randn(24, 16), torch.randn(1, 2 * LARGE + SMALL, 16)
    Doubled.seen.clear()
    with TiledProducts(Tiling.of([2 * LARGE + SMALL])):
        if is_operator:
            found = torch.ops.logitstream_test.gemm_4bit.default(rows, weight)
        else:
            found = F.linear(rows, weight.as_subclass(Doubled))
    assert Doubled.seen == [LARGE, LARGE, SMALL]
    assert found.shape == (1, 2 * LARGE + SMALL, 24)
    torch.testing.assert_close(found, 2 * F.linear(rows, weight))


def test_quantised_weights_are_not_put_in_another_order():
    layer = torch.nn.Linear(16, 24)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    model = torch.nn.Sequential(layer, torch.nn.Linear(24, 24))
    model.device = torch.device("cpu")
    with PackedProducts(model, 8).use():
        assert "forward" not in layer.__dict__
        assert "forward" in model[1].__dict__


@pytest.mark.parametrize("method", ["torchao-int8", "bitsandbytes-4bit", "compressed-tensors"])
def test_a_missing_package_is_one_line_and_nothing_is_loaded(folder: Path, method: str):
    """In a process whose imports are made to find none of the packages."""
    program = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name in "
        "('torchao', 'bitsandbytes', 'compressed_tensors') else find(name, package)\n"
        "from teacher_server.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", str(folder), "--quantization", method],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    module = method.partition("-")[0].replace("compressed", "compressed_tensors")
    assert line.startswith(f"teacher-server: quantization {method}: {module} is not installed")
    assert " -m pip install " in line


def save_as(folder: Path, to: Path, quantization: dict) -> str:
    """Copies a model folder and lets its config say that it is quantised."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def test_a_method_that_does_not_fit_the_checkpoint_or_the_device_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quantization, "check_installed", lambda *_: None)
    saved = save_as(folder, tmp_path / "gptq", {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="was saved quantised with gptq, and cannot be"):
        load(saved, quantization="torchao-int8")
    with pytest.raises(ModelError, match="is no compressed-tensors checkpoint"):
        load(str(folder), quantization="compressed-tensors")
    with pytest.raises(ModelError, match=r"needs a GPU that multiplies fp8 .* got device cpu"):
        load(str(folder), quantization="torchao-fp8", device="cpu")
    with pytest.raises(ModelError, match="quantization must be none, torchao-fp8"):
        load(str(folder), quantization="int3")


def test_the_method_of_a_checkpoint_is_found_before_its_package_is_missed(
    folder: Path, tmp_path: Path
):
    content = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    saved = save_as(folder, tmp_path / "saved", content)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ModelError, match="quantization bitsandbytes-4bit: bitsandbytes is not"):
            load(saved)
    else:
        with pytest.raises(ModelError, match="was saved quantised with bitsandbytes-4bit"):
            load(saved, quantization="torchao-int8")


@pytest.mark.filterwarnings("ignore")
def test_an_architecture_without_linear_layers_is_refused(tmp_path: Path):
    pytest.importorskip("torchao")
    folder = tiny.save_model(tmp_path, "GPT2", VOCABULARY)
    with pytest.raises(ModelError, match="torchao-int8 quantises no layer of GPT2LMHeadModel"):
        load(str(folder), quantization="torchao-int8")


def test_dummies_are_not_quantised():
    with pytest.raises(ValidationError, match="not with --quantization"):
        ServeConfig(model="m", load_format="dummy", quantization="torchao-int8")


@needs_package
def test_a_quantised_model_in_memory_has_a_fingerprint_and_writes_texts(folder: Path, method: str):
    pytest.importorskip(PACKAGES[method])
    model = load(str(folder), quantization=method)
    teacher = LocalTeacher(model.causal_lm)
    plain = LocalTeacher(load(str(folder)).causal_lm)
    version = importlib.metadata.version(PACKAGES[method])
    assert prepare(model.causal_lm).quantization == f"{method} {version}"
    assert teacher.info.teacher_fingerprint != plain.info.teacher_fingerprint
    assert teacher.info.weights_fingerprint != plain.info.weights_fingerprint
    prompts = [[3, 4, 5], [7, 8], [9, 9, 2, 1]]
    texts = [one.token_ids.tolist() for one in teacher.generate(prompts, max_new_tokens=12)]
    for prompt, text in zip(prompts, texts, strict=True):
        (alone,) = teacher.generate([prompt], max_new_tokens=12)
        assert alone.token_ids.tolist() == text
    assert sum(map(len, texts)) > 3 * 4

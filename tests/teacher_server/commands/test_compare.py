"""`teacher-server compare` against distributions that plain transformers computes, in float64."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from teacher_server.cli import main
from teacher_server.engine import comparison
from teacher_server.engine.loading import load
from tests.support import tiny

WORDS = [f"w{index}" for index in range(301)]
VOCABULARY = len(WORDS) + 2 + 17
"""With 17 rows of the head that no token has."""
NUM_TOKENS, SEQUENCE = 700, 64
QUIET = [pytest.mark.filterwarnings("ignore")]
"""For what other packages warn of when they are imported or used."""


CHECKPOINTS = {"int8": (8, "int"), "int4": (4, "int"), "fp8": (8, "float")}
"""Bits and type of the weights of compressed-tensors checkpoints."""


def save(folder: Path, architecture: str, *, seed: int = 0, words: list[str] = WORDS) -> Path:
    tiny.make_model(architecture, VOCABULARY, seed, hidden_size=128).save_pretrained(folder)
    tiny.make_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(WORDS), (NUM_TOKENS,), generator=generator)
    path.write_text(" ".join(WORDS[index] for index in ids))
    return path


def round_weights(model: Any, method: str) -> None:
    """Rounds the linear layers of a plain model, but not its head, as a method is documented to."""
    for layer in (one for one in model.model.modules() if type(one) is torch.nn.Linear):
        weight = layer.weight.data
        if method == "bitsandbytes-4bit":
            import bitsandbytes.functional as bnb

            rounded = bnb.dequantize_4bit(
                *bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
            )
        else:
            scale = weight.abs().amax(1, keepdim=True) / 127.5
            rounded = (weight / scale).round().clamp(-128, 127) * scale
        layer.weight.data = rounded.to(weight.dtype)


@torch.inference_mode()
def offline_logprobs(
    folder: Path, text: Path, dtype: torch.dtype, quantization: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs (N, V) and log Z (N,) in float64 by plain transformers, and the tokens that came next."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    if quantization != "none":
        round_weights(model, quantization)
    return logprobs_of(model, folder, text)


@torch.inference_mode()
def logprobs_of(model: Any, folder: Path, text: Path) -> tuple[Tensor, Tensor, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    pieces = ids.split(SEQUENCE)
    logits = torch.cat([tiny.dense_logits(model, piece) for piece in pieces])
    logits = logits[:, : len(WORDS) + 2]
    return logits.log_softmax(-1), logits.logsumexp(-1), torch.cat([one[1:] for one in pieces])


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code = main([*map(str, arguments), "--log-level", "warning", "--json"])
    assert code == 0
    return json.loads(capsys.readouterr().out)


def check(found: dict[str, Any], first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    (logp, log_z, next_ids), (logq, other_log_z, _) = first, second
    rows = torch.arange(len(next_ids))
    assert found["rows"] == len(next_ids)
    for name, one, other in (("kl", logp, logq), ("reverse_kl", logq, logp)):
        expected = (one.exp() * (one - other)).sum(-1)
        assert expected.mean() > 1e-6, "there is something to measure"
        mean = float(expected.mean())
        assert found[name]["mean"] == pytest.approx(mean, abs=1e-4, rel=0)
        assert found[name]["mean"] == pytest.approx(mean, rel=0.25), "also where it is tiny"
        # Single rows of bfloat16 are rounded in another order.
        assert found[name]["p50"] == pytest.approx(float(expected.median()), rel=0.25)
        assert found[name]["p99"] == pytest.approx(
            float(expected.quantile(0.99)), rel=0.25, abs=1e-4
        )
        assert found[name]["max"] == pytest.approx(float(expected.max()), rel=0.3, abs=1e-4)
    same = (logp.argmax(-1) == logq.argmax(-1)).double().mean()
    assert found["top1_agreement"] == pytest.approx(float(same), abs=0.03)
    error = (logp[rows, next_ids] - logq[rows, next_ids]).abs().mean()
    assert found["logprob_error"] == pytest.approx(float(error), rel=0.2)
    assert found["log_z_error"] == pytest.approx(float((log_z - other_log_z).abs().mean()), rel=0.2)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
def test_bfloat16_against_float32(
    architecture: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = save(tmp_path, architecture)
    found = run(
        capsys,
        *("compare", folder, folder, "--text", text, "--sequence-tokens", str(SEQUENCE)),
        *("--dtype-b", "bfloat16"),
    )
    exact = offline_logprobs(folder, text, torch.float32)
    rounded = offline_logprobs(folder, text, torch.bfloat16)
    check(found, exact, rounded)
    assert found["a"]["weights_nbytes"] == 2 * found["b"]["weights_nbytes"]
    assert (found["a"]["dtype"], found["b"]["dtype"]) == ("float32", "bfloat16")
    assert found["a"]["quantization"] == found["b"]["quantization"] == "none"
    assert found["tokens"] == NUM_TOKENS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "module"),
    [
        pytest.param("torchao-int8", "torchao", marks=QUIET),
        pytest.param("bitsandbytes-4bit", "bitsandbytes", marks=QUIET),
    ],
)
def test_quantised_against_float32(
    method: str, module: str, dtype: str, llama: Path, text: Path, capsys
):
    pytest.importorskip(module)
    found = run(
        capsys,
        *("compare", llama, llama, "--text", text, "--sequence-tokens", str(SEQUENCE)),
        *("--quantization-b", method, "--dtype-b", dtype),
    )
    exact = offline_logprobs(llama, text, torch.float32)
    quantised = offline_logprobs(llama, text, getattr(torch, dtype), method)
    check(found, exact, quantised)
    assert found["b"]["quantization"].startswith(f"{method} ")
    assert found["b"]["weights_nbytes"] < found["a"]["weights_nbytes"] / 2


def save_compressed(folder: Path, to: Path, bits: int, kind: str) -> Path:
    """Quantises a model's linear layers, but not its head, and saves them as that package does."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = ct.QuantizationArgs(num_bits=bits, type=kind, strategy="channel", symmetric=True)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    settings = ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    ct.apply_quantization_config(model, settings)
    largest = 2 ** (bits - 1) - 1 if kind == "int" else 448.0
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight_scale.data = module.weight.data.abs().amax(1, keepdim=True) / largest
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(to)
    compressor.update_config(str(to))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_compressed_tensors_checkpoint_against_what_it_was_made_from(
    name: str, llama: Path, text: Path, tmp_path: Path, capsys
):
    pytest.importorskip("compressed_tensors")
    bits, kind = CHECKPOINTS[name]
    folder = save_compressed(llama, tmp_path / name, bits, kind)
    options = ("--text", text, "--sequence-tokens", str(SEQUENCE))
    found = run(capsys, "compare", llama, folder, *options)
    named = ("--quantization-b", "compressed-tensors")
    assert run(capsys, "compare", llama, folder, *options, *named) == found
    # Its weights, rounded here; each output of a layer has its own scale.
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    largest = 2 ** (bits - 1) - 1 if kind == "int" else 448.0
    for layer in (one for one in model.model.modules() if type(one) is torch.nn.Linear):
        scale = layer.weight.data.abs().amax(1, keepdim=True) / largest
        cells = layer.weight.data / scale
        rounded = cells.round() if kind == "int" else cells.to(torch.float8_e4m3fn).float()
        layer.weight.data = rounded * scale
    exact = offline_logprobs(llama, text, torch.float32)
    check(found, exact, logprobs_of(model.eval(), llama, text))
    assert found["b"]["quantization"].startswith("compressed-tensors ")
    assert found["b"]["weights_nbytes"] == found["a"]["weights_nbytes"], "decompressed when loaded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_against_itself_is_0_exactly(dtype: str, llama: Path, text: Path, capsys):
    found = run(
        capsys,
        *("compare", llama, llama, "--text", text),
        *("--dtype-a", dtype, "--dtype-b", dtype),
    )
    nothing = dict.fromkeys(("mean", "p50", "p99", "max"), 0.0)
    assert found["kl"] == found["reverse_kl"] == nothing
    assert found["logprob_error"] == found["log_z_error"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["a"] == found["b"]


def test_another_teacher_is_far_away_and_a_person_can_read_it(
    llama: Path, text: Path, tmp_path: Path, capsys
):
    other = save(tmp_path, "Qwen3", seed=1)
    found = run(capsys, "compare", llama, other, "--text", text, "--sequence-tokens", str(SEQUENCE))
    exact = offline_logprobs(llama, text, torch.float32)
    check(found, exact, offline_logprobs(other, text, torch.float32))
    assert main(["compare", str(llama), str(other), "--text", str(text)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a ")
    assert lines[3].startswith("KL(A || B)")
    assert "quantization none" in lines[1]


def test_rows_are_compared_chunk_by_chunk(llama: Path, text: Path):
    sequences = [torch.arange(2, 60), torch.arange(5, 25)]
    first = comparison.hold(partial(load, str(llama)), sequences)
    second = comparison.hold(partial(load, str(llama), dtype="bfloat16"), sequences)
    next_ids = comparison.next_ids_of(sequences)
    whole = comparison.compare_states(first, second, next_ids)
    rows = []
    logits = comparison.HeldStates.logits

    def seen(self, some, size):
        made = logits(self, some, size)
        rows.append(len(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.HeldStates, "logits", seen)
        nbytes = 4 * (len(WORDS) + 2) * 10
        pieces = comparison.compare_states(first, second, next_ids, chunk_nbytes=nbytes)
    assert rows == [10, 10] * 7 + [6, 6]
    torch.testing.assert_close(pieces.kl, whole.kl, rtol=0, atol=1e-5)


def test_an_architecture_that_cannot_pack_has_the_same_states(llama: Path):
    sequences = [torch.arange(2, 60), torch.arange(5, 25)]
    packed = comparison.hold(partial(load, str(llama)), sequences)
    padded = comparison.hold(partial(load, str(llama), attention="eager"), sequences)
    torch.testing.assert_close(padded.hidden_ND, packed.hidden_ND, rtol=1e-4, atol=1e-4)
    assert len(packed.hidden_ND) == 57 + 19


def test_the_first_teacher_is_gone_when_the_second_is_loaded(llama: Path):
    layers: list[weakref.ref] = []

    def make():
        model = load(str(llama))
        layers.append(weakref.ref(model.causal_lm.model.layers[0]))
        return model

    held = comparison.hold(make, [torch.arange(2, 60)])
    gc.collect()
    assert layers[0]() is None
    assert held.logits(slice(0, 3), 100).shape == (3, 100)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_what_cannot_be_compared_is_refused(llama: Path, text: Path, tmp_path: Path, capsys):
    other = save(tmp_path / "other", "Llama", words=WORDS[::-1])
    error = refuse(capsys, "compare", llama, other, "--text", text)
    assert f"{llama} and {other} have different tokenizers" in error
    bare = tiny.save_model(tmp_path / "bare", "Llama", VOCABULARY - 100)
    error = refuse(capsys, "compare", llama, bare, "--text", text)
    assert f"{llama} has 320 ids and {bare} 220" in error
    error = refuse(capsys, "compare", bare, bare, "--text", text)
    assert "has a tokenizer" in error
    error = refuse(capsys, "compare", llama, llama, "--text", tmp_path / "none.txt")
    assert "none.txt: No such file" in error
    (tmp_path / "short.txt").write_text("w1")
    error = refuse(capsys, "compare", llama, llama, "--text", tmp_path / "short.txt")
    assert "the text has 1 tokens; at least 2 are needed" in error
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    error = refuse(capsys, "compare", llama, llama, "--text", tmp_path / "latin.txt")
    assert "latin.txt: it is not UTF-8 text" in error


def test_a_missing_package_is_found_before_anything_is_loaded(
    llama: Path, text: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ("--text", str(text), "--quantization-b", "bitsandbytes-4bit")
    assert main(["compare", str(llama), str(llama), *options]) == 2
    assert "bitsandbytes is not installed" in capsys.readouterr().err

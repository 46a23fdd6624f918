"""Teachers with random weights, from a config.json and nothing else."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from logit_codec import TopKSpec, TopKTargets
from teacher_server.config import ServeConfig
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.dummy import REVISION
from teacher_server.engine.loading import load
from teacher_server.errors import ModelError
from teacher_server.startup import load_engine
from tests.conftest import one_torch_thread
from tests.support import tiny

ModelFolder = Callable[[str, int], Path]
VOCAB = 1003
TIED = ("Gemma2", "GPT2")


one_thread = pytest.fixture(autouse=True, scope="module")(one_torch_thread)


@pytest.fixture
def config_only(model_folder: ModelFolder, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder that holds the config.json of a tiny model, and nothing else."""

    def make(architecture: str) -> Path:
        folder = tmp_path / architecture
        folder.mkdir()
        shutil.copy(model_folder(architecture, VOCAB) / "config.json", folder)
        return folder

    return make


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "GptOss"])
def test_a_config_alone_is_enough(architecture: str, config_only, model_folder) -> None:
    real = transformers.AutoModelForCausalLM.from_pretrained(model_folder(architecture, VOCAB))
    model = load(str(config_only(architecture)), load_format="dummy", device="cpu")
    shapes = {name: weight.shape for name, weight in real.state_dict().items()}
    made = model.causal_lm.state_dict()
    assert {name: weight.shape for name, weight in made.items()} == shapes
    for (name, wanted), (_, got) in zip(
        real.named_buffers(), model.causal_lm.named_buffers(), strict=True
    ):
        assert torch.equal(got, wanted), f"buffer {name}: what positions mean is not random"
    head, embeddings = (
        model.causal_lm.get_output_embeddings(),
        model.causal_lm.get_input_embeddings(),
    )
    assert (head.weight is embeddings.weight) == real.config.tie_word_embeddings
    logits = model.causal_lm(torch.arange(40)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.001


def test_weights_are_the_same_each_time_and_no_others_random_numbers(config_only) -> None:
    folder = str(config_only("Llama"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load(folder, load_format="dummy", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    second = load(folder, load_format="dummy", device="cpu")
    for one, other in zip(first.causal_lm.parameters(), second.causal_lm.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.teacher_fingerprint == second.teacher_fingerprint


def test_the_dtype_is_the_configs_or_the_chosen_one(config_only) -> None:
    folder = config_only("Llama")
    assert load(str(folder), load_format="dummy", device="cpu").dtype == torch.float32
    model = load(str(folder), load_format="dummy", device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in model.causal_lm.parameters()} == {torch.bfloat16}
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    assert load(str(folder), load_format="dummy", device="cpu").dtype == torch.float16


def test_nobody_takes_random_weights_for_the_real_ones(config_only, model_folder, caplog) -> None:
    real = load(str(model_folder("Llama", VOCAB)), device="cpu")
    folder = config_only("Llama")
    with caplog.at_level(logging.WARNING):
        dummy = load(str(folder), load_format="dummy", device="cpu")
    assert "are random" in caplog.text
    assert dummy.revision == REVISION
    assert dummy.weights_fingerprint != real.weights_fingerprint
    assert len(dummy.weights_fingerprint) == 64
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    changed = load(str(folder), load_format="dummy", device="cpu")
    assert changed.weights_fingerprint != dummy.weights_fingerprint


def test_the_weights_beside_a_config_are_not_read(model_folder, tmp_path) -> None:
    folder = shutil.copytree(model_folder("Llama", VOCAB), tmp_path / "llama")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    assert load(str(folder), load_format="dummy", device="cpu").revision == REVISION


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Qwen3", "Mixtral"])
def test_a_deep_model_in_a_short_dtype_still_runs_packs(architecture: str, tmp_path: Path) -> None:
    config = tiny.make_model(architecture, VOCAB).config
    config.num_hidden_layers = 32
    config.layer_types = None
    type(config).from_dict(config.to_dict()).save_pretrained(tmp_path)
    model = load(str(tmp_path), load_format="dummy", device="cpu", dtype="bfloat16")
    assert model.num_layers == 32
    assert model.is_packed


def test_another_format_is_refused(config_only) -> None:
    with pytest.raises(ModelError, match=r"auto or dummy; got 'random'"):
        load(str(config_only("Llama")), load_format="random")
    with pytest.raises(ModelError, match=r"no \*.safetensors file"):
        load(str(config_only("Qwen3")))


def test_a_service_computes_targets_with_random_weights(config_only) -> None:
    config = ServeConfig(model=str(config_only("Gemma2")), load_format="dummy", device="cpu")
    engine = load_engine(config)
    request = RowRequest(torch.arange(50), torch.arange(49), TopKSpec(k=8))
    (targets,) = engine.score([request])
    assert isinstance(targets, TopKTargets)
    assert targets.logprobs.numel() == 49 * 8
    assert targets.logprobs.isfinite().all()

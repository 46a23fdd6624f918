"""Students as people have them: of which type and with which adapters they are made, and what is saved."""

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from pydantic import ValidationError

from student_trainer.commands.student import find_student, make_hub_repo, push_student
from student_trainer.config import StudentOptions, TrainConfig
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from student_trainer.training.optimizers import make_muon
from student_trainer.training.students import make_student, name_on_hub, save_student
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import make_trainer, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(2, 34)[None]

# PEFT still uses transformers' old names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with weights, where the hub's client would put it."""
    cache = tmp_path_factory.mktemp("cache") / "models--tiny--llama"
    path = cache / "snapshots" / COMMIT
    tiny.save_model(path, "Llama", 64)
    tiny.make_tokenizer([f"w{n}" for n in range(62)]).save_pretrained(path)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return path


def make_config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        student=folder, data=["*"], output=folder, record="targets", device="cpu", **settings
    )


def logits(student: Any) -> torch.Tensor:
    with torch.no_grad():
        return student.eval()(input_ids=IDS).logits


def test_a_student_has_the_weights_of_its_folder_in_the_type_that_is_asked_for(folder: Path):
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for dtype in ("float32", "bfloat16", "auto"):
        student: Any = make_student(make_config(folder, dtype=dtype, attn_implementation="eager"))
        expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        assert student.config._attn_implementation == "eager"
        for name, parameter in saved.named_parameters():
            found = student.get_parameter(name)
            assert found.dtype == expected
            assert torch.equal(found, parameter.to(expected))


def test_random_weights_are_those_of_the_seed(folder: Path, tmp_path: Path):
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    one, same, other = (make_student(make_config(tmp_path, seed=seed)) for seed in (1, 1, 2))
    half = make_student(make_config(tmp_path, seed=1, dtype="bfloat16"))
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))
    assert logits(half).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"--lora-r 4: the student in .* has no weights"):
        make_student(make_config(tmp_path, lora_r=4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_saved_alone_and_gives_the_same_logits_again(
    folder: Path, tmp_path: Path, dtype: str
):
    student: Any = make_student(make_config(folder, lora_r=4, dtype=dtype))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert all("lora_" in name and before[name].dtype == torch.float32 for name in trained)
    assert len(trained) == 2 * 2 * 7  # two layers of seven matrices, none of the head
    assert student.peft_config["default"].lora_alpha == 8
    untrained = logits(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(3):
        student(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    expected = logits(student)
    assert not torch.equal(expected, untrained)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    save_student(student, tokenizer, tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    mode = (tmp_path / "student" / "adapter_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "student" / "adapter_config.json").stat().st_mode
    saved = json.loads((tmp_path / "student" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("tiny/llama", COMMIT)

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "student")
    assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="is an adapter of another model"):
        make_student(make_config(tmp_path / "student"))


ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(2, 64, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
]


class WithMuon(DistillationTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        student: Any = self.model if model is None else model
        if self.optimizer is None:
            self.optimizer = make_muon(student, learning_rate=self.args.learning_rate)
        return self.optimizer


def make_adapter_trainer(
    folder: Path, output: Path, *, fused: bool = True, **arguments: Any
) -> Any:
    return make_trainer(
        output,
        ROWS,
        tiny.make_model("Gemma2", 64),
        kind=WithMuon if arguments.pop("muon", False) else DistillationTrainer,
        student=make_student(make_config(folder, lora_r=4, lora_dropout=arguments.pop("p", 0.0))),
        distillation=DistillationArguments(
            targets="top_k:8",
            ce_weight=0.3,
            fused=fused,
            check_first_batch=False,  # no teacher knows random ids
        ),
        **{"max_steps": 2, **arguments},
    )


def train_adapters(folder: Path, output: Path, **options: Any) -> tuple[torch.Tensor, Any]:
    """By how much two steps of plain gradient descent move the adapters; and the Trainer."""
    trainer = make_adapter_trainer(
        folder, output, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **options
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    moved = [
        (p - before[name]).flatten()
        for name, p in trainer.model.named_parameters()
        if "lora_" in name
    ]
    return torch.cat(moved).detach(), trainer


@pytest.fixture(scope="module")
def moved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The oracle: what float32 does with the logits in full, and no option of the Trainer."""
    return train_adapters(folder, tmp_path_factory.mktemp("plain"), fused=False)[0]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_train_with_checkpointed_activations(
    folder: Path, tmp_path: Path, moved: torch.Tensor, reentrant: bool
):
    calls = []

    def count(module: torch.nn.Module, *_: object) -> None:
        if module.training:
            calls.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        found, trainer = train_adapters(
            folder,
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
    finally:
        handle.remove()
    assert trainer._batch_loss.head is not None
    assert distance(found, moved) < 1e-5
    mlp = trainer.model.get_submodule("base_model.model.model.layers.0.mlp")
    assert sum(module is mlp for module in calls) == 2 * 2  # again for the gradient of each step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it where none is an error
def test_adapters_train_inside_a_compiled_student(
    folder: Path, tmp_path: Path, moved: torch.Tensor, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "torch.__trace")  # traces take longer than compilation
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, trainer = train_adapters(
        folder, tmp_path, torch_compile=True, torch_compile_backend="eager"
    )
    assert trainer._batch_loss.head is not None
    assert distance(found, moved) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # as far as the head
    torch._dynamo.reset()


def test_adapters_train_in_16_bits_as_exactly_as_through_the_logits(
    folder: Path, tmp_path: Path, moved: torch.Tensor
):
    fused, trainer = train_adapters(folder, tmp_path, bf16=True)
    plain, _ = train_adapters(folder, tmp_path, bf16=True, fused=False)
    assert trainer._batch_loss.head is not None
    assert 0 < distance(fused, moved) < 1.2 * distance(plain, moved) < 0.02


def test_a_run_of_adapters_goes_on_from_its_checkpoint_bit_for_bit(folder: Path, tmp_path: Path):
    options = {
        "muon": True,
        "p": 0.2,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_adapter_trainer(folder, tmp_path, **options)
    whole.train()
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    again = make_adapter_trainer(folder, tmp_path, **options)
    start = weights(again).clone()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))
    assert not torch.equal(weights(again), start)


def test_the_adapter_of_a_local_student_finds_it_again_by_itself(folder: Path, tmp_path: Path):
    local = tmp_path / "local"
    tiny.save_model(local, "GPT2", 64)
    settings = {"lora_r": 2, "lora_alpha": 5, "lora_target_modules": ["c_attn", "c_fc"]}
    student: Any = make_student(make_config(local, **settings))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_student(student, transformers.AutoTokenizer.from_pretrained(folder), tmp_path / "student")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again), logits(student))
    assert again.peft_config["default"].lora_alpha == 5
    assert name_on_hub(local) == (str(local), None)


def test_what_cannot_be_made_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--lora-target-modules: .*w_proj"):
        make_student(make_config(folder, lora_r=4, lora_target_modules=["w_proj"]))
    with pytest.raises(ValueError, match=r"flash_attention_2|FlashAttention2"):
        make_student(make_config(folder, attn_implementation="flash_attention_2"))
    with pytest.raises(ValueError, match="--load-in-4bit needs a GPU, and this run is on the CPU"):
        make_student(make_config(folder, lora_r=4, load_in_4bit=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": 16}, "--lora-alpha does nothing without --lora-r"),
        ({"lora_dropout": 0.1}, "--lora-dropout does nothing without --lora-r"),
        ({"lora_target_modules": ["q_proj"]}, "--lora-target-modules does nothing without"),
        ({"load_in_4bit": True}, "--load-in-4bit needs --lora-r"),
        ({"load_in_4bit": True, "load_in_8bit": True, "lora_r": 4}, "not both"),
        ({"dtype": "float16"}, "--dtype float16 needs --lora-r"),
        ({"hub_model_id": "me/it"}, "--hub-model-id does nothing without --push-to-hub"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        StudentOptions(**settings)


def test_a_revision_is_of_a_student_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cache = folder.parents[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert find_student(Path("tiny/llama"), COMMIT) == folder
    assert find_student(Path("tiny/llama")) == folder
    with pytest.raises(ValueError, match=r"no model of that name at revision v2 could be fetched"):
        find_student(Path("tiny/llama"), "v2")
    with pytest.raises(ValueError, match=r"--revision v2 is for a student of the hub"):
        find_student(folder, "v2")


def test_without_a_network_a_student_is_not_pushed_and_not_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = StudentOptions(push_to_hub=True, hub_model_id="me/it")
    saved = folder.parent / "student"
    with pytest.raises(ConnectionError, match="cannot make or find me/it on the hub"):
        make_hub_repo(options, folder)
    with pytest.raises(ConnectionError, match=rf"is saved in {saved}.*hf upload me/it {saved}"):
        push_student(options, folder.parent)


def test_a_student_is_pushed_as_its_output_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hub's side is recorded, not there."""
    asked: list[dict[str, Any]] = []

    def create_repo(name: str, **options: Any) -> huggingface_hub.RepoUrl:
        asked.append({"name": name, **options})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

    def upload_folder(**options: Any) -> huggingface_hub.CommitInfo:
        asked.append(options)
        return huggingface_hub.CommitInfo(
            f"https://huggingface.co/{options['repo_id']}/commit/{COMMIT}", "", "", COMMIT
        )

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    options = StudentOptions(push_to_hub=True, hub_private_repo=True)
    output = tmp_path / "my-student"
    assert push_student(options, output) == "https://huggingface.co/me/my-student"
    assert asked[0]["name"] == "my-student"
    assert asked[0]["private"] is True
    assert asked[1]["repo_id"] == "me/my-student"
    assert asked[1]["folder_path"] == output / "student"

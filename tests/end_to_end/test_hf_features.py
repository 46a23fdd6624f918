"""transformers' Trainer with a loss on features: the step, the projectors in it, and resuming."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from student_trainer import (
    FeatureLoss,
    InvalidRequest,
    LocalTeacher,
    Recorded,
    distillation_loss,
)
from student_trainer.cli import main
from student_trainer.hf.feature_hooks import PROJECTORS_FILE
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from student_trainer.teachers.layout import Layout
from student_trainer.training.results import Results
from tests.conftest import one_torch_thread
from tests.end_to_end.conftest import write_config
from tests.end_to_end.test_hf_trainer import CHECKPOINTING, InOrder
from tests.support import tiny
from tests.support.hf import TOKENIZER, make_trainer, shard_on_cpu, weights
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

FEATURES: dict[str, Any] = {"features": "features:layers=1+2", "feature_layers": "0+1"}
"""Of a teacher of two layers and a width of 64, for a student of one layer and 32."""
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def arguments(**settings: Any) -> DistillationArguments:
    return DistillationArguments(**{"targets": "sampled:8", **FEATURES, **settings})


def all_weights(trainer: Any) -> torch.Tensor:
    projectors = [one.detach().flatten() for one in trainer.feature_loss.parameters()]
    return torch.cat([weights(trainer), *projectors])


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "feature_loss" in entry]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_loss_is_that_of_the_teachers_own_states(teacher_model, rows, tmp_path: Path, kind):
    student = tiny.make_student()
    trainer: Any = make_trainer(
        tmp_path,
        rows,
        teacher_model,
        kind=InOrder,
        student=student,
        distillation=arguments(feature_loss=kind, feature_weight=0.5, ce_weight=0.1),
        max_steps=1,
    )
    batch = trainer.data_collator(rows[:4])
    trained = Layout.of(batch).trained.flatten()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = teacher_model(**inputs, output_hidden_states=True).hidden_states
        own = student(**inputs, output_hidden_states=True).hidden_states
        losses = []
        for layer, own_layer in {1: 0, 2: 1}.items():
            wanted = states[layer].flatten(0, 1)[trained].bfloat16().float()
            wanted = torch.nn.functional.layer_norm(wanted, wanted.shape[1:])
            got = own[own_layer].flatten(0, 1)[trained]
            got = trainer.feature_loss.projectors[str(layer)](got)
            if kind == "mse":
                losses.append(torch.nn.functional.mse_loss(got, wanted))
            else:
                losses.append(1 - torch.cosine_similarity(got, wanted).mean())
        expected = float(torch.stack(losses).mean())
    before = all_weights(trainer)
    trainer.train()
    (logs,) = logs_of(trainer)
    assert logs["feature_loss"] == pytest.approx(expected, rel=1e-3)
    parts = logs["kd_loss"] + 0.1 * logs["ce_loss"] + 0.5 * logs["feature_loss"]
    assert logs["loss"] == pytest.approx(parts, rel=1e-4)
    moved = (all_weights(trainer) - before).abs()
    assert (moved[-64 * 33 * 2 :] > 0).float().mean() > 0.99, "the projectors are trained"


def test_features_from_a_service_are_counted_and_go_with_the_other_targets(
    trained_service, rows, tmp_path: Path
):
    trainer = make_trainer(
        tmp_path,
        rows,
        trained_service.address,
        distillation=arguments(ahead="3"),
        max_steps=12,
    )
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 12
    assert logs[-1]["feature_loss"] < 0.8 * logs[0]["feature_loss"]
    # Two layers of 64 numbers in 16 bits, and the draws; exact when nothing is in flight.
    assert 2 * 2 * 64 < logs[-1]["bytes_per_token"] < 2 * 2 * 64 + 200
    trainer.close()


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_is_the_same_however_it_is_cut_into_batches(
    teacher_model, rows, tmp_path: Path, fused
):
    """Some batches train nothing. In float64, projectors included."""
    emptied = [
        {**row, "labels": [-100] * len(row["labels"])} if number % 4 == 2 else row
        for number, row in enumerate(rows)
    ]
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(
            tmp_path,
            emptied,
            teacher_model,
            student=tiny.make_student().double(),
            distillation=arguments(fused=fused, ce_weight=0.3),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            **SGD,
        )
        trainer.train()
        assert (trainer._batch_loss.head is not None) == fused
        found.append((all_weights(trainer), [entry["loss"] for entry in logs_of(trainer)]))
    for cut, losses in found[1:]:
        assert (cut - found[0][0]).abs().max() < 1e-10
        assert losses == pytest.approx(found[0][1], rel=1e-6)


@pytest.mark.parametrize("option", ["bf16", CHECKPOINTING])
def test_autocast_and_checkpointing_change_little_or_nothing(
    teacher_model, rows, tmp_path: Path, option
):
    found = []
    plain: dict[str, Any] = {}
    for options in (plain, {option: True}):
        trainer: Any = make_trainer(
            tmp_path,
            rows,
            teacher_model,
            student=tiny.make_model("Llama", 64),
            distillation=arguments(feature_layers="1+2"),
            max_steps=2,
            **SGD,
            **options,
        )
        trainer.train()
        assert all(one.dtype == torch.float32 for one in trainer.feature_loss.parameters())
        found.append((all_weights(trainer), logs_of(trainer)))
    (exact_weights, exact), (moved, logs) = found
    tolerance = 2e-2 if option == "bf16" else 1e-6
    for entry, wanted in zip(logs, exact, strict=True):
        for name in ("loss", "feature_loss", "kd_loss", "grad_norm"):
            assert entry[name] == pytest.approx(wanted[name], rel=tolerance), name
    if option != "bf16":
        torch.testing.assert_close(moved, exact_weights, rtol=1e-5, atol=1e-6)


def test_resumed_from_any_checkpoint_student_and_projectors_are_the_same(
    teacher_model, rows, tmp_path: Path
):
    def trainer(folder: Path, **settings: Any):
        return make_trainer(
            folder,
            rows,
            teacher_model,
            student=tiny.make_student(dropout=0.2),
            distillation=arguments(**settings),
            max_steps=6,  # of which an epoch has 3
            gradient_accumulation_steps=2,
            weight_decay=0.01,
            save_strategy="steps",
            save_steps=1,
        )

    whole = trainer(tmp_path / "whole", ahead="1")
    whole.train()
    for step in (1, 3, 5):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = trainer(folder, ahead="7")
        torch.rand(step)  # what a new process has drawn so far
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 6
        assert torch.equal(all_weights(again), all_weights(whole)), f"from step {step}"
    # The student alone is exported.
    names = {name for name, _ in tiny.make_student().named_parameters()}
    whole.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / PROJECTORS_FILE).exists()
    for saved in (tmp_path / "student", tmp_path / "whole" / "checkpoint-6"):
        assert load_file(saved / "model.safetensors").keys() <= names
    # With features or without them is not the same training.
    plain = trainer(tmp_path / "from-1", features="", feature_layers="")
    with pytest.raises(ValueError, match=r"was trained with a loss on features\. Give features"):
        plain.train(resume_from_checkpoint=True)
    (tmp_path / "from-3" / "checkpoint-6" / PROJECTORS_FILE).unlink()
    with pytest.raises(ValueError, match=r"without a loss on features\. Leave out features"):
        trainer(tmp_path / "from-3").train(resume_from_checkpoint=True)


def train_and_keep(folder: Path, rows: list, address: str, num_ranks: int) -> None:
    """Two steps; the weights and the losses go to a file of this rank."""
    rank = int(os.environ.get("RANK", "0"))
    trainer = make_trainer(
        folder,
        rows,
        address,
        distillation=arguments(ce_weight=0.3),
        per_device_train_batch_size=4 // num_ranks,
        gradient_accumulation_steps=2,
        max_steps=2,
        **SGD,
        ddp_find_unused_parameters=False,
    )
    trainer.train()
    trainer.close()
    losses = [entry["feature_loss"] for entry in logs_of(trainer)]
    torch.save({"weights": all_weights(trainer), "losses": losses}, folder / f"{rank}.pt")


def test_two_processes_take_the_steps_of_one(trained_service, rows, tmp_path: Path):
    rows = [
        {**row, "labels": [-100] * len(row["labels"])} if number % 3 == 1 else row
        for number, row in enumerate(rows)
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    train_and_keep(alone, rows, trained_service.address, 1)
    codes = run_ranks(train_and_keep, together, rows, trained_service.address, 2)
    assert codes == [0, 0]
    expected = torch.load(alone / "0.pt")
    for rank in (0, 1):
        found = torch.load(together / f"{rank}.pt")
        assert (found["weights"] - expected["weights"]).abs().max() < 1e-6
    assert torch.load(together / "0.pt")["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"targets": "features:layers=1"}, ValueError, "from which no divergence can be computed"),
        ({"features": "top_k:4"}, ValueError, "features are states of layers"),
        ({"feature_layers": "1"}, ValueError, r"for each of the 2 layers .* such as '0\+1'; got"),
        ({"feature_layers": "one+two"}, ValueError, "feature_layers must name a layer"),
        ({"features": ""}, ValueError, "feature_layers does nothing without features"),
        ({"feature_loss": "l1"}, ValueError, "feature_loss must be mse or cosine"),
        ({"feature_weight": 0.0}, ValueError, "feature_weight must be above 0"),
        ({"feature_layers": "0+2"}, ValueError, "the student has 1 layers"),
        ({"features": "features:layers=1+9"}, InvalidRequest, "has 2 layers"),
    ],
)
def test_features_that_cannot_be_are_refused_when_the_trainer_is_made(
    teacher_model, rows, tmp_path: Path, settings, error, word
):
    with pytest.raises(error, match=word):
        make_trainer(tmp_path, rows, teacher_model, distillation=arguments(**settings))


def test_a_record_has_no_room_for_features(teacher_model, rows, tmp_path: Path):
    teacher = LocalTeacher(teacher_model, TOKENIZER)
    with (
        Recorded(tmp_path / "record", teacher) as record,
        pytest.raises(ValueError, match="a record holds one of the two"),
    ):
        make_trainer(tmp_path, rows, record, distillation=arguments())


def test_teachers_of_two_widths_share_no_projector(teacher_model, rows, tmp_path: Path):
    teachers = {
        "wide": LocalTeacher(teacher_model, TOKENIZER),
        "narrow": LocalTeacher(tiny.make_model("Llama", 64, hidden_size=32), TOKENIZER),
    }
    with pytest.raises(ValueError, match=r"one hidden size, got \{'wide': 64, 'narrow': 32\}"):
        make_trainer(
            tmp_path,
            rows,
            teachers,
            distillation=arguments(),
            choice={"teacher_column": "teacher"},
        )


class Sharded(DistillationTrainer):
    create_accelerator_and_postprocess = shard_on_cpu  # type: ignore[assignment]


def shard_and_note(folder: Path, rows: list) -> None:
    teacher = tiny.make_model("Gemma2", 64)
    try:
        make_trainer(
            folder,
            rows,
            teacher,
            kind=Sharded,
            student=tiny.make_model("Llama", 64),
            distillation=arguments(),
        )
    except ValueError as error:
        (folder / f"said-{os.environ['RANK']}").write_text(str(error))


def test_a_student_in_parts_is_refused(rows, tmp_path: Path):
    assert run_ranks(shard_and_note, tmp_path, rows, num_ranks=1) == [0]
    assert "FSDP and DeepSpeed keep it in parts" in (tmp_path / "said-0").read_text()


def test_features_alone_are_a_loss_too(teacher_model, rows, tmp_path: Path):
    """The first of TinyBERT's two stages."""
    teacher = LocalTeacher(teacher_model, TOKENIZER)
    trainer = make_trainer(
        tmp_path, rows, teacher, distillation=arguments(kd_weight=0.0), max_steps=2
    )
    trainer.train()
    for entry in logs_of(trainer):
        assert entry["loss"] == pytest.approx(entry["feature_loss"], rel=1e-5)
    assert isinstance(trainer.feature_loss, FeatureLoss)
    assert isinstance(trainer, transformers.Trainer)


def test_train_learns_features_and_says_so(
    trained_service, student_folder, text, tmp_path: Path, capsys
):
    config = write_config(
        tmp_path / "train.toml",
        teacher=trained_service.address,
        student=str(student_folder),
        data=[str(text)],
        output=str(tmp_path / "out"),
        sequence_length=64,
        batch_size=8,
        steps=8,
        learning_rate=1e-2,
        checkpoint_every=8,
        log_every=1,
        features="features:layers=1+2",
        feature_layers="1+2",
        feature_loss="cosine",
        feature_weight=0.5,
    )
    assert main(["train", config]) == 0
    history = Results.load(tmp_path / "out").students["distilled"].history
    assert history[-1]["feature_loss"] < history[0]["feature_loss"]
    for entry in history:
        parts = entry["kd_loss"] + 0.5 * entry["feature_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)
    saved = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert not [name for name in saved if "projector" in name]
    sealed = tmp_path / "out" / "checkpoints" / "checkpoint-8"
    assert PROJECTORS_FILE in json.loads((sealed / "run.json").read_text())["file_digests"]
    capsys.readouterr()
    assert main(["train", config, "--record", str(tmp_path / "record")]) == 2
    assert "--record holds --targets alone" in capsys.readouterr().err


def test_the_draft_models_inputs_have_the_shapes_that_the_docs_say(teacher_model, rows):
    """Runs the example of the docs, on a teacher of two layers."""
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    code = page.rpartition("```python\n")[2].partition("```")[0]
    size, width, num_ids = 64, 16, 64
    found: dict[str, Any] = {
        "teacher": LocalTeacher(teacher_model, TOKENIZER),
        "text": rows[1]["input_ids"],
        "torch": torch,
        "distillation_loss": distillation_loss,
        "reduce": torch.nn.Linear(3 * size, width),
        "embed": torch.nn.Embedding(num_ids, width),
        "draft": torch.nn.Linear(2 * width, num_ids),
    }
    exec(code.replace("layers=2+12+21", "layers=0+1+2"), found)
    length = len(rows[1]["input_ids"])
    assert found["wide"].shape == (length - 1, 3 * size)
    assert found["logits"].shape == (length - 2, num_ids)
    found["loss"].backward()
    assert found["reduce"].weight.grad.abs().sum() > 0

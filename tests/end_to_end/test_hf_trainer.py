"""transformers' Trainer with a teacher: the loss however batches are cut, resume, what is logged."""

import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers

from student_trainer import (
    ForkedClient,
    IncompatibleTeacher,
    InvalidRequest,
    LocalTeacher,
    ProtocolError,
    TeacherUnavailable,
    connect,
    distillation_loss,
)
from student_trainer.hf.alignment import check_alignment
from student_trainer.hf_trainer import (
    ATTACHED,
    IDENTITY_FILE,
    DistillationArguments,
    DistillationMixin,
    DistillationTrainer,
)
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.fake_cuda import DEVICE, FakeCuda, backward
from tests.support.hf import TOKENIZER, make_trainer, num_trained, weights
from tests.support.waits import Waits

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


def test_it_learns_from_a_service_and_says_how(trained_service, rows, tmp_path: Path):
    arguments = DistillationArguments(targets="top_k:16", ce_weight=0.1, ahead="3")
    trainer = make_trainer(
        tmp_path, rows, trained_service.address, distillation=arguments, max_steps=12
    )
    trainer.train()
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] > 0
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    assert len(logs) == 12
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["kd_loss"] + 0.1 * entry["ce_loss"], rel=1e-4)
        assert 0 <= entry["top1_agreement"] <= 1
        assert 0 < entry["tail_mass"] < 1
        assert 0 < entry["teacher_ce"] < 4
        assert 0 <= entry["waiting_fraction"] <= 1
        assert 0 <= entry["lookahead"] <= 3
        assert 10 < entry["bytes_per_token"] < 200
    assert logs[-1]["kd_loss"] < logs[0]["kd_loss"]
    # Two epochs of 24 rows; evaluation asked for nothing.
    assert logs[-1]["target_rows"] == 2 * num_trained(rows)
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    without = sum(entry["tokens_without_target"] for entry in logs)
    assert without == 2 * (num_tokens - num_trained(rows))
    assert trainer.teacher.counters.rows == 2 * num_trained(rows)
    trainer.close()


@pytest.mark.parametrize("targets", ["sampled:8", "top_k:4", "dense:f32"])
def test_the_step_is_the_same_however_it_is_cut_into_batches(
    teacher_model, rows, tmp_path: Path, targets
):
    found = []
    arguments = DistillationArguments(targets=targets, ce_weight=0.3, temperature=1.5)
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(
            tmp_path,
            rows,
            teacher_model,
            distillation=arguments,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((weights(trainer), losses))
    for cut, losses in found[1:]:
        assert (cut - found[0][0]).abs().max() < 1e-6
        assert losses == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("tied", "sampled:8"), ("frozen", "top_k:4"), ("softcap", "dense:f32")],
)
def test_without_the_students_logits_the_steps_are_the_same(
    teacher_model, rows, tmp_path: Path, kind, targets
):
    """float64, accumulated batches of which some train nothing; every metric is there too."""
    emptied = [
        {**row, "labels": [-100] * len(row["labels"])} if number % 4 == 2 else row
        for number, row in enumerate(rows)
    ]
    start, found = None, []
    for fused in (True, False):
        torch.manual_seed(0)
        student = tiny.make_student() if kind == "tied" else tiny.make_model("Gemma2", 64)
        if kind == "frozen":
            student = tiny.make_model("Llama", 64)
            student.get_output_embeddings().requires_grad_(False)
        start = torch.cat([p.detach().flatten() for p in student.double().parameters()])
        trainer = make_trainer(
            tmp_path,
            emptied,
            teacher_model,
            student=student,
            distillation=DistillationArguments(
                targets=targets, temperature=1.5, ce_weight=0.3, fused=fused
            ),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        assert (trainer._batch_loss.head is not None) == fused
        logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
        found.append((weights(trainer) - start, logs))
    (moved, logs), (expected, exact_logs) = found
    assert expected.norm() > 1e-3
    assert (moved - expected).norm() < 1e-10 * expected.norm()
    timed = {"waiting_fraction", "epoch"}
    for entry, exact in zip(logs, exact_logs, strict=True):
        assert entry.keys() == exact.keys()
        for name in entry.keys() - timed:
            assert entry[name] == pytest.approx(exact[name], rel=1e-5), name


CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in transformers.TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"  # as it was called before


@pytest.mark.parametrize("option", ["bf16", CHECKPOINTING])
def test_the_head_is_replaced_inside_autocast_and_checkpointing(
    teacher_model, rows, tmp_path: Path, option
):
    found = []
    for fused in (True, False):
        trainer = make_trainer(
            tmp_path,
            rows,
            teacher_model,
            student=tiny.make_model("Gemma2", 64),
            distillation=DistillationArguments(targets="top_k:8", ce_weight=0.3, fused=fused),
            max_steps=1,
            **{option: True},
        )
        trainer.train()
        assert (trainer._batch_loss.head is not None) == fused
        found.append(trainer.state.log_history[0])
    for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=5e-3), name


class InOrder(DistillationTrainer):
    """Takes the rows as they come; how to ask for that differs among versions of transformers."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        assert self.train_dataset is not None
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_packed_and_masked_batches_train_exactly_the_rows_of_their_targets(
    teacher_model, rows, tmp_path: Path
):
    teacher = LocalTeacher(teacher_model, TOKENIZER)

    def pack(some) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[i for row in some for i in row["input_ids"]]]),
            "labels": torch.tensor([[i for row in some for i in row["labels"]]]),
            "position_ids": torch.tensor([[i for r in some for i in range(len(r["input_ids"]))]]),
        }

    student = tiny.make_student()
    trainer = make_trainer(
        tmp_path,
        rows,
        teacher,
        student=student,
        collator=pack,
        distillation=DistillationArguments(targets="top_k:8", ce_weight=0.0, ahead="2"),
        max_steps=1,
        kind=InOrder,
    )
    expected, count = 0.0, 0
    with torch.no_grad():
        batch = pack(rows[:4])
        logits = student(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        first = 0
        for row in rows[:4]:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            ((_, targets),) = teacher.stream([ids], targets="top_k:8")
            trained = (labels[1:] != -100).nonzero()[:, 0]
            for one in trained.tolist():
                loss = distillation_loss(logits[first + one][None], targets[one : one + 1])
                expected += float(loss)
            count += len(trained)
            first += len(ids)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected / count, rel=1e-5)
    assert trainer.state.log_history[0]["target_rows"] == count


class Counting:
    """A teacher that notes how many rows it was asked for."""

    def __init__(self, teacher) -> None:
        self.teacher, self.info, self.rows = teacher, teacher.info, 0

    def stream_batches(self, loader, **options):
        pairs = self.teacher.stream_batches(loader, **options)
        for batch, targets in pairs:
            self.rows += targets.num_rows
            yield batch, targets


@pytest.mark.parametrize(("targets", "steps"), [("sampled:8", (1, 2, 3, 5, 7)), ("top_k:4", (3,))])
def test_resumed_from_any_checkpoint_the_weights_are_the_same(
    teacher_model, rows, tmp_path: Path, targets, steps
):
    settings = {
        "max_steps": 8,  # of which an epoch has 3
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
    }

    def trainer(folder: Path, ahead: str):
        return make_trainer(
            folder,
            rows,
            teacher_model,
            student=tiny.make_student(dropout=0.2),
            distillation=DistillationArguments(targets=targets, ahead=ahead),
            **settings,
        )

    whole = trainer(tmp_path / "whole", "1")
    whole.train()
    for step in steps:
        folder = tmp_path / f"from-{step}"
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / name, folder / name)
        # A later one that was killed while it was written is left out.
        (folder / "checkpoint-9").mkdir()
        (folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9,')
        again = trainer(folder, "7")
        torch.rand(step)  # what a new process has drawn so far
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 8
        assert torch.equal(weights(again), weights(whole)), f"from step {step}"


def test_what_is_skipped_on_resume_is_not_asked_for(teacher_model, rows, tmp_path: Path):
    teacher = Counting(LocalTeacher(teacher_model, TOKENIZER))
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    make_trainer(tmp_path, rows, teacher, **settings).train()
    assert teacher.rows == num_trained(rows)
    teacher.rows = 0
    make_trainer(tmp_path, rows, teacher, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert 0 < teacher.rows < num_trained(rows) / 2


def test_another_teacher_does_not_continue_the_run(teacher_model, rows, tmp_path: Path):
    make_trainer(
        tmp_path, rows, teacher_model, save_strategy="steps", save_steps=2, max_steps=2
    ).train()
    other = make_trainer(
        tmp_path, rows, LocalTeacher(tiny.make_model("Llama", 64), TOKENIZER), max_steps=3
    )
    with pytest.raises(IncompatibleTeacher, match=IDENTITY_FILE):
        other.train(resume_from_checkpoint=True)


def test_batches_without_anything_to_train_are_passed_over(teacher_model, rows, tmp_path: Path):
    emptied = [
        {**row, "labels": [-100] * len(row["labels"])} if number % 4 != 2 else row
        for number, row in enumerate(rows[:8])
    ]
    trainer = make_trainer(
        tmp_path,
        emptied,
        teacher_model,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=4,
        distillation=DistillationArguments(ahead="3"),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    assert logs[-1]["target_rows"] == 2 * num_trained(emptied)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)


class OtherTrainer(transformers.Trainer):
    """As SFTTrainer does: its own compute_loss around the Trainer's, and more to log."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self.own_losses = [*getattr(self, "own_losses", []), float(loss.detach())]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        super().log({**logs, "other": 1.0}, start_time)


class Distilled(DistillationMixin, OtherTrainer):
    pass


def test_the_mixin_goes_before_any_trainer(teacher_model, rows, tmp_path: Path):
    trainer = make_trainer(tmp_path / "mixin", rows, teacher_model, kind=Distilled)
    trainer.train()
    assert not hasattr(trainer, "own_losses")
    plain = make_trainer(tmp_path / "plain", rows, teacher_model)
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))
    assert trainer.state.log_history[0]["other"] == 1.0
    assert "kd_loss" in trainer.state.log_history[0]
    trainer.evaluate()
    assert trainer.own_losses  # evaluation is the other Trainer's own


def test_without_a_teacher_it_is_the_trainer_that_it_was(rows, tmp_path: Path):
    control = make_trainer(tmp_path / "control", rows, None)
    control.train()
    assert "kd_loss" not in control.state.log_history[0]
    assert control.state.log_history[0]["loss"] > 0


def test_targets_that_do_not_reach_the_loss_are_noticed(teacher_model, rows, tmp_path: Path):
    class Swallowing(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop(ATTACHED, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make_trainer(tmp_path, rows, teacher_model, kind=Swallowing)
    with pytest.raises(ProtocolError, match="0 reached the loss"):
        trainer.train()


def test_targets_of_other_tokens_stop_the_first_step(teacher_model, rows, tmp_path: Path):
    class OneOff:
        def __init__(self, teacher) -> None:
            self.teacher, self.info = teacher, teacher.info

        def stream_batches(self, loader, **options):
            for batch in loader:
                shifted = {"input_ids": batch["input_ids"].roll(1, 1)}
                shifted = {**batch, **shifted}
                ((_, targets),) = self.teacher.stream_batches([shifted], **options)
                yield batch, targets

    teacher = OneOff(LocalTeacher(teacher_model, TOKENIZER))
    trainer = make_trainer(tmp_path, rows, teacher)
    with pytest.raises(ProtocolError, match="do not belong to these tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_workers_and_a_list_of_addresses(trained_service, rows, tmp_path: Path):
    alone = make_trainer(tmp_path / "a", rows, trained_service.address)
    alone.train()
    with connect(trained_service.address) as teacher:
        shared = make_trainer(tmp_path / "b", rows, teacher, dataloader_num_workers=1)
        shared.train()
        shared.close()
        assert len(list(teacher.stream([[1, 2, 3]]))) == 1  # whose it is not, it leaves open
    listed = make_trainer(tmp_path / "c", rows, [trained_service.address])
    listed.train()
    for other in (shared, listed):
        assert torch.equal(weights(other), weights(alone))
    alone.close()
    listed.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_worker_that_touches_the_client_gets_an_error_at_once(
    trained_service, rows, tmp_path: Path
):
    with connect(trained_service.address) as teacher:

        class Asking(list):
            def __getitem__(self, index):
                next(teacher.stream([[1, 2, 3]]))
                return super().__getitem__(index)

        trainer = make_trainer(tmp_path, Asking(rows), teacher, dataloader_num_workers=1)
        began = time.monotonic()
        with pytest.raises(ForkedClient, match="around the DataLoader"):
            trainer.train()
        assert time.monotonic() - began < 5  # of which most is the start of the worker


def test_mistakes_are_reported_when_the_trainer_is_made(trained_service, rows, tmp_path: Path):
    with pytest.raises(ValueError, match="address such as"):
        make_trainer(tmp_path, rows, 50051)
    arguments = DistillationArguments(temperature=0.0)
    with pytest.raises(InvalidRequest, match="temperature"):
        make_trainer(tmp_path, rows, trained_service.address, distillation=arguments)
    arguments = DistillationArguments(patience_s=0.5)
    with pytest.raises(TeacherUnavailable, match=r"127\.0\.0\.1:1"):
        make_trainer(tmp_path, rows, "127.0.0.1:1", distillation=arguments)


@pytest.mark.parametrize(
    ("arguments", "settings", "word"),
    [
        ({"divergence": "forwards"}, {}, "divergence must be one of"),
        ({"divergence": "reverse_kl"}, {}, "cannot be estimated from sampled"),
        ({"divergence": "jsd", "beta": 1.0, "targets": "top_k:128"}, {}, "beta must be between"),
        ({"ahead": "3 batches"}, {}, "ahead must be a number of batches"),
        ({"targets": "top_k:0"}, {}, "top_k"),
        ({"kd_weight": 0.0}, {}, "nothing to learn"),
        ({"ce_weight": -1.0}, {}, "ce_weight must be at least 0"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 would have no effect"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_done(
    rows, tmp_path: Path, arguments, settings, word
):
    """No service answers at the address, and the data is not asked for its length."""
    with pytest.raises(ValueError, match=word):
        make_trainer(
            tmp_path / "folder",
            rows,
            "127.0.0.1:1",
            distillation=DistillationArguments(**arguments),
            **settings,
        )
    assert not (tmp_path / "folder").exists()  # the Trainer makes it


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_loss_of_ones_own_is_refused(teacher_model, rows, tmp_path: Path):
    class WithLoss(DistillationTrainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs, compute_loss_func=lambda *_, **__: 0.0)

    with pytest.raises(ValueError, match="compute_loss_func would have no effect"):
        make_trainer(tmp_path, rows, teacher_model, kind=WithLoss)
    make_trainer(tmp_path, rows, None, kind=WithLoss, label_smoothing_factor=0.1)


class OnCuda(DistillationTrainer):
    """Takes its first step on the CPU, where it finds out about the head, and the second on a GPU.

    The second step ends with its gradients, which are taken away: the optimizer, whose parameters
    those of the GPU replace, has nothing to do.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.cuda, self.waits = FakeCuda(), Waits()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step == 0:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        assert self.model is not None
        with self.cuda:
            self.model.to(DEVICE)
            self._meter._device = DEVICE
            self._meter.reset()
        with self.cuda, self.waits:
            return super().get_batch_samples(epoch_iterator, num_batches, DEVICE)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.cuda, self.waits:
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            backward(loss)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.device == DEVICE for grad in gradients)
        model.zero_grad()
        return torch.zeros(())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("targets", ["sampled:8", "top_k:4", "dense:f32"])
def test_no_batch_waits_for_the_device(teacher_model, rows, tmp_path: Path, targets, fused):
    trainer = make_trainer(
        tmp_path,
        rows,
        teacher_model,
        kind=OnCuda,
        student=tiny.make_model("Llama", 64),
        distillation=DistillationArguments(targets=targets, ce_weight=0.3, fused=fused),
        max_steps=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        logging_strategy="no",
    )
    trainer.train()
    assert (trainer._batch_loss.head is not None) == fused
    assert trainer._meter.rows_in_loss > 0
    assert trainer.waits.found == []


def test_a_right_teacher_is_not_refused_for_a_few_rows(teacher_model, rows):
    """Where a few tokens are all that is trained, chance decides which shift is the best."""
    teacher = LocalTeacher(teacher_model, TOKENIZER)
    ids = torch.tensor([row["input_ids"][:8] for row in rows])
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 4) * 40:
        labels = torch.full_like(ids[:1], -100)
        number = int(torch.randint(len(ids), (), generator=generator))
        places = 1 + torch.randperm(6, generator=generator)[:size]
        labels[0, places] = ids[number, places]
        batch = {"input_ids": ids[number : number + 1], "labels": labels}
        ((_, targets),) = teacher.stream_batches([batch], targets="sampled:4")
        check_alignment(batch, targets)


def test_the_check_waits_for_enough_rows(teacher_model, rows, tmp_path: Path):
    """Batches of one sequence, of which three tokens are trained; all of the wrong text."""

    class Other:
        def __init__(self, teacher) -> None:
            self.teacher, self.info = teacher, teacher.info

        def stream_batches(self, loader, **options):
            for batch in loader:
                shifted = {**batch, "input_ids": batch["input_ids"].roll(1, 1)}
                ((_, targets),) = self.teacher.stream_batches([shifted], **options)
                yield batch, targets

    few = [{**row, "labels": [-100] * 3 + row["labels"][3:6] + [-100] * 3} for row in rows]
    few = [{name: ids[:9] for name, ids in row.items()} for row in few if len(row["input_ids"]) > 9]
    trainer = make_trainer(
        tmp_path,
        few,
        Other(LocalTeacher(teacher_model, TOKENIZER)),
        per_device_train_batch_size=1,
        max_steps=12,
    )
    with pytest.raises(ProtocolError, match="do not belong to these tokens"):
        trainer.train()
    assert 0 < trainer.state.global_step < 10


def test_the_arguments_are_flags():
    parser = transformers.HfArgumentParser(
        (transformers.TrainingArguments, DistillationArguments)  # type: ignore[arg-type]
    )
    flags = ["--output_dir", "x", "--targets", "top_k:8", "--ce_weight", "0.1", "--ahead", "8"]
    _, arguments = parser.parse_args_into_dataclasses(flags)
    assert arguments == DistillationArguments(targets="top_k:8", ce_weight=0.1, ahead="8")

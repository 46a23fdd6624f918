"""The Trainer on data without a length: ranks of unequal pace, passes, and what the look-ahead holds."""

import os
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from torch.utils.data import IterableDataset

from student_trainer import LocalTeacher
from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from student_trainer.teachers.teacher import Teacher
from tests.conftest import one_torch_thread
from tests.support.hf import collate, make_trainer, weights
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

LENGTH = 8
SETTINGS = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 5}


class Stream(IterableDataset):
    """Rows of one length, as a dispatcher needs them; some of them train nothing."""

    def __init__(self, rows: list, empty: tuple[int, ...] = ()) -> None:
        self.rows = [
            {
                "input_ids": row["input_ids"][:LENGTH],
                "labels": [-100] * LENGTH if number in empty else row["input_ids"][:LENGTH],
            }
            for number, row in enumerate(rows)
        ]

    def __iter__(self):
        yield from self.rows


class Late(LocalTeacher):
    """Answers so many seconds late."""

    late_s = 0.0

    def submit(self, piece, options):
        answer, future = super().submit(piece, options).result(), Future()
        threading.Timer(self.late_s, future.set_result, (answer,)).start()
        return future


def train(folder: Path, rows: list, teacher: Teacher, ahead: str, **settings):
    trainer = make_trainer(
        folder,
        rows,
        teacher,
        distillation=DistillationArguments(targets="sampled:8", ahead=ahead),
        **{**SETTINGS, **settings},
    )
    trainer.train()
    return trainer


def train_a_stream(folder: Path, rows: list, teacher_folder: Path) -> None:
    """The second rank hears late from its teacher, and its first batches train nothing."""
    rank = int(os.environ.get("RANK", "0"))
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    teacher = Late(model)
    teacher.late_s = 0.3 * rank
    stream = Stream(rows[:12], empty=(2, 3, 6, 7))
    found = {}
    for ahead in ("2", "30s") if num_ranks > 1 else ("1",):
        trainer = train(folder, stream, teacher, ahead, per_device_train_batch_size=4 // num_ranks)
        assert trainer.state.global_step == 5
        found[ahead] = weights(trainer)
    torch.save(found, folder / f"rank-{rank}.pt")


def test_ranks_of_unequal_pace_take_from_a_dispatcher_together(
    teacher_folder, rows, tmp_path: Path
):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    train_a_stream(alone, rows, teacher_folder)
    codes = run_ranks(train_a_stream, together, rows, teacher_folder, seconds=60)
    assert codes == [0, 0]
    expected = torch.load(alone / "rank-0.pt")["1"]
    for rank in (0, 1):
        for found in torch.load(together / f"rank-{rank}.pt").values():
            assert (found - expected).abs().max() < 1e-6


def train_shards(folder: Path, rows: list, teacher_folder: Path) -> None:
    """Each rank reads shards of its own: of 6 and 2 batches, or none."""
    teacher = LocalTeacher(transformers.AutoModelForCausalLM.from_pretrained(teacher_folder))
    rows = Stream(rows).rows

    def sharded(*counts: int) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(
            lambda counts: (row for count in counts for row in rows[:count]),
            gen_kwargs={"counts": list(counts)},
        )

    settings = {"per_device_train_batch_size": 2, "accelerator_config": {"dispatch_batches": False}}
    trainer = train(folder, sharded(12, 4), teacher, "3", **settings)
    assert trainer.state.global_step == 5  # three passes of two steps each
    assert {entry["target_rows"] for entry in trainer.state.log_history if "loss" in entry} == {
        step * 2 * 2 * (LENGTH - 1) for step in range(1, 6)
    }
    with pytest.raises(ValueError, match=r"rank 1 got no batch.*dispatch_batches=True"):
        train(folder, sharded(12, 0), teacher, "3", **settings)


def test_ranks_whose_shards_are_unequal_end_a_pass_together(teacher_folder, rows, tmp_path: Path):
    assert run_ranks(train_shards, tmp_path, rows, teacher_folder, seconds=60) == [0, 0]


class Noting:
    """A teacher that notes the epoch of each stream."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.info = teacher, teacher.info
        self.epochs: list[int] = []

    def stream_batches(self, loader, **options):
        self.epochs.append(options["epoch"])
        yield from self.teacher.stream_batches(loader, **options)


@pytest.fixture(scope="module")
def teacher(teacher_model) -> LocalTeacher:
    return LocalTeacher(teacher_model)


def test_each_pass_over_data_without_a_length_has_draws_of_its_own(teacher, rows, tmp_path: Path):
    noting = Noting(teacher)
    train(tmp_path, Stream(rows[:8]), noting, "1")
    assert noting.epochs == [0, 1, 2]


class WithImages(DistillationTrainer):
    """Its batches have something large that the student does not read."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("image", None)
        return super().compute_loss(model, inputs, *args, **kwargs)


NBYTES = 256 << 10


@pytest.mark.parametrize("ahead", ["30s,1MiB", "2"])
def test_the_look_ahead_bounds_batches_too_also_those_that_train_nothing(
    teacher, rows, tmp_path: Path, ahead
):
    held: list[weakref.ref] = []
    most = 0

    def collate_large(some):
        nonlocal most
        image = torch.zeros(NBYTES, dtype=torch.uint8)
        held.append(weakref.ref(image))
        most = max(most, sum(one() is not None for one in held))
        return {**collate(some), "image": image}

    make_trainer(
        tmp_path,
        Stream(rows[:24], empty=tuple(range(6, 18))).rows,
        teacher,
        kind=WithImages,
        collator=collate_large,
        distillation=DistillationArguments(ahead=ahead),
        per_device_train_batch_size=1,
        max_steps=36,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    ).train()
    # Four of 256 KiB, or two that are trained and two that are not; the one in the hand of the
    # loader, which reads one more, and those of the step.
    assert 2 < most <= 8

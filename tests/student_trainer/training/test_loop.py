"""The reference loop: its curves, its progress bar and its warnings."""

import logging
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_trainer import LocalTeacher
from student_trainer.data import batches
from student_trainer.training import loop as trainer
from student_trainer.training.checkpoint import Checkpoints
from student_trainer.training.tensorboard import Curves
from tests.conftest import one_torch_thread
from tests.support import tiny

STEPS = 12
LOG_EVERY = 5

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


class Stop(Exception):
    """The end of the process, as far as training is concerned."""


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Gemma2", 64))


def train(teacher, *, targets="top_k:8", stop_at=STEPS, **more) -> trainer.Run:
    ids = torch.randint(2, 64, (40, 12), generator=torch.Generator().manual_seed(0))
    # Found on the first batch: random ids are nothing that a teacher could know.
    settings = {
        "steps": STEPS,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "optimizer": "adamw",
        "kd_weight": 0.7,
        "ce_weight": 0.2,
        "measure": lambda _: 1.5,
        "label": "student",
        "log_every": LOG_EVERY,
    }
    pairs = teacher.stream_batches(
        batches(ids, batch_size=4, steps=STEPS, seed=1), targets=targets, ahead=2
    )
    load, state = pairs.load_state_dict, pairs.state_dict

    class Pairs:
        load_state_dict, state_dict = staticmethod(load), staticmethod(state)

        def __iter__(self):
            return self

        def __next__(self):
            if state()["handed_out"] == stop_at:
                raise Stop
            return next(pairs)

    return trainer.train(tiny.make_student(), Pairs(), **(settings | more))


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Random ids are not what this teacher would write: its rows fit no shift best."""
    monkeypatch.setattr(trainer, "check_alignment", lambda batch, targets: None)


def curves_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_curves_show_what_was_trained(teacher, tmp_path: Path):
    run = train(
        teacher,
        curves=Curves(tmp_path),
        also=lambda: {"lookahead": 3.0},
    )
    found = curves_in(tmp_path)
    assert set(found) == {
        *("loss", "kd_loss", "ce_loss", "teacher_ce", "top1_agreement", "tail_mass"),
        *("waiting_fraction", "tokens_per_s", "learning_rate", "lookahead", "held_out_loss"),
    }
    for name, points in found.items():
        if name != "held_out_loss":
            assert [step for step, _ in points] == [5, 10, 12], name
    losses = run.train_losses
    assert [value for _, value in found["loss"]] == pytest.approx(
        [sum(losses[:5]) / 5, sum(losses[5:10]) / 5, sum(losses[7:12]) / 5], rel=1e-5
    )
    kd, ce = found["kd_loss"][0][1], found["ce_loss"][0][1]
    assert 0.7 * kd + 0.2 * ce == pytest.approx(found["loss"][0][1], rel=1e-5)
    assert [value for _, value in found["learning_rate"]] == pytest.approx(
        [1e-2 * (STEPS - step) / STEPS for step in (4, 9, 11)]
    )
    assert 0 < found["tail_mass"][0][1] < 1
    assert all(0 <= value <= 1 for _, value in found["top1_agreement"])
    assert found["lookahead"][0] == (5, 3.0)
    assert {value for _, value in found["held_out_loss"]} == {1.5}


def test_curves_do_not_change_what_is_trained(teacher, tmp_path: Path):
    for ce_weight in (0.0, 0.2):
        with_curves = train(teacher, ce_weight=ce_weight, curves=Curves(tmp_path))
        assert train(teacher, ce_weight=ce_weight).train_losses == with_curves.train_losses


def test_curves_go_on_where_the_checkpoint_was_written(teacher, tmp_path: Path):
    whole = train(teacher, curves=Curves(tmp_path / "whole"))
    for stop_at in (7, 9, 11):
        folder = tmp_path / str(stop_at)
        kept = Checkpoints(folder / "checkpoints", every=4, identity={})
        with pytest.raises(Stop):
            train(teacher, stop_at=stop_at, checkpoints=kept, curves=Curves(folder))
        # Files of one second are read in the order of a number without leading zeros: 10 before 9.
        time.sleep(1.0)
        again = train(teacher, checkpoints=kept, curves=Curves(folder))
        assert again.train_losses == whole.train_losses
        found, expected = curves_in(folder), curves_in(tmp_path / "whole")
        for name in ("loss", "learning_rate", "held_out_loss"):
            assert found[name] == expected[name], (stop_at, name)
        for name in ("kd_loss", "top1_agreement"):
            assert [step for step, _ in found[name]] == [5, 10, 12]


def test_labels_alone_have_curves_too(tmp_path: Path):
    ids = torch.randint(2, 64, (40, 12))
    pairs = ((batch, None) for batch in batches(ids, batch_size=4, steps=STEPS, seed=1))
    trainer.train(
        tiny.make_student(),
        pairs,
        steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        optimizer="adamw",
        kd_weight=1.0,
        ce_weight=0.0,
        measure=lambda _: 0.0,
        label="student",
        curves=Curves(tmp_path),
    )
    assert {"loss", "learning_rate", "tokens_per_s"} <= set(curves_in(tmp_path))


def test_the_progress_bar_shows_loss_rate_and_waiting(teacher, capsys):
    train(teacher)
    shown = capsys.readouterr().err
    for words in ("loss ", " tokens/s", "waiting "):
        assert words in shown


def test_killed_between_a_step_and_its_checkpoint_it_goes_on_from_the_one_before(
    teacher, tmp_path: Path
):
    class Killed(Checkpoints):
        def save(self, step, student, state):
            if step == 8:
                raise Stop
            return super().save(step, student, state)

    whole = train(teacher)
    with pytest.raises(Stop):
        train(teacher, checkpoints=Killed(tmp_path, every=4, identity={}))
    again = train(teacher, checkpoints=Checkpoints(tmp_path, every=4, identity={}))
    assert again.train_losses == whole.train_losses


@pytest.mark.parametrize(
    ("targets", "ce_weight", "warned"),
    [
        ("top_k:2", 0.0, True),
        ("top_k:2", 0.1, False),
        ("top_k:64", 0.0, False),
        ("sampled", 0.0, False),
    ],
)
def test_a_large_tail_that_nothing_teaches_is_warned_of_once(
    teacher, caplog, targets, ce_weight, warned
):
    with caplog.at_level(logging.WARNING):
        train(teacher, targets=targets, ce_weight=ce_weight)
    found = [record.getMessage() for record in caplog.records if "outside" in record.getMessage()]
    assert len(found) == warned
    if warned:
        for words in ("larger k", "sampled", "ce_weight"):
            assert words in found[0]

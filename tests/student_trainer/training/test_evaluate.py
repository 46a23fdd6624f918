"""What is measured on held-out text, against plain sums over all rows; and the shuffled control."""

from pathlib import Path

import pytest
import torch

from logit_codec import Targets, TopKTargets
from student_trainer import LocalTeacher, Recorded
from student_trainer.config import TrainConfig
from student_trainer.training import loop as trainer
from student_trainer.training.evaluate import (
    NUM_BINS,
    UNKNOWN,
    evaluate,
    evaluate_teacher,
)
from student_trainer.training.held_out import HeldOut
from student_trainer.training.shuffled_control import ShuffledTargets
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("Gemma2", 64)


@pytest.fixture(scope="module")
def teacher(model) -> LocalTeacher:
    return LocalTeacher(model)


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.randint(2, 64, (12, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def dense(model, sequences) -> torch.Tensor:
    """(N, L-1, V) float64 logprobs of the teacher."""
    return torch.stack([tiny.dense_logits(model, ids).log_softmax(-1) for ids in sequences])


def test_a_student_is_measured_as_plain_sums_over_the_rows_say(sequences, dense):
    student = tiny.make_student()
    found = evaluate(student, sequences, dense.argmax(-1), batch_size=5)
    with torch.no_grad():
        logprobs = student(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    labels = sequences[:, 1:]
    nll = -logprobs.gather(2, labels[:, :, None])[:, :, 0]
    confidence, best = logprobs.exp().max(-1)
    assert found.loss == pytest.approx(trainer.held_out_loss(student, sequences), rel=1e-6)
    assert found.sequence_losses == pytest.approx(nll.mean(1).tolist(), rel=1e-5)
    assert found.accuracy == pytest.approx(float((best == labels).double().mean()))
    assert found.top1_agreement == pytest.approx(float((best == dense.argmax(-1)).double().mean()))
    assert found.agreement_rows == labels.numel()
    error = 0.0
    for number in range(NUM_BINS):
        inside = (confidence >= number / NUM_BINS) & (confidence < (number + 1) / NUM_BINS)
        if inside.any():
            gap = confidence[inside].mean() - (best == labels)[inside].float().mean()
            error += float(gap.abs() * inside.sum() / labels.numel())
    assert found.calibration_error == pytest.approx(error, rel=1e-4)
    assert sum(one.count for one in found.bins) == labels.numel()


def test_without_a_teachers_ids_there_is_no_agreement(sequences):
    unknown = torch.full((len(sequences), sequences.shape[1] - 1), UNKNOWN)
    for best_ids in (None, unknown):
        assert evaluate(tiny.make_student(), sequences, best_ids).top1_agreement is None
    some = unknown.clone()
    some[0, :3] = 5
    assert evaluate(tiny.make_student(), sequences, some).agreement_rows == 3


def test_top_1_tells_all_of_a_teacher(teacher, sequences, dense):
    scores, best_ids = evaluate_teacher(teacher, sequences)
    largest, best = dense.max(-1)
    labels = sequences[:, 1:]
    assert torch.equal(best_ids, best)
    loss = -dense.gather(2, labels[:, :, None]).mean()
    assert scores.loss == pytest.approx(float(loss), rel=1e-3)  # float16 per row
    assert scores.accuracy == pytest.approx(float((best == labels).double().mean()))
    mean = sum(one.count * one.confidence for one in scores.bins) / labels.numel()
    assert mean == pytest.approx(float(largest.exp().mean()), rel=1e-5)


@pytest.mark.parametrize("targets", ["dense:f32", "top_k:16"])
def test_other_kinds_tell_the_likeliest_id_too(teacher, sequences, dense, targets: str):
    _, best_ids = evaluate_teacher(teacher, sequences, targets=targets)
    is_known = best_ids != UNKNOWN
    assert is_known.double().mean() > 0.9
    assert torch.equal(best_ids[is_known], dense.argmax(-1)[is_known])


def test_equal_logprobs_leave_the_likeliest_id_unknown(sequences):
    rows = TopKTargets(
        vocab_size=64,
        temperature=1.0,
        row_splits=torch.tensor([0, 2, 4]),
        token_ids=torch.tensor([3, 7, 3, 7]),
        logprobs=torch.tensor([0.5, 0.5, 0.4, 0.5]).log(),
        tail_logprob=torch.tensor([0.0, 0.1]).log(),
    )
    assert rows.mode()[0].tolist() == [UNKNOWN, 7]


def test_samples_do_not_tell_the_likeliest_id_nor_a_temperature_the_loss(teacher, sequences):
    scores, best_ids = evaluate_teacher(teacher, sequences, targets="sampled:16")
    assert (best_ids == UNKNOWN).all()
    assert scores.loss is not None
    assert scores.accuracy is scores.calibration_error is None
    scores, best_ids = evaluate_teacher(teacher, sequences, targets="top_k:4", temperature=2.0)
    assert (best_ids != UNKNOWN).any()
    assert scores.loss is scores.calibration_error is None
    assert scores.accuracy is not None


def test_a_record_of_samples_says_what_it_cannot_tell_and_a_live_teacher_is_asked(
    teacher, sequences, tmp_path: Path
):
    config = TrainConfig(
        student=tmp_path,
        data=["x"],
        output=tmp_path,
        record=str(tmp_path / "record"),
        targets="sampled:16",
    )
    with Recorded(tmp_path / "record", teacher) as record:
        found = HeldOut.ask(config, record, sequences)
        assert found.unknown == ""
        assert found.teacher.accuracy is not None
    with Recorded(tmp_path / "record") as record:
        found = HeldOut.ask(config, record, sequences)
        assert "sampled:16" in found.unknown
        assert "--teacher" in found.unknown
        assert found.teacher.loss is not None
        assert found.measure(tiny.make_student(), 4).top1_agreement is None
        assert set(found.beside_the_loss()) == {"held_out_accuracy"}
        other = HeldOut.ask(config, record, sequences + 1 - sequences % 2)
        assert "was not recorded" in other.unknown
        assert other.teacher.loss is None


# The shuffled control.


def shuffled(teacher: LocalTeacher, sequences: torch.Tensor, seed: int = 0) -> ShuffledTargets:
    loader = [{"input_ids": some} for some in sequences.split(4)]
    return ShuffledTargets(teacher.stream_batches(loader, targets="top_k:8"), seed=seed)


def row(targets: Targets, number: int) -> tuple[float, ...]:
    assert isinstance(targets, TopKTargets)
    one = targets[number : number + 1]
    return (*one.token_ids.tolist(), *one.logprobs.tolist(), float(one.tail_logprob[0]))


def test_shuffled_rows_are_the_same_rows_and_none_is_in_its_place(teacher, sequences):
    loader = [{"input_ids": some} for some in sequences.split(4)]
    right = list(teacher.stream_batches(loader, targets="top_k:8"))
    for (batch, wrong), (same, targets) in zip(shuffled(teacher, sequences), right, strict=True):
        assert torch.equal(batch["input_ids"], same["input_ids"])
        rows = [row(targets, i) for i in range(targets.num_rows)]
        shuffled_rows = [row(wrong, i) for i in range(targets.num_rows)]
        assert sorted(rows) == sorted(shuffled_rows)
        assert all(one != other for one, other in zip(rows, shuffled_rows, strict=True))


def test_a_run_that_goes_on_shuffles_as_it_would_have(teacher, sequences):
    whole = shuffled(teacher, sequences)
    next(whole)
    again = shuffled(teacher, sequences)
    again.load_state_dict(whole.state_dict())
    other = shuffled(teacher, sequences, seed=1)
    other.load_state_dict(whole.state_dict())
    (_, expected), (_, found), (_, different) = next(whole), next(again), next(other)
    assert torch.equal(found.token_ids, expected.token_ids)  # type: ignore[attr-defined]
    assert not torch.equal(found.realized_logprob, different.realized_logprob)  # type: ignore[arg-type]


def test_a_single_row_cannot_be_shuffled(teacher):
    with pytest.raises(ValueError, match="single row"):
        next(shuffled(teacher, torch.tensor([[2, 3]])))

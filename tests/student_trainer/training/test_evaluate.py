"""What is measured on held-out text, against plain sums over all rows; and the shuffled control."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logit_codec import Targets, TopKTargets
from student_trainer import LocalTeacher, Recorded
from student_trainer.config import TrainConfig
from student_trainer.data.collate import Collator
from student_trainer.data.columns import Document
from student_trainer.data.packing import Counts, lay_out
from student_trainer.teachers.layout import Layout
from student_trainer.training.corpus import Corpus
from student_trainer.training.evaluate import (
    NUM_BINS,
    UNKNOWN,
    evaluate,
    evaluate_teacher,
)
from student_trainer.training.held_out import HeldOut
from student_trainer.training.shuffled_control import ShuffledTeacher
from tests.conftest import one_torch_thread
from tests.support import tiny

COLLATE = Collator()

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
def rows(sequences) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids} for ids in sequences]


@pytest.fixture(scope="module")
def dense(model, sequences) -> torch.Tensor:
    """(R, V) float64 logprobs of the teacher."""
    return torch.cat([tiny.dense_logits(model, ids).log_softmax(-1) for ids in sequences])


def held_out(rows: list[dict[str, torch.Tensor]]) -> Corpus:
    return Corpus(None, rows, rows, COLLATE, "", "")


def test_a_student_is_measured_as_plain_sums_over_the_rows_say(sequences, rows, dense):
    student = tiny.make_student()
    found = evaluate(student, rows, dense.argmax(-1), collate=COLLATE, batch_size=5)
    with torch.no_grad():
        logprobs = student(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    labels = sequences[:, 1:]
    nll = -logprobs.gather(2, labels[:, :, None])[:, :, 0]
    confidence, best = logprobs.exp().max(-1)
    assert found.loss == pytest.approx(float(nll.mean()), rel=1e-6)
    assert found.sequence_losses == pytest.approx(nll.mean(1).tolist(), rel=1e-5)
    assert found.accuracy == pytest.approx(float((best == labels).double().mean()))
    agrees = best.flatten() == dense.argmax(-1)
    assert found.top1_agreement == pytest.approx(float(agrees.double().mean()))
    assert found.agreement_rows == labels.numel()
    error = 0.0
    for number in range(NUM_BINS):
        inside = (confidence >= number / NUM_BINS) & (confidence < (number + 1) / NUM_BINS)
        if inside.any():
            gap = confidence[inside].mean() - (best == labels)[inside].float().mean()
            error += float(gap.abs() * inside.sum() / labels.numel())
    assert found.calibration_error == pytest.approx(error, rel=1e-4)
    assert sum(one.count for one in found.bins) == labels.numel()


@pytest.fixture(scope="module")
def texts() -> list[Document]:
    """Of unequal lengths; of every second one only the last tokens are trained."""
    found = []
    for number, ids in enumerate(tiny.random_sequences(11, 64, seed=5)):
        ids = ids[:30].numpy()
        labels = np.where(np.arange(len(ids)) < len(ids) // 2, -100, ids)
        found.append(Document(ids, labels if number % 2 else None))
    return found


@pytest.mark.parametrize("packing", ["pad", "isolate"])
def test_of_padded_packed_and_masked_rows_the_trained_ones_are_measured(
    model, teacher, texts, packing
):
    rows = list(lay_out(texts, 40, packing, Counts(), has_labels=True))
    nll, confidence, of_each = [], [], []
    for row in rows:
        for piece in Layout.of(COLLATE([row])).pieces():
            ids, wanted = piece.token_ids, piece.rows
            logprobs = tiny.dense_logits(model, ids).log_softmax(-1)[wanted]
            nll.append(-logprobs.gather(1, ids[wanted + 1][:, None])[:, 0])
            confidence.append(logprobs.exp().max(1).values)
        of_each.append(len(nll))
    starts = [0, *of_each]
    means = [float(torch.cat(nll[a:b]).mean()) for a, b in pairwise(starts)]
    found = evaluate(model, rows, collate=COLLATE, batch_size=3)
    scores, best_ids = evaluate_teacher(teacher, rows, collate=COLLATE)
    assert found.sequence_losses == pytest.approx(means, rel=1e-4)
    assert scores.sequence_losses == pytest.approx(means, rel=1e-3)
    assert len(best_ids) == len(torch.cat(nll)) == sum(one.count for one in found.bins)
    mean = sum(one.count * one.confidence for one in found.bins) / len(best_ids)
    assert mean == pytest.approx(float(torch.cat(confidence).mean()), rel=1e-4)
    again = evaluate(model, rows, best_ids, collate=COLLATE, batch_size=2)
    assert again.top1_agreement == 1.0


def test_ranks_measure_a_share_each_in_as_many_forward_passes(rows, dense):
    student = tiny.make_student()
    whole = evaluate(student, rows, dense.argmax(-1), collate=COLLATE, batch_size=2)
    passes = []
    student.register_forward_hook(lambda *_: passes.append(1))
    parts: list[list[torch.Tensor]] = []
    for rank in range(5):  # 12 rows: two ranks have none in their last pass
        passes.clear()
        parts.append([])

        def keep(values: torch.Tensor) -> torch.Tensor:
            parts[-1].append(values)
            return values

        share = {"rank": rank, "num_ranks": 5, "add_up": keep}
        evaluate(student, rows, collate=COLLATE, batch_size=2, **share)
        assert len(passes) == 2
    sums = iter([sum(each) for each in zip(*parts, strict=True)])
    found = evaluate(
        *(student, rows, dense.argmax(-1)),
        collate=COLLATE,
        rank=4,
        num_ranks=5,
        add_up=lambda _: next(sums),
    )
    assert found == whole


def test_without_a_teachers_ids_there_is_no_agreement(rows, dense):
    student, unknown = tiny.make_student(), torch.full((len(dense),), UNKNOWN)
    for best_ids in (None, unknown):
        assert evaluate(student, rows, best_ids, collate=COLLATE).top1_agreement is None
    some = unknown.clone()
    some[:3] = 5
    assert evaluate(student, rows, some, collate=COLLATE).agreement_rows == 3


def test_top_1_tells_all_of_a_teacher(teacher, sequences, rows, dense):
    scores, best_ids = evaluate_teacher(teacher, rows, collate=COLLATE)
    largest, best = dense.max(-1)
    labels = sequences[:, 1:].flatten()
    assert torch.equal(best_ids, best)
    loss = -dense.gather(1, labels[:, None]).mean()
    assert scores.loss == pytest.approx(float(loss), rel=1e-3)  # float16 per row
    assert scores.accuracy == pytest.approx(float((best == labels).double().mean()))
    mean = sum(one.count * one.confidence for one in scores.bins) / labels.numel()
    assert mean == pytest.approx(float(largest.exp().mean()), rel=1e-5)


@pytest.mark.parametrize("targets", ["dense:f32", "top_k:16"])
def test_other_kinds_tell_the_likeliest_id_too(teacher, rows, dense, targets: str):
    _, best_ids = evaluate_teacher(teacher, rows, collate=COLLATE, targets=targets)
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


def test_samples_do_not_tell_the_likeliest_id_nor_a_temperature_the_loss(teacher, rows):
    scores, best_ids = evaluate_teacher(teacher, rows, collate=COLLATE, targets="sampled:16")
    assert (best_ids == UNKNOWN).all()
    assert scores.loss is not None
    assert scores.accuracy is scores.calibration_error is None
    scores, best_ids = evaluate_teacher(
        teacher, rows, collate=COLLATE, targets="top_k:4", temperature=2.0
    )
    assert (best_ids != UNKNOWN).any()
    assert scores.loss is scores.calibration_error is None
    assert scores.accuracy is not None


def test_a_record_of_samples_says_what_it_cannot_tell_and_a_live_teacher_is_asked(
    teacher, sequences, rows, tmp_path: Path
):
    config = TrainConfig(
        student=tmp_path,
        data=["x"],
        output=tmp_path,
        record=str(tmp_path / "record"),
        targets="sampled:16",
    )
    with Recorded(tmp_path / "record", teacher) as record:
        found = HeldOut.ask(config, record, held_out(rows))
        assert found.unknown == ""
        assert found.teacher.accuracy is not None
    with Recorded(tmp_path / "record") as record:
        found = HeldOut.ask(config, record, held_out(rows))
        assert "sampled:16" in found.unknown
        assert "--teacher" in found.unknown
        assert found.teacher.loss is not None
        assert found.measure(tiny.make_student(), 4).top1_agreement is None
        others = [{"input_ids": ids} for ids in sequences + 1 - sequences % 2]
        other = HeldOut.ask(config, record, held_out(others))
        assert "was not recorded" in other.unknown
        assert other.teacher.loss is None


# The shuffled control.


def shuffled(teacher: LocalTeacher, sequences: torch.Tensor, seed: int = 0) -> list[Any]:
    loader = [{"input_ids": some} for some in sequences.split(4)]
    wrong = ShuffledTeacher(teacher, seed=seed)
    return list(wrong.stream_batches(loader, targets="top_k:8"))


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
    whole, rest = shuffled(teacher, sequences), shuffled(teacher, sequences[4:])
    (_, expected), (_, found) = whole[1], rest[0]
    assert torch.equal(found.token_ids, expected.token_ids)
    _, different = shuffled(teacher, sequences, seed=1)[1]
    assert not torch.equal(found.realized_logprob, different.realized_logprob)


def test_a_single_row_cannot_be_shuffled(teacher):
    with pytest.raises(ValueError, match="single row"):
        shuffled(teacher, torch.tensor([[2, 3]]))

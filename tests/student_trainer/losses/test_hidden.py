"""Losses on a teacher's hidden states and its head, against those on its full distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor

from logit_codec import HiddenTargets, TeacherHead, select
from student_trainer import LocalTeacher, distillation_loss, fused_distillation_loss
from student_trainer.losses import fused_pass
from student_trainer.losses.divergences import DIVERGENCES
from student_trainer.losses.fused_chunk import RowStatistics
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.divergences import gradients, make_hidden, relative_error
from tests.support.live_memory import LiveMemory

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

VOCAB, PADDED, DIM = 61, 64, 6
TIED = {"Gemma2": True, "Llama": False, "Cohere": True, "Granite": True, "GPT2": True}
"""Architectures with a softcap, none, a scale, another scale, and a tied head without either."""


def make_teacher(name: str) -> LocalTeacher:
    model = tiny.make_model(name, PADDED, tie_word_embeddings=TIED[name])
    return LocalTeacher(model, tiny.make_tokenizer([f"w{n}" for n in range(VOCAB - 2)]))


@pytest.fixture(scope="module", params=TIED)
def teacher(request: pytest.FixtureRequest) -> LocalTeacher:
    return make_teacher(request.param)


def ask(teacher: LocalTeacher, targets: str, temperature: float = 1.0) -> Any:
    ids = torch.arange(40) * 7 % VOCAB
    ((_, found),) = teacher.stream([ids], targets=targets, temperature=temperature)
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hidden_targets_give_the_loss_and_the_gradients_of_dense_ones(teacher, temperature):
    """bf16 within its rounding, int8 within 1 %."""
    dense = ask(teacher, "dense:f32", temperature)
    torch.manual_seed(1)
    hidden = torch.randn(dense.num_rows, DIM, requires_grad=True)
    head = torch.randn(PADDED - 2, DIM, requires_grad=True)
    options: dict[str, Any] = {"effective_vocab_size": VOCAB, "chunk_rows": 9}
    for divergence in DIVERGENCES:
        options["divergence"] = divergence
        wanted = fused_distillation_loss(hidden, head, dense, **options)
        exact = gradients(wanted, hidden, head)
        for kind, tolerance in (("hidden:bf16", 0.008), ("hidden:int8", 0.01)):
            targets = ask(teacher, kind, temperature)
            loss = fused_distillation_loss(hidden, head, targets, **options)
            assert relative_error(loss, wanted) < tolerance
            errors = [
                relative_error(*pair)
                for pair in zip(gradients(loss, hidden, head), exact, strict=True)
            ]
            # The gradient of total variation jumps where q = p.
            largest = 0.05 if divergence == "total_variation" else tolerance
            assert max(errors) < largest, (kind, divergence, errors)


def test_the_heads_of_teacher_and_student_may_differ_in_padding(teacher):
    """The student lacks three ids that no text has: what is left sums to 1, in both losses."""
    targets = ask(teacher, "hidden:bf16")
    student = torch.randn(targets.num_rows, VOCAB, dtype=torch.float64, requires_grad=True)
    p = targets.to_dense().double()
    assert not p[:, VOCAB:].any()
    wanted = (torch.special.xlogy(p, p)[:, :VOCAB] - p[:, :VOCAB] * student.log_softmax(1)).sum(1)
    eye = torch.eye(VOCAB, dtype=torch.float64)
    for loss in (
        distillation_loss(student, targets, reduction="none"),
        fused_distillation_loss(student, eye, targets, reduction="none"),
    ):
        assert relative_error(loss, wanted) < 1e-5
        assert loss.shape == (targets.num_rows,)


def test_ids_that_the_student_lacks_are_dropped_or_refused_by_their_probability():
    for lost, likely in ((-30.0, False), (5.0, True)):
        targets = make_hidden(70, VOCAB, 16, 1.0)
        assert targets.head is not None
        bias = torch.zeros(VOCAB)
        bias[-3:] = lost
        head = TeacherHead(
            weight=targets.head.weight,
            bias=bias,
            effective_vocab_size=VOCAB,
            fingerprint=targets.head_fingerprint,
        )
        student = torch.randn(70, VOCAB - 3)
        if likely:
            with pytest.raises(ValueError, match=r"to ids from 58 on"):
                distillation_loss(student, targets, teacher_head=head)
            continue
        p = targets.with_head(head).to_dense()[:, :-3].double()
        wanted = (p * (p.log() - student.double().log_softmax(1))).sum(1).mean()
        loss = distillation_loss(student, targets, teacher_head=head)
        assert relative_error(loss, wanted) < 1e-5


def test_autocast_leaves_the_teachers_product_alone(teacher):
    targets = ask(teacher, "hidden:bf16")
    student = torch.randn(targets.num_rows, PADDED)
    wanted = distillation_loss(student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distillation_loss(student, targets), wanted)


def test_statistics_have_the_teachers_likeliest_id():
    targets = make_hidden(30, VOCAB, 8, 1.0)
    statistics = RowStatistics.zeros(30)
    hidden, head = torch.randn(30, DIM), torch.randn(VOCAB, DIM)
    fused_distillation_loss(hidden, head, targets, statistics=statistics, chunk_rows=7)
    assert torch.equal(statistics.teacher_best, targets.most_likely())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd", "softcap": 9.0, "ce_weight": 0.5}])
def test_memory_does_not_grow_with_the_rows_and_keeps_to_its_limit(monkeypatch, options, dtype):
    """Neither the student's nor the teacher's logits are ever there for all rows."""
    vocab, limit, peaks = 5000, 2 << 20, []
    monkeypatch.setitem(fused_pass.CHUNK_BYTES, "cpu", limit)
    head = torch.randn(vocab, DIM, requires_grad=True)
    teacher_head = TeacherHead(
        weight=torch.randn(vocab, 8).to(dtype), effective_vocab_size=vocab, fingerprint="ab" * 16
    )
    for rows in (100, 800):
        hidden = torch.randn(rows, DIM, requires_grad=True)
        targets = HiddenTargets(
            vocab_size=vocab,
            temperature=1.0,
            values=torch.randint(-127, 128, (rows, 8), dtype=torch.int8),
            scale=torch.rand(rows) / 64,
            head_fingerprint=teacher_head.fingerprint,
        )
        labels = torch.randint(vocab, (rows,))
        known = hidden, head, labels, teacher_head.weight, *targets._tensors().values()
        with LiveMemory(*known) as memory:
            fused_distillation_loss(
                hidden, head, targets, teacher_head=teacher_head, labels=labels, **options
            )
        peaks.append(memory.peak - head.nbytes)  # whose gradient is there too
    assert peaks[1] - peaks[0] < 700 * 4 * 32  # less than 32 numbers a row; logits have 5000
    assert max(peaks) < 1.25 * limit


def test_dense_of_the_same_states_is_the_same_loss_at_any_temperature():
    for temperature in (0.5, 3.0):
        targets = make_hidden(20, VOCAB, 8, temperature)
        logits: Tensor = targets.logits(slice(None))
        dense = select(logits, "dense:f32,realized=0", temperature=temperature)
        student = torch.randn(20, VOCAB, dtype=torch.float64)
        for divergence in DIVERGENCES:
            one, other = (
                distillation_loss(student, some, divergence=divergence) for some in (targets, dense)
            )
            assert relative_error(one, other) < 1e-5

"""What the loss of a Trainer's step is made of: weights over the steps, and labels in some rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from logit_codec import DenseTargets, select
from student_trainer import LocalTeacher, distillation_loss
from student_trainer.hf.arguments import DistillationArguments, check_arguments
from student_trainer.hf.batch_loss import BatchWeights
from student_trainer.schedules import LinearSchedule
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.divergences import relative_error
from tests.support.hf import make_trainer

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

ROWS, VOCAB = 20, 31


def make_dense() -> tuple[DenseTargets, torch.Tensor]:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    targets = select(logits, "dense:f32,entropy=1", realized_ids=labels)
    assert isinstance(targets, DenseTargets)
    return targets, labels


def test_weights_and_beta_go_from_one_number_to_the_other():
    targets, _ = make_dense()
    arguments = DistillationArguments(
        targets="top_k:4", divergence="jsd", beta="0.2->0.8", kd_weight="1->0.5", ce_weight=0.25
    )
    check_arguments(arguments)
    for progress, kd, beta in ((0.0, 1.0, 0.2), (0.5, 0.75, 0.5), (1.0, 0.5, 0.8)):
        weights = BatchWeights.of(arguments, targets, progress)
        assert (weights.kd, weights.ce) == (kd, 0.25)
        assert weights.beta == {"beta": pytest.approx(beta)}
    assert LinearSchedule.parse("0.30").setting == 0.3
    assert LinearSchedule.parse("0.50->0.1").setting == "0.5->0.1"


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, (1.0, 0.0)),
        ({"targets": "top_k:8"}, (0.7, 0.3)),
        ({"targets": "top_k:min_p=1/256"}, (0.7, 0.3)),
        ({"targets": "top_k:8", "ce_weight": 0.0}, (1.0, 0.0)),
        ({"targets": "top_k:8", "ce_weight": 0.1}, (1.0, 0.1)),
        ({"targets": "top_k:8", "kd_weight": 0.5}, (0.5, 0.0)),
        ({"targets": "dense:f32"}, (1.0, 0.0)),
        ({"targets": "hidden:int8"}, (1.0, 0.0)),
    ],
)
def test_labels_have_a_weight_by_default_where_the_tail_is_cut(given, weights):
    arguments = DistillationArguments(**given)
    check_arguments(arguments)
    assert tuple(weight.first for weight in arguments.weights) == weights


def test_the_surest_rows_learn_from_the_label_and_no_others():
    targets, labels = make_dense()
    arguments = DistillationArguments(
        targets="dense:f32,entropy=1", kd_weight=2.0, ce_weight=0.5, entropy_routing=0.25
    )
    check_arguments(arguments)
    weights = BatchWeights.of(arguments, targets, 0.0)
    assert targets.entropy is not None
    surest = targets.entropy.argsort()[:5]
    is_surest = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, surest, True)
    assert torch.equal(torch.as_tensor(weights.kd), torch.where(is_surest, 0.0, 2.0))
    assert torch.equal(torch.as_tensor(weights.ce), torch.where(is_surest, 2.5, 0.5))
    student = torch.randn(ROWS, VOCAB, requires_grad=True)
    options: dict[str, Any] = {"labels": labels, "kd_weight": weights.kd, "ce_weight": weights.ce}
    loss = distillation_loss(student, targets, reduction="none", **options)
    wanted = 2.5 * torch.nn.functional.cross_entropy(student, labels, reduction="none")
    assert torch.allclose(loss[surest], wanted[surest])


def test_adaptive_labels_are_the_gradient_of_the_blended_target():
    """(1 - rho) p + rho onehot(label), with rho = 0.8 (1 - p(label))."""
    targets, labels = make_dense()
    arguments = DistillationArguments(targets="dense:f32", adaptive_label_weight=0.8)
    check_arguments(arguments)
    weights = BatchWeights.of(arguments, targets, 0.0)
    student = torch.randn(ROWS, VOCAB, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"labels": labels, "kd_weight": weights.kd, "ce_weight": weights.ce}
    (found,) = torch.autograd.grad(distillation_loss(student, targets, **options), student)
    p = targets.logprobs.double().exp()
    rho = 0.8 * (1 - p[torch.arange(ROWS), labels])[:, None]
    blended = (1 - rho) * p + rho * torch.nn.functional.one_hot(labels, VOCAB)
    assert relative_error(found, (student.softmax(1) - blended) / ROWS) < 1e-5
    assert relative_error(found, (student.softmax(1) - p) / ROWS) > 0.1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"entropy_routing": 0.15}, "entropy_routing .*targets='sampled:64,entropy=1'"),
        ({"entropy_routing": 1.0, "targets": "top_k:4,entropy=1"}, "below 1, got 1.0"),
        (
            {"adaptive_label_weight": 0.5, "targets": "sampled:8,realized=0"},
            "adaptive_label_weight .*targets='sampled:8'",
        ),
        ({"adaptive_label_weight": 1.5}, "0 to 1, got 1.5"),
        ({"ce_weight": "0.5->"}, r"ce_weight must be a number, or two such as 0.5->0.1"),
        ({"ce_weight": "0.5->-0.1"}, "ce_weight must be at least 0"),
        ({"beta": "0.5->1", "divergence": "jsd", "targets": "top_k:4"}, "beta must be between"),
        ({"targets": "given_ids"}, "names no ids"),
        ({"targets": "realized"}, "realized_logprob"),
        ({"targets": "features:layers=1"}, "losses.features"),
    ],
)
def test_what_makes_no_loss_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        check_arguments(DistillationArguments(**given))


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.make_model("Gemma2", 64))


@pytest.mark.parametrize(
    ("targets", "divergence"),
    [
        ("top_k:8,entropy=1", "jsd"),
        ("hidden:int8,entropy=1", "jsd"),
        ("sampled:16,entropy=1", "forward_kl"),
    ],
)
def test_a_trainers_steps_have_these_weights_in_the_head_and_on_logits(
    tmp_path: Path, teacher, targets, divergence
):
    """A learning rate of 0: only the schedules tell the steps apart."""
    torch.manual_seed(0)
    ids = torch.randint(2, 64, (6, 9))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    arguments: dict[str, Any] = {"targets": targets, "divergence": divergence}
    arguments["check_first_batch"] = False  # the teacher has learnt nothing
    arguments |= {"entropy_routing": 0.25, "adaptive_label_weight": 0.5, "ce_weight": "0.5->0.1"}
    arguments |= {"beta": "0.2->0.6"} if divergence == "jsd" else {}
    losses, agreements = [], []
    for fused in (True, False):
        trainer = make_trainer(
            tmp_path,
            rows,
            teacher,
            distillation=DistillationArguments(**arguments, fused=fused, temperature=1.5),
            per_device_train_batch_size=6,
            learning_rate=0.0,
            max_steps=3,
        )
        trainer.train()
        assert (trainer._batch_loss.head is not None) == fused
        logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
        losses.append([entry["loss"] for entry in logs])
        agreements.append([entry["top1_agreement"] for entry in logs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert agreements[0] == pytest.approx(agreements[1])
    if "sampled" in targets:
        return  # whose draws depend on the epoch
    found = [one for _, one in teacher.stream(list(ids), targets=targets, temperature=1.5)]
    logits = torch.cat([tiny.make_student()(row[None]).logits[0, :-1] for row in ids]).detach()
    whole = type(found[0]).cat(found)
    labels = ids[:, 1:].flatten()
    p_label, routed = whole.realized_logprob.exp(), int(0.25 * len(whole))
    share = 0.5 * (1 - p_label)
    share[whole.entropy.argsort()[:routed]] = 1.0
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    for loss, ce_weight, beta in zip(losses[0], (0.5, 0.3, 0.1), (0.2, 0.4, 0.6), strict=True):
        kd = distillation_loss(logits, whole, divergence="jsd", beta=beta, reduction="none")
        wanted = ((1 - share) * kd + (ce_weight + share) * ce).mean()
        assert loss == pytest.approx(float(wanted), rel=1e-3)

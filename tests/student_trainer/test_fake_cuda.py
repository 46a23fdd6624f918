"""The trainer's step on a CUDA device without a GPU: nothing mixes devices, and nothing waits."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from logit_codec import HiddenTargets, Targets, parse_targets, select
from student_trainer import distillation_loss, fused_distillation_loss
from student_trainer.losses.divergences import DIVERGENCES
from student_trainer.losses.fused_chunk import RowStatistics
from student_trainer.teachers.prefetch import Prefetch
from student_trainer.transfer import CopyStream, copy_to, most_entries, move_to_device
from tests.support.divergences import make_hidden
from tests.support.fake_cuda import DEVICE, FakeCuda, backward
from tests.support.waits import Waits

ROWS, VOCAB, DIM = 13, 31, 8
SPECS = (
    *("sampled:16", "top_k:4", "top_k:min_p=1/16,max_k=8", "dense:f32", "dense:bf16"),
    *("given_ids:bits=32", "hidden:int8"),
)
ALLOWED = [
    (spec, divergence)
    for spec, divergence in itertools.product(SPECS, DIVERGENCES)
    if divergence == "forward_kl" or "sampled" not in spec
]


def make_targets(spec: str, *, temperature: float = 1.0) -> Targets:
    torch.manual_seed(0)
    if spec.startswith("hidden"):
        return make_hidden(ROWS, VOCAB, parse_targets(spec).bits, temperature)
    uniforms = torch.rand(ROWS, dtype=torch.float64)
    logits = torch.randn(ROWS, VOCAB) * 3
    return select(
        logits,
        parse_targets(f"{spec},realized=0,entropy=1"),
        temperature=temperature,
        uniforms=uniforms,
        given_ids=torch.randint(VOCAB, (ROWS, 3)) if "given_ids" in spec else None,
    )


def bring_head(host: Targets) -> None:
    """Copies the teacher's head, which a training waits for once."""
    if isinstance(host, HiddenTargets) and host.head is not None:
        host.head.to(DEVICE)


class Order(CopyStream):
    """Remembers what a stream of copies was asked for, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.joined: list[Tensor] = []

    @contextmanager
    def issue(self) -> Iterator[None]:
        self.events.append("begin")
        yield
        self.events.append("end")

    def mark(self) -> int:
        self.events.append("mark")
        return len(self.events)

    def join(self, mark: int, tensors: Sequence[Tensor]) -> None:
        assert self.events[mark - 1] == "mark"
        # Their device is looked at later: a fake tensor says "meta" while another thread of the same
        # FakeTensorMode is inside an operation.
        self.joined += tensors
        self.events.append(f"join {len(tensors)}")


def on_cuda(cuda: FakeCuda, items: Sequence[Any]) -> Iterator[Any]:
    """The items, in the thread that iterates over them."""
    with cuda:
        yield from items


def prefetch_one(cuda: FakeCuda, item: Any) -> Any:
    """What `prefetch` hands out for an item."""
    return next(Prefetch(on_cuda(cuda, [item]), 1, DEVICE, lambda device: Order()))


def test_prefetch_copies_from_pinned_memory_on_its_own_stream():
    targets = make_targets("top_k:4")
    order = Order()
    cuda, waits = FakeCuda(), Waits()

    def items() -> Iterator[Any]:
        with cuda, waits:
            for _ in range(3):
                yield {"input_ids": torch.arange(4)}, targets

    found = list(Prefetch(items(), 1, DEVICE, lambda device: order))
    assert waits.found == []
    assert all(tensor.device == DEVICE for tensor in order.joined)
    for batch, moved in found:
        assert batch["input_ids"].device == DEVICE
        assert all(tensor.device == DEVICE for tensor in moved._tensors().values())
    num_tensors = 1 + len(targets._tensors())
    # The mark is made where the copies are, and so follows them; the student's work waits for it.
    joins = [event for event in order.events if event.startswith("join")]
    assert joins == [f"join {num_tensors}"] * 3
    copies = [event for event in order.events if not event.startswith("join")]
    assert copies == ["begin", "mark", "end"] * 3
    assert order.events.index(joins[0]) > order.events.index("end")


MASK = torch.arange(ROWS) % 3 != 1
LABELS = torch.arange(ROWS).where(torch.arange(ROWS) != 3, -100)
MIXED: dict[str, Any] = {"labels": LABELS, "ce_weight": 0.5, "mask": MASK}
OPTIONS: tuple[dict[str, Any], ...] = (
    MIXED,
    {},
    {"labels": LABELS, "ce_weight": 0.5, "num_items": torch.tensor(7)},
    {"labels": LABELS, "ce_weight": 1.0, "kd_weight": 0.0, "reduction": "sum"},
    {"mask": MASK, "reduction": "none"},
    {"renormalize": True},
)


def cases(spec: str, divergence: str) -> Iterator[tuple[dict[str, Any], float, torch.dtype]]:
    """Options, temperature and dtype: of one divergence all, of the others two."""
    for number, options in enumerate(OPTIONS if divergence == "forward_kl" else OPTIONS[:1]):
        if "renormalize" not in options or "top_k" in spec:
            yield options, (2.0, 1.0)[number % 2], (torch.bfloat16, torch.float32)[number // 2 % 2]
            yield options, (1.0, 2.0)[number % 2], (torch.float32, torch.bfloat16)[number // 2 % 2]


@pytest.mark.parametrize(("spec", "divergence"), ALLOWED)
def test_a_step_with_the_fused_loss_waits_for_nothing(spec, divergence):
    """Prefetch, loss, backward."""
    cuda = FakeCuda()
    for options, temperature, dtype in cases(spec, divergence):
        host = make_targets(spec, temperature=temperature)
        with cuda:
            bring_head(host)
        with cuda, Waits() as waits:
            targets, moved = prefetch_one(cuda, (host, options))
            # The mask says how many rows there are, which must be known before they are computed.
            moved |= {name: options[name] for name in ("mask", "num_items") if name in options}
            hidden = torch.randn(ROWS, DIM, dtype=dtype, device=DEVICE, requires_grad=True)
            head = torch.randn(VOCAB, DIM, dtype=dtype, device=DEVICE, requires_grad=True)
            bias = torch.randn(VOCAB, dtype=dtype, device=DEVICE, requires_grad=True)
            loss = fused_distillation_loss(
                hidden,
                head,
                targets,
                head_bias=bias,
                softcap=3.0 if temperature == 1.0 else None,
                divergence=divergence,
                statistics=RowStatistics.zeros(ROWS, DEVICE),
                **moved,
            )
            assert loss.device == DEVICE
            backward(loss.sum())
        assert waits.found == []
        for leaf in (hidden, head, bias):
            assert leaf.grad is not None
            assert (leaf.grad.device, leaf.grad.dtype) == (DEVICE, dtype)


@pytest.mark.parametrize(("spec", "divergence"), ALLOWED)
def test_a_step_with_the_plain_loss_waits_for_nothing(spec, divergence):
    cuda = FakeCuda()
    for options, temperature, dtype in cases(spec, divergence):
        host = make_targets(spec, temperature=temperature)
        with cuda:
            bring_head(host)
        with cuda, Waits() as waits:
            targets, moved = prefetch_one(cuda, (host, options))
            logits = torch.randn(ROWS, VOCAB, dtype=dtype, device=DEVICE, requires_grad=True)
            loss = distillation_loss(logits, targets, divergence=divergence, **moved)
            assert loss.device == DEVICE
            backward(loss.sum())
        assert waits.found == []
        assert logits.grad is not None
        assert (logits.grad.device, logits.grad.dtype) == (DEVICE, dtype)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "hidden" not in spec])
def test_a_loss_of_host_tensors_waits_for_nothing_whatever_the_student_shares(spec):
    """Everything is on the host but the student, which has fewer ids than the teacher."""
    targets = with_little_of_the_last_id(spec)
    with FakeCuda(), Waits() as waits:
        hidden = torch.randn(ROWS, DIM, device=DEVICE, requires_grad=True)
        head = torch.randn(VOCAB - 1, DIM, device=DEVICE, requires_grad=True)
        backward(fused_distillation_loss(hidden, head, targets, chunk_rows=7, **MIXED))
        backward(distillation_loss(hidden @ head.T, targets, **MIXED))
    assert waits.found == []


def with_little_of_the_last_id(spec: str) -> Targets:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB)
    logits[:, -1] = -12.0
    uniforms = torch.rand(ROWS, dtype=torch.float64)
    given = torch.randint(VOCAB, (ROWS, 3)) if "given_ids" in spec else None
    return select(logits, f"{spec},realized=0", uniforms=uniforms, given_ids=given)


def test_the_most_entries_of_a_row_are_counted_before_the_move():
    targets = make_targets("top_k:min_p=1/16,max_k=8")
    count = most_entries(targets)
    assert 1 < count <= 8
    moved = move_to_device(targets, torch.device("meta"))  # as without values as a GPU's
    assert most_entries(moved) == count
    other = replace(moved, row_splits=moved.row_splits.clone())
    with pytest.raises(RuntimeError):  # nothing is known of rows that were made there
        most_entries(other)


def test_rows_of_a_batch_are_chosen_on_the_device():
    """As DistillationTrainer does: hidden states of all tokens, of which some rows are trained."""
    rows, cuda = torch.tensor([0, 2, 3, 7]), FakeCuda()
    host = make_targets("top_k:4")[: len(rows)]
    with cuda, Waits() as waits:
        targets, rows_R = move_to_device((host, rows), DEVICE)
        hidden = torch.randn(2, 5, DIM, device=DEVICE, requires_grad=True)
        head = torch.randn(VOCAB, DIM, device=DEVICE, requires_grad=True)
        loss = fused_distillation_loss(hidden.flatten(0, 1)[rows_R], head, targets)
        backward(loss)
    assert waits.found == []


def test_what_cannot_be_known_in_time_waits_once_and_says_where():
    host, mask = make_targets("top_k:4"), torch.ones(ROWS, dtype=torch.bool)
    cuda = FakeCuda()
    with cuda:
        hidden = torch.randn(ROWS, DIM, device=DEVICE)
        head = torch.randn(VOCAB, DIM, device=DEVICE)
        targets = host.to(DEVICE)
        mask = copy_to(mask, DEVICE)
    with cuda, Waits() as waits:
        with pytest.raises(DataDependentOutputException):
            fused_distillation_loss(hidden, head, targets)
        with pytest.raises(Exception, match="nonzero"):
            fused_distillation_loss(hidden, head, targets, mask=mask, max_entries=4)
    entries, rows = waits.found
    assert entries.where.endswith(" most_entries")
    assert rows.operation == "aten::nonzero"

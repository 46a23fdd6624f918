"""The helpers that stand in for a GPU: what raises, what counts as a wait, and gradients."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)

from tests.support.fake_cuda import DEVICE, FakeCuda, backward
from tests.support.waits import Waits


def test_host_tensors_stay_real_and_device_tensors_have_no_values():
    with FakeCuda():
        host = torch.arange(3) + 1
        device = host.to(DEVICE)
        assert host.tolist() == [1, 2, 3]
        assert device.is_cuda
        assert (device * 2).shape == (3,)
        assert torch.tensor([1.0], device="cuda").device == DEVICE
        with pytest.raises(DataDependentOutputException):
            device.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            device[device > 1].sum()
        with pytest.raises(FakeTensorDeviceMismatchError):
            (host + device).sum()
        with pytest.raises(DataDependentOutputException):
            device.to("cpu").tolist()


def test_gradients_go_to_leaves_of_the_device():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, *gradients):
            return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]

    with FakeCuda():
        x = torch.ones(3, 2, device=DEVICE, requires_grad=True)
        y = torch.ones(2, device=DEVICE, requires_grad=True)
        backward((Cube.apply(x) * y + x @ y[:, None]).sum())
        assert x.grad is not None
        assert x.grad.device == DEVICE
        assert y.grad is not None
        assert y.grad.shape == (2,)


def test_backward_computes_what_torchs_engine_does():
    x = torch.randn(3, 2, requires_grad=True)
    y = torch.randn(2, requires_grad=True)

    def loss():
        return ((x * y).exp() * x + x.sum(0)).tanh().sum() * y.sum()

    wanted = torch.autograd.grad(loss(), (x, y))
    backward(loss())
    torch.testing.assert_close((x.grad, y.grad), wanted)


def count(do) -> list[str]:
    raised = (DataDependentOutputException, DynamicOutputShapeException)
    with FakeCuda(), Waits() as waits, contextlib.suppress(*raised):
        do()
    return [wait.operation.removeprefix("aten::") for wait in waits.found]


def on_device() -> torch.Tensor:
    return torch.zeros(4, device=DEVICE)


@pytest.mark.parametrize(
    ("do", "waits"),
    [
        (lambda: float(on_device().sum()), ["_local_scalar_dense"]),
        (lambda: bool((on_device() > 0).any()), ["_local_scalar_dense"]),
        (lambda: on_device().nonzero(), ["nonzero"]),
        (lambda: on_device().unique(), ["_unique2"]),
        (lambda: torch.equal(on_device(), on_device()), ["equal"]),
        (lambda: on_device()[on_device() > 0], ["index with a mask"]),
        (lambda: on_device()[torch.arange(2)], ["index with indices on the host"]),
        (lambda: on_device()[torch.arange(2, device=DEVICE)], []),
        (lambda: on_device().masked_fill(on_device() > 0, 1.0).where(on_device() > 0, 0.0), []),
        (lambda: on_device() * torch.tensor(2.0), []),
        (
            lambda: torch.arange(4, device=DEVICE).repeat_interleave(
                torch.ones(4, dtype=torch.int64, device=DEVICE)
            ),
            ["repeat_interleave"],
        ),
        (
            lambda: torch.arange(4, device=DEVICE).repeat_interleave(
                torch.ones(4, dtype=torch.int64, device=DEVICE), output_size=4
            ),
            [],
        ),
        (
            lambda: torch.zeros(4).to(DEVICE),
            ["_to_copy to the device from pageable memory, blocking"],
        ),
        (
            lambda: torch.zeros(4).to(DEVICE, non_blocking=True),
            ["_to_copy to the device from pageable memory"],
        ),
        (
            lambda: torch.zeros(4).pin_memory().to(DEVICE),
            ["_to_copy to the device from pinned memory, blocking"],
        ),
        (lambda: torch.zeros(4).pin_memory()[1:].to(DEVICE, non_blocking=True), []),
        (lambda: on_device().copy_(torch.empty(4, pin_memory=True), non_blocking=True), []),
        (
            lambda: torch.tensor([1], device=DEVICE),
            ["_to_copy to the device from pageable memory, blocking"],
        ),
        (lambda: torch.full((2,), 3, device=DEVICE), []),
        (lambda: on_device().cpu(), ["_to_copy from the device, blocking"]),
        (lambda: on_device().to("cpu", non_blocking=True), []),
        (
            lambda: torch.empty(4).copy_(on_device(), non_blocking=True),
            ["copy_ from the device to pageable memory"],
        ),
        (lambda: torch.empty(4, pin_memory=True).copy_(on_device(), non_blocking=True), []),
        (lambda: torch.arange(4).nonzero().sum().item(), []),
    ],
)
def test_a_wait_is_found(do, waits):
    assert count(do) == waits
    with torch.inference_mode():
        assert count(do) == waits


def test_a_wait_names_the_line_that_led_to_it():
    from logit_codec import parse_targets, select
    from student_trainer.transfer import most_entries

    targets = select(torch.randn(2, 9), parse_targets("top_k:2,realized=0"))
    with FakeCuda(), Waits() as waits, pytest.raises(DataDependentOutputException):
        most_entries(targets.to(DEVICE))
    assert waits.found[-1].where.startswith("student_trainer/transfer.py:")
    assert waits.found[-1].where.endswith(" most_entries")


def test_a_cpu_can_stand_in_for_the_device():
    with Waits("cpu") as waits:
        torch.arange(4)[torch.arange(4) > 1].sum().item()
    assert [wait.operation for wait in waits.found][-1] == "aten::_local_scalar_dense"
    assert "aten::index with a mask" in [wait.operation for wait in waits.found]

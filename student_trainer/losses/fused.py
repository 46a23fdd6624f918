"""Computes the distillation loss from hidden states and the head's weight: no (R, V) logits exist.

Letters: R rows, C rows of one chunk, D hidden size, V vocabulary, K kept entries per row at most.
p is the teacher, q the student; distillation.py says what a cell is.

Rows are taken a chunk at a time: logits of the chunk into a buffer, statistics and the K kept
entries of each row out of it, the gradient of the logits into the same buffer, and from there into
the gradients of hidden states, head and bias. Thus forward does all the work and backward only
scales. The buffers are reused from chunk to chunk: fresh ones would be faulted in page by page,
which takes longer than the arithmetic.

The host never waits for a GPU, with three exceptions, for which it must know something of a tensor
there: a mask, targets with ids that the student lacks, and targets that `prefetch` did not bring
there, unless max_entries is given. The same tensors on the host cost no waiting.

With a = q * dD/dq of each cell, the gradient of a cell's logit is (a - q * sum(a)) / T; a tail
bucket's is shared out among its ids in proportion to q.
"""

from typing import Any

import torch
from torch import Tensor, nn

from logit_codec import Targets, TeacherHead
from logit_codec.kinds import cells_of
from student_trainer.losses.checks import check_labels, shared_vocabulary
from student_trainer.losses.distillation import fit, prepare
from student_trainer.losses.fused_chunk import Problem, RowStatistics
from student_trainer.losses.fused_pass import FusedPass
from student_trainer.losses.options import LossOptions
from student_trainer.transfer import copy_to, most_entries


def fused_distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Targets,
    *,
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    row_weights: Tensor | None = None,
    mask: Tensor | None = None,
    temperature_scaling: bool = True,
    renormalize: bool = False,
    correction: bool = False,
    teacher_head: TeacherHead | None = None,
    effective_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    chunk_rows: int | None = None,
    statistics: RowStatistics | None = None,
    max_entries: int | None = None,
) -> Tensor:
    """Computes distillation_loss of the logits of hidden states, without making all logits at once.

    logits = softcap * tanh(logit_scale * (hidden @ head_weight.T + head_bias) / softcap)

    hidden: (R, D), the student's last hidden states for exactly the target rows, after its final
    norm. head_weight: (V, D); it may be frozen, or be the input embeddings too. head_bias: (V,).
    Inputs of 16 bits are multiplied as such; everything else is computed in float32, and their
    gradients are added up in it. The other arguments are those of distillation_loss; masked rows
    cost nothing, and neither the student's nor the teacher's logits exist for more than a chunk of
    rows. chunk_rows: of these; by default as many as make buffers of 96 MiB in all on a CPU, 512 MiB
    elsewhere. statistics: RowStatistics.zeros(R) on the device of hidden, to be filled in, labels
    included. max_entries: of the row of the targets that has most; without it they are counted.

    head_weight and head_bias may be DTensors, as FSDP2's fully_shard leaves them: they are
    gathered, and their gradients averaged over the ranks of their mesh and sharded again, as FSDP2
    does. Every rank of the mesh must then make this call, with rows of its own.

    Extra memory is the head's gradient, which is float32 at least, and these buffers. There are no
    second derivatives. backward repeats the forward pass only for reduction="none" and if it is
    called twice on a retained graph. Raises what distillation_loss raises.
    """
    _check_shapes(hidden, head_weight, head_bias, targets, softcap, chunk_rows)
    options = LossOptions(
        divergence=divergence,
        beta=beta,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        row_weights=row_weights,
        temperature_scaling=temperature_scaling,
        renormalize=renormalize,
        correction=correction,
        reduction=reduction,
    )
    options.check(targets, labels, mask)
    width = shared_vocabulary(targets, len(head_weight), effective_vocab_size)
    labels = labels if options.uses_labels or statistics is not None else None
    check_labels(labels, mask, width)
    given = {"labels": labels, "mask": mask, "num_items": num_items}
    _refuse_gradients(targets, options, softcap=softcap, logit_scale=logit_scale, **given)
    hidden, head_weight, head_bias = _cast_alike(hidden, head_weight, head_bias)
    problem = _make_problem(
        hidden,
        fit(targets, width, hidden.device, teacher_head),
        options,
        (labels, mask),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        width=width,
        chunk_rows=chunk_rows,
        statistics=statistics,
        most=most_entries(targets) if max_entries is None else max_entries,
    )
    loss: Tensor = _Fused.apply(hidden, head_weight, head_bias, problem, torch.is_grad_enabled())
    return loss if reduction == "none" else options.reduce(loss, len(hidden), mask, num_items)


def _check_shapes(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Targets,
    softcap: float | None,
    chunk_rows: int | None,
) -> None:
    """Raises ValueError for hidden states and a head that do not fit together or the targets."""
    if hidden.dim() != 2 or hidden.shape[0] != targets.num_rows:
        raise ValueError(
            f"hidden must be (R, D) with one row for each of the {targets.num_rows} target rows, "
            f"got {tuple(hidden.shape)}. For one sequence: hidden_states[0, :-1]."
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"head_weight must be (V, {hidden.shape[1]}) for these hidden states, "
            f"got {tuple(head_weight.shape)}"
        )
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ValueError(
            f"head_bias must have shape ({len(head_weight)},), got {tuple(head_bias.shape)}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none, got {softcap}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


def _make_problem(
    hidden: Tensor,
    targets: Targets,
    options: LossOptions,
    rows: tuple[Tensor | None, Tensor | None],
    **numbers: Any,
) -> Problem:
    """Brings everything but the targets, which are there, to the device of the hidden states.

    rows: labels and mask.
    """
    labels, mask = rows
    device, high = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
    return Problem(
        cells=cells_of(prepare(targets, options.renormalize)),
        options=options,
        weights=options.weights(targets.temperature, device, high),
        labels=None if labels is None else copy_to(labels, device)[:, None],
        rows=None if mask is None else copy_to(mask.to(torch.bool).nonzero()[:, 0], device),
        dtype=hidden.dtype,
        **numbers,
    )


def _refuse_gradients(targets: Targets, options: LossOptions, **arguments: Any) -> None:
    """Raises ValueError for an input that requires a gradient and gets none."""
    fields = {
        name: getattr(given, name)
        for given in (targets, options)
        for name in given.__dataclass_fields__
    }
    for name, value in (fields | arguments).items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which only hidden, head_weight and head_bias get. "
                "Detach it, or use distillation_loss."
            )


def _cast_alike(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as autocast does and gathers what is sharded. Raises ValueError for several dtypes."""
    low = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and low != torch.float64:
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, head_weight = hidden.to(low), head_weight.to(low)
        head_bias = None if head_bias is None else head_bias.to(low)
    for name, value in (("head_weight", head_weight), ("head_bias", head_bias)):
        if value is not None and value.dtype != low:
            raise ValueError(
                f"{name} is {value.dtype} and hidden {low}: use one dtype, or autocast"
            )
    return hidden, _gather(head_weight), None if head_bias is None else _gather(head_bias)


def _gather(parameter: Tensor) -> Tensor:
    """Gathers a sharded parameter; its gradient is averaged over the ranks and sharded."""
    if type(parameter) in (Tensor, nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # takes a second to import

    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # Without grad_placements each rank's own gradient would pass for that of all ranks.
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        num_ranks = mesh.size()
        full.register_hook(lambda gradient: gradient / num_ranks)  # gloo has sums only
    return full


class _Fused(torch.autograd.Function):
    """Computes the sum over rows, or each row's loss for reduction="none"."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        problem: Problem,
        grad_enabled: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, bias)
        ctx.problem = problem
        each = problem.options.reduction == "none"
        # The weight of each row is known only in backward if each row has a loss of its own.
        differentiate = grad_enabled and not each
        wanted = ctx.needs_input_grad[:3] if differentiate else (False, False, False)
        loss_R, gradients = FusedPass(problem, hidden, head, bias, None, wanted).run()
        ctx.gradients = gradients if differentiate else None
        return loss_R if each else loss_R.sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distillation_loss has no second derivative (create_graph=True). "
                "Use distillation_loss for it."
            )
        (scale,) = outer
        if scale is None:
            return (None,) * 5
        # Handed out, not kept: the head's gradient is as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, head, bias = ctx.saved_tensors
            weight_R = scale.expand(len(hidden))
            wanted = ctx.needs_input_grad[:3]
            _, gradients = FusedPass(ctx.problem, hidden, head, bias, weight_R, wanted).run()
        else:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        low = ctx.problem.dtype
        cast = (None if gradient is None else gradient.to(low) for gradient in gradients)
        return (*cast, None, None)

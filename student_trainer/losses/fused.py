"""The distillation loss from hidden states and the head's weight: the student's logits never exist.

Letters: R rows, C rows of one chunk, D hidden size, V vocabulary, K kept entries per row at most.
p is the teacher, q the student, z the student's logits; losses.py says what a cell is.

Rows are taken a chunk at a time: logits of the chunk into a buffer, statistics and the K kept
entries of each row out of it, the gradient of the logits into the same buffer, and from there into
the gradients of hidden states, head and bias. Thus forward does all the work and backward only
scales. The buffers are reused from chunk to chunk: fresh ones would be faulted in page by page,
which takes longer than the arithmetic.

With a = q * dD/dq of each cell, the gradient of a cell's logit is (a - q * sum(a)) / T; a tail
bucket's is shared out among its ids in proportion to q.
"""

from typing import Any

import torch
from torch import Tensor, nn

from logit_codec import Targets
from student_trainer.losses.checks import (
    check_divergence,
    check_labels,
    check_rows,
    shared_vocabulary,
)
from student_trainer.losses.distillation import prepare, reduce, within
from student_trainer.losses.fused_chunk import RowStatistics, _Problem, _run, most_entries


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
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    temperature_scaling: bool = True,
    renormalize: bool = False,
    effective_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    chunk_rows: int | None = None,
    statistics: RowStatistics | None = None,
    max_entries: int | None = None,
) -> Tensor:
    """distillation_loss of softcap * tanh(logit_scale * (hidden @ head_weight.T + head_bias) / softcap).

    hidden: (R, D), the student's last hidden states for exactly the target rows, after its final
    norm. head_weight: (V, D); it may be frozen, or be the input embeddings too. head_bias: (V,).
    softcap: None for none. Inputs of 16 bits are multiplied as such; everything else is computed in
    float32, and their gradients are added up in it. The other arguments are those of
    distillation_loss; masked rows cost nothing. chunk_rows: rows at a time; by default as many as
    make buffers of 96 MiB in all on a CPU, 512 MiB elsewhere. statistics: RowStatistics.zeros(R) on
    the device of hidden, to be filled in; with it labels are looked at even if ce_weight is 0.
    max_entries: of the row of the targets that has most; where it is not given, a GPU's is waited for.

    head_weight and head_bias may be DTensors, as FSDP2's fully_shard leaves them: they are gathered, and
    their gradients averaged over the ranks of their mesh and sharded again, as FSDP2 does with all
    others. Every rank of the mesh must then make this call, with rows of its own.

    Extra memory is the head's gradient, which is float32 at least, and these buffers.
    Gradients go to hidden, head_weight and head_bias, none are computed under torch.no_grad(), and
    there are no second derivatives. backward does the work of the forward pass again only for
    reduction="none" and if it is called a second time on a retained graph.

    Raises what distillation_loss raises.
    """
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
    check_divergence(targets, divergence, beta, renormalize)
    check_rows(targets, labels, mask, ce_weight, reduction)
    width = shared_vocabulary(targets, len(head_weight), effective_vocab_size)
    looks_at_labels = ce_weight != 0 or statistics is not None
    check_labels(labels if looks_at_labels else None, mask, width)
    others = {name: getattr(targets, name) for name in targets.__dataclass_fields__}
    others |= {"labels": labels, "mask": mask, "softcap": softcap, "logit_scale": logit_scale}
    for name, value in (others | {"num_items": num_items}).items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which only hidden, head_weight and head_bias get. "
                "Detach it, or use distillation_loss."
            )

    device = hidden.device
    low = hidden.dtype
    if torch.is_autocast_enabled(device.type) and low != torch.float64:
        low = torch.get_autocast_dtype(device.type)
        hidden, head_weight = hidden.to(low), head_weight.to(low)
        head_bias = None if head_bias is None else head_bias.to(low)
    for name, value in (("head_weight", head_weight), ("head_bias", head_bias)):
        if value is not None and value.dtype != low:
            raise ValueError(
                f"{name} is {value.dtype} and hidden {low}: use one dtype, or autocast"
            )
    head_weight = _gathered(head_weight)
    head_bias = None if head_bias is None else _gathered(head_bias)

    scale = kd_weight * (targets.temperature**2 if temperature_scaling else 1.0)
    rows = None
    if mask is not None:
        rows = mask.to(device, torch.bool).nonzero()[:, 0]
    problem = _Problem(
        targets=prepare(within(targets, width).to(device), renormalize),
        labels=labels.to(device)[:, None] if labels is not None and looks_at_labels else None,
        rows=rows,
        divergence=divergence,
        beta=beta,
        kd_weight=scale,
        ce_weight=ce_weight,
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        width=width,
        chunk_rows=chunk_rows,
        dtype=low,
        statistics=statistics,
        most=most_entries(targets) if max_entries is None else max_entries,
    )
    each = reduction == "none"
    loss = _Fused.apply(
        hidden, head_weight, head_bias, problem, each, torch.is_grad_enabled() and not each
    )
    return loss if each else reduce(loss, targets.num_rows, mask, reduction, num_items)


def _gathered(parameter: Tensor) -> Tensor:
    """A sharded parameter in full; its gradient is averaged over the ranks and sharded."""
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
    """The sum over rows, or each row's loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        problem: _Problem,
        each: bool,
        differentiate: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, bias)
        ctx.problem = problem
        ctx.gradients = None
        wanted = ctx.needs_input_grad[:3] if differentiate else (False, False, False)
        loss_R, gradients = _run(problem, hidden, head, bias, None, wanted)
        if differentiate:
            ctx.gradients = gradients
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
            return (None,) * 6
        # Handed out, not kept: the head's gradient is as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, head, bias = ctx.saved_tensors
            weight_R = scale.expand(len(hidden))
            _, gradients = _run(ctx.problem, hidden, head, bias, weight_R, ctx.needs_input_grad[:3])
        else:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        low = ctx.problem.dtype
        return (*(None if one is None else one.to(low) for one in gradients), None, None, None)

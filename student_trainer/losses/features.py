"""Compares states of chosen layers of student and teacher: feature distillation.

Letters: R rows, L layers, D hidden size of the teacher, S hidden size of the student.

A trained projector maps each of the student's layers to the teacher's width. It belongs to the
loss: it has to be in the optimizer and in checkpoints, and is thrown away with the loss.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from logit_codec import FeaturesTargets, Targets
from student_trainer.errors import UnsuitableTargets
from student_trainer.losses.checks import check_rows
from student_trainer.losses.options import take_mean
from student_trainer.transfer import copy_to

LOSSES = ("mse", "cosine")
NORMALIZATIONS = ("layer_norm", "none")
PROJECTORS = ("linear", "identity")


class FeatureLoss(nn.Module):
    """Computes how far states of the student are from those of the teacher, layer by layer.

    layers: which layer of the student learns which of the teacher, {teacher's: student's}, both
    counted as in transformers' `output_hidden_states`: 0 is the embeddings, n the output of the
    n-th layer, and the last one has gone through the final norm.

    loss: of a row and a pair of layers, where s is the student's state times the projector and t the
    teacher's state. "mse" is the mean over D of (s - t)^2 (TinyBERT, arXiv:1909.10351, section 3.1).
    "cosine" is 1 - s.t / (|s| |t|) (DistilBERT, arXiv:1910.01108).

    normalize: "layer_norm" brings each of the teacher's states to mean 0 and variance 1 over D, so
    that all rows and layers weigh the same: in models that normalise before their layers, the
    states of a few tokens are a hundred times as large as all others (arXiv:2402.17762). "none"
    takes them as they are, as the two papers do; their teacher, BERT, normalises after each layer.

    projector: "linear", with a bias, from S to D; "identity" where S and D are the same.

    Raises ValueError for an unknown option, and for "identity" between different widths.
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        student_size: int,
        teacher_size: int,
        *,
        loss: str = "mse",
        normalize: str = "layer_norm",
        projector: str = "linear",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("loss", loss, LOSSES),
            ("normalize", normalize, NORMALIZATIONS),
            ("projector", projector, PROJECTORS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        if not layers or min(*layers, *layers.values(), 0) < 0:
            raise ValueError(
                "layers must map at least one layer of the teacher to one of the student, counted "
                f"from 0, such as {{8: 4, 16: 8}}; got {dict(layers)}"
            )
        if projector == "identity" and student_size != teacher_size:
            raise ValueError(
                f"projector='identity' needs a student as wide as the teacher: {student_size} and "
                f"{teacher_size}. Use projector='linear'."
            )
        self.layers = dict(layers)
        self.loss, self.normalize = loss, normalize
        self.student_size, self.teacher_size = student_size, teacher_size
        self.projectors = nn.ModuleDict(
            {
                str(layer): nn.Identity()
                if projector == "identity"
                else nn.Linear(student_size, teacher_size, dtype=dtype)
                for layer in layers
            }
        )

    def forward(
        self,
        hidden_states: Sequence[Tensor] | Mapping[int, Tensor] | None,
        targets: Targets,
        *,
        mask: Tensor | None = None,
        row_weights: Tensor | None = None,
        reduction: str = "mean",
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Computes the mean over rows of each row's loss, itself the mean over the pairs of layers.

        hidden_states: of the student, (R, S) for exactly the target rows, found by the number of the
        layer. For one sequence:
        `[state[0, :-1] for state in student(ids, output_hidden_states=True).hidden_states]`.
        targets: of kind `features`, with at least the layers that are mapped.

        mask, reduction and num_items are those of `distillation_loss`. row_weights: (R,), what each
        row's loss is multiplied by; the mean is over the number of rows all the same.

        Raises ValueError for shapes that do not fit and for a layer that is missing,
        UnsuitableTargets (also a ValueError) for targets of another kind.
        """
        if hidden_states is None:
            raise ValueError(
                "the student's hidden_states are None: call it with output_hidden_states=True"
            )
        states, found = self._find_layers(targets)
        check_rows(targets.num_rows, reduction, mask=mask, row_weights=row_weights)
        students = {layer: self._get_states(hidden_states, layer, targets) for layer in found}
        device = next(iter(students.values())).device
        teacher_RLD = copy_to(states, device)
        keep_R1 = None if mask is None else copy_to(mask.to(torch.bool), device)[:, None]
        losses = []
        for layer, index in found.items():
            student_RS, teacher_RD = students[layer], teacher_RLD[:, index]
            if keep_R1 is not None:  # such a row may hold anything, infinities included
                student_RS = student_RS.masked_fill(~keep_R1, 0.0)
                teacher_RD = teacher_RD.masked_fill(~keep_R1, 0.0)
            losses.append(self._compare(self.projectors[str(layer)], student_RS, teacher_RD))
        loss_R = torch.stack(losses).mean(0)
        if keep_R1 is not None:
            loss_R = loss_R.where(keep_R1[:, 0], 0.0)
        if row_weights is not None:
            weight_R = copy_to(row_weights, device).to(loss_R.dtype)
            if keep_R1 is not None:
                weight_R = weight_R.where(keep_R1[:, 0], 0.0)
            loss_R = loss_R * weight_R
        if reduction == "none":
            return loss_R
        if reduction == "sum":
            return loss_R.sum()
        return take_mean(loss_R.sum(), targets.num_rows, mask, num_items)

    def extra_repr(self) -> str:
        """Names the pairs of layers and how they are compared."""
        pairs = ", ".join(f"{layer} -> {own}" for layer, own in self.layers.items())
        return f"layers {pairs} (teacher -> student), loss={self.loss}, normalize={self.normalize}"

    def _compare(self, projector: nn.Module, student_RS: Tensor, teacher_RD: Tensor) -> Tensor:
        """Computes (R,) losses of one pair of layers, in float32 or float64."""
        weight = getattr(projector, "weight", None)
        if weight is not None:  # autocast chooses the type of the product, if it is on
            student_RS = student_RS.to(weight.dtype)
        projected_RD = projector(student_RS)
        with torch.autocast(projected_RD.device.type, enabled=False):
            dtype = torch.promote_types(projected_RD.dtype, torch.float32)
            projected_RD, teacher_RD = projected_RD.to(dtype), teacher_RD.to(dtype)
            if self.normalize == "layer_norm":
                teacher_RD = nn.functional.layer_norm(teacher_RD, teacher_RD.shape[1:])
            if self.loss == "cosine":
                return 1 - nn.functional.cosine_similarity(projected_RD, teacher_RD, dim=1)
            return (projected_RD - teacher_RD).square().mean(1)

    def _find_layers(self, targets: Targets) -> tuple[Tensor, dict[int, int]]:
        """Returns the teacher's states and where in them each mapped layer is. Raises ValueError."""
        if not isinstance(targets, FeaturesTargets):
            layers = "+".join(map(str, sorted(self.layers)))
            raise UnsuitableTargets(
                f"a loss on features needs states of layers, got {targets.kind} targets. Ask the "
                f"teacher for targets='features:layers={layers}'."
            )
        missing = [layer for layer in self.layers if layer not in targets.layers]
        if missing or targets.hidden.shape[2] != self.teacher_size:
            raise ValueError(
                f"the loss is for states of {self.teacher_size} numbers after the layers "
                f"{sorted(self.layers)} of the teacher, the targets have {targets.hidden.shape[2]} "
                f"numbers after the layers {list(targets.layers)}"
            )
        return targets.hidden, {layer: targets.layers.index(layer) for layer in self.layers}

    def _get_states(
        self,
        hidden_states: Sequence[Tensor] | Mapping[int, Tensor],
        layer: int,
        targets: Targets,
    ) -> Tensor:
        """Returns the (R, S) states that learn a layer of the teacher. Raises ValueError."""
        own = self.layers[layer]
        try:
            states_RS = hidden_states[own]
        except LookupError:
            raise ValueError(
                f"hidden_states lack layer {own} of the student, which learns layer {layer} of the "
                f"teacher; there are {len(hidden_states)}"
            ) from None
        wanted = targets.num_rows, self.student_size
        if states_RS.shape != wanted:
            raise ValueError(
                f"hidden_states of layer {own} must be {wanted}, one row for each target row, got "
                f"{tuple(states_RS.shape)}. For one sequence: hidden_states[{own}][0, :-1]."
            )
        return states_RS

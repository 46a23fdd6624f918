"""Makes the optimizer that trains the matrices of the layers with Muon and the rest with AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MUON_MOMENTUM = 0.85
"""Muon's usual 0.95 remembers too long for runs of a few hundred steps."""
ADAMW_BETAS = (0.9, 0.95)


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps a torch.optim.Muon and a torch.optim.AdamW as one optimizer.

    Each has one group of parameters; a group without parameters is left out. Schedulers, gradient
    scalers and checkpoints see an ordinary optimizer: the groups and the state are its own.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        rest: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = ADAMW_BETAS,
        weight_decay: float = 0.0,
    ) -> None:
        """weight_decay: of the matrices; embeddings, heads, biases and norms have none."""
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                lr=lr,
                momentum=MUON_MOMENTUM,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append(muon)
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0))
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, defaults={"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step with every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not once for all: loading a checkpoint replaces the groups and the state.
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def make_muon(
    student: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = ADAMW_BETAS,
    weight_decay: float = 0.0,
    others: Iterable[nn.Parameter] = (),
) -> MuonWithAdamW:
    """Makes an optimizer of what is trained of a student: Muon for the matrices of its layers.

    Embeddings, the head and whatever is no matrix go to AdamW with these `betas`, and so do
    `others`, which are trained beside the student. LoRA's A and B in the layers are matrices like
    any other: hidden states are multiplied by them, and with the rate adjusted to the shape an
    update of either is as large as AdamW's.
    """
    outside = {
        id(parameter) for module in _find_embeddings(student) for parameter in module.parameters()
    }
    matrices, rest = [], []
    for parameter in student.parameters():
        if parameter.requires_grad:
            inside = parameter.ndim == 2 and id(parameter) not in outside
            (matrices if inside else rest).append(parameter)
    rest += others
    return MuonWithAdamW(matrices, rest, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def _find_embeddings(student: nn.Module) -> list[nn.Module]:
    """Returns every embedding and the head, with the adapters that wrap them."""
    found: list[nn.Module] = [one for one in student.modules() if isinstance(one, nn.Embedding)]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(student, name, None)
        module = None if get is None else get()
        if isinstance(module, nn.Module):
            found.append(module)
    return found

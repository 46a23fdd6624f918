"""Makes the optimizers of a run."""

import torch
from torch import nn

MUON_MOMENTUM = 0.85
"""Muon's usual 0.95 remembers too long for runs of a few hundred steps."""


def make_optimizers(
    student: nn.Module, name: str, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """adamw: one for everything; muon: Muon for matrices of the layers, AdamW for the rest."""
    if name == "adamw":
        return [torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.95))]
    matrices, rest = [], []
    for parameter_name, parameter in student.named_parameters():
        outside = "embed" in parameter_name or "lm_head" in parameter_name
        (rest if parameter.ndim != 2 or outside else matrices).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            momentum=MUON_MOMENTUM,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

"""Defines what a mixin for Trainers extends."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    # The class that a mixin is put before, whichever it is, comes after it.
    TrainerBase = object

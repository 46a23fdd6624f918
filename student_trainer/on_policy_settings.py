"""Declares the options of `student-trainer train` about texts that the student writes itself."""

from typing import Self

from pydantic import Field, model_validator

from logitstream.options import Settings
from student_trainer.loss_settings import Divergence


class OnPolicySettings(Settings):
    """How much of the training is on the student's own texts, and how it writes them."""

    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the batches in which the student writes the text itself, after prompts from --data, and
    learns what the teacher says about it; 1 is all. Needs --teacher: a record cannot know these
    texts."""
    on_policy_targets: str = "given_ids"
    """Targets to request for what the student wrote: given_ids (the likeliest ids of the student and
    the one that it wrote), top_k:64, hidden:int8, ..."""
    on_policy_divergence: Divergence = "reverse_kl"
    """Divergence from the teacher in these batches, in which labels do not count."""
    on_policy_beta: float | None = None
    """Its parameter, if it has one."""
    on_policy_support: int = Field(default=16, ge=1, le=255)
    """With given_ids: how many of its likeliest ids the student names."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens at the beginning of a text that the student continues. Of chats, and of prompts with
    completions, what comes before the first trained token is the prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens that the student writes after a prompt, unless it ends the text before."""
    sampling_temperature: float = Field(default=1.0, ge=0)
    """Of the student's draws; 0 always takes the likeliest token."""
    sampling_top_k: int = Field(default=0, ge=0)
    """Let the student draw from so many of its likeliest tokens; 0: from all."""
    sampling_top_p: float = Field(default=1.0, gt=0, le=1)
    """Let the student draw from its likeliest tokens that have this probability together."""
    max_staleness: int = Field(default=1, ge=0)
    """Optimizer steps between the weights that write a text and the step that trains on it, at most:
    with 1, the teacher scores the next texts during a step. 0 waits for it in every step."""
    train_special_tokens: bool = False
    """Also train the rows in which the student wrote a special token, such as the end of a text."""

    @model_validator(mode="after")
    def _check_on_policy(self) -> Self:
        if self.on_policy:
            return self
        for name, info in OnPolicySettings.model_fields.items():
            if name != "on_policy" and getattr(self, name) != info.default:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag} does nothing without --on-policy FRACTION: give both, such as "
                    "--on-policy 0.5"
                )
        return self

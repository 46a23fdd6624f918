"""Trains the projectors of a loss on features beside a Trainer's student.

They are no part of the student: whatever wraps, saves or counts that knows nothing of them. So
their gradients are averaged over the ranks here, and they are saved and loaded with the optimizer.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from student_trainer.errors import InvalidRequest
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.hf.trainer_base import TrainerBase
from student_trainer.losses.features import FeatureLoss
from student_trainer.teachers.several import split_teachers
from student_trainer.teachers.teacher import Teacher

PROJECTORS_FILE = "feature_projectors.safetensors"
"""In a checkpoint: the projectors of the loss on features."""


def make_feature_loss(
    arguments: DistillationArguments, teacher: Teacher, student: Any, seed: int
) -> FeatureLoss:
    """Makes the loss that the arguments describe; the seed decides the projectors' first weights.

    Raises ValueError for a record, for teachers of several widths, and for a student that does not
    say its layers or lacks one of those that are named, InvalidRequest for a teacher that lacks one.
    """
    teachers = split_teachers(teacher)
    # Anything with info and stream_batches is a teacher.
    if any(getattr(one, "has_one_kind", False) for one in teachers.values()):
        raise ValueError(
            "features are asked for beside targets, and a record holds one of the two: give the live "
            "teacher, or leave features out"
        )
    sizes = {name: one.info.hidden_size for name, one in teachers.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(
            f"features of several teachers need one hidden size, got {sizes}: leave features out"
        )
    layers, info = arguments.map_layers(), teacher.info
    if not info.hidden_size:
        raise InvalidRequest(
            f"the teacher {info.model} does not say how wide its states are, so it has no targets of "
            "kind features: leave features out"
        )
    if max(layers) > info.num_layers:
        raise InvalidRequest(
            f"features={arguments.features!r}: the teacher {info.model} has {info.num_layers} layers"
        )
    config: Any = getattr(student, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(config, "hidden_size", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not size or not num_layers:
        raise ValueError(
            "the student's config does not have hidden_size and num_hidden_layers, which a loss on "
            "features needs: leave features out"
        )
    if max(layers.values()) > num_layers:
        raise ValueError(
            f"feature_layers={arguments.feature_layers!r}: the student has {num_layers} layers"
        )
    dtype = torch.promote_types(next(student.parameters()).dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):  # the same on all ranks, and nothing else changes
        torch.manual_seed(seed)
        return FeatureLoss(layers, size, info.hidden_size, loss=arguments.feature_loss, dtype=dtype)


class FeatureHooks(TrainerBase):
    """Is what a Trainer calls to train the projectors, where there are any."""

    feature_loss: FeatureLoss | None = None
    """The loss on features, with the projectors."""

    def _begin_features(self, feature_loss: FeatureLoss) -> None:
        """Takes the loss over. Raises ValueError where its projectors could not be trained."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "features need every rank to have the whole student, and FSDP and DeepSpeed keep it "
                "in parts: use DDP, or leave features out"
            )
        if self.lr_scheduler is not None:
            raise ValueError(
                "features add the projectors to the optimizer, which a scheduler that was made "
                "before does not know: pass optimizers=(optimizer, None) and lr_scheduler_type"
            )
        self.feature_loss = feature_loss.to(self.args.device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Adds the projectors to the Trainer's own optimizer."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(one) for group in optimizer.param_groups for one in group["params"]}
        new = [one for one in self._get_projectors() if id(one) not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Takes the Trainer's step; after the last batch of several the ranks' gradients are averaged."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for parameter in self._get_projectors():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.world_size
        return loss

    def _get_projectors(self) -> list[nn.Parameter]:
        return [] if self.feature_loss is None else [*self.feature_loss.parameters()]

    def _clear_gradients(self) -> None:
        """Does what the Trainer does to the student's gradients before a step."""
        if self.feature_loss is not None:
            self.feature_loss.zero_grad()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.feature_loss is not None and self.args.should_save:
            save_file(self.feature_loss.state_dict(), Path(output_dir) / PROJECTORS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises ValueError for a checkpoint with projectors and a training without, or vice versa."""
        if checkpoint is not None:
            path = Path(checkpoint) / PROJECTORS_FILE
            if path.is_file() != (self.feature_loss is not None):
                was, give = ("with", "Give") if path.is_file() else ("without", "Leave out")
                raise ValueError(
                    f"{checkpoint} was trained {was} a loss on features. {give} features and "
                    "feature_layers to resume from it."
                )
            if self.feature_loss is not None:
                device = str(self.args.device)
                self.feature_loss.load_state_dict(load_file(path, device=device))
        super()._load_optimizer_and_scheduler(checkpoint)

"""Lets a Trainer's student write some of its batches itself, and learn from what the teacher says.

What is written for the next steps is saved with a checkpoint, one file for each rank: a training that
resumes trains on the same texts.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from student_trainer.hf.arguments import DistillationArguments
from student_trainer.hf.batch_loss import AttachedTargets, BatchLoss
from student_trainer.hf.meter import TrainerMeter
from student_trainer.hf.passes import Passes
from student_trainer.hf.trainer_base import TrainerBase
from student_trainer.hf.written_passes import WrittenPasses
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.on_policy.batches import find_longest_prompt
from student_trainer.on_policy.measures import compute_logs
from student_trainer.on_policy.writing import Writer
from student_trainer.teachers.several import split_teachers
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView

WRITTEN_FILE = "on_policy_{rank}.safetensors"
"""In a checkpoint: what each rank has written and not trained on."""
LOGGED = ("kd_loss", "tail_mass", "top1_agreement")
"""What is logged of the batches that the student wrote, beside what it logs of all others."""


def check_on_policy(distillation: DistillationArguments, teacher: Teacher) -> None:
    """Raises ValueError for what cannot be done with texts that nobody knows before."""
    if distillation.features:
        raise ValueError(
            "features are asked for by a second pass over the data, which the student's own texts do "
            "not have: leave features or on-policy out"
        )
    # Anything with info and stream_batches is a teacher.
    if any(getattr(one, "has_one_kind", False) for one in split_teachers(teacher).values()):
        raise ValueError(
            "a record has no targets of texts that the student has yet to write: give the live teacher, "
            "or leave on-policy out"
        )


class OnPolicyHooks(TrainerBase):
    """Is what a Trainer calls to train on what its student writes, if it does."""

    on_policy: OnPolicyArguments | None = None
    _passes: Passes
    _batch_loss: BatchLoss
    _written_loss: BatchLoss | None = None
    """Of the batches that the student wrote."""
    _written_meter: TrainerMeter | None = None

    def _make_passes(
        self, teacher: Teacher, distillation: DistillationArguments, view: TeacherView | None
    ) -> Passes:
        """Returns the passes over the training data. Raises ValueError for what cannot be written."""
        arguments = self.on_policy
        if arguments is None:
            return Passes(self, teacher, distillation, view)
        arguments.check()
        check_on_policy(distillation, teacher)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "a student that writes needs its whole weights on every rank, and FSDP and DeepSpeed "
                "keep them in parts: use DDP, or leave on-policy out"
            )
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        info = teacher.info
        writer = Writer(
            student,
            tokenizer if hasattr(tokenizer, "all_special_ids") else None,
            arguments,
            num_ids=info.effective_vocab_size or info.vocab_size,
            seed=seed,
            autocast=lambda: self.accelerator.autocast(),
        )
        longest = find_longest_prompt(arguments, teacher, student, view)
        return WrittenPasses(
            self, teacher, distillation, view, arguments, writer, longest_prompt=longest
        )

    def _make_written_loss(self, teacher: Teacher, distillation: DistillationArguments) -> None:
        """Makes the loss of written batches: the divergence alone, since labels are no truth there."""
        if self.on_policy is None:
            return
        arguments = DistillationArguments(
            targets=self.on_policy.targets,
            temperature=distillation.temperature,
            divergence=self.on_policy.divergence,
            beta=self.on_policy.beta,
            kd_weight=1.0,
            ce_weight=0.0,
            fused=distillation.fused,
        )
        self._written_meter = TrainerMeter(self.args.device)
        self._written_loss = BatchLoss(
            arguments,
            self._written_meter,
            used_ids=teacher.info.effective_vocab_size or teacher.info.vocab_size,
            may_fuse=True,
            unwrap=lambda model: self.accelerator.unwrap_model(model, keep_torch_compile=False),
        )

    def _find_loss(self, attached: AttachedTargets) -> BatchLoss:
        """Returns the loss of a batch."""
        if not attached.is_written:
            return self._batch_loss
        assert self._written_loss is not None
        return self._written_loss

    def _end_passes(self) -> None:
        if isinstance(self._passes, WrittenPasses):
            self._passes.end()
        else:
            self._passes.close()

    def _begin_written(self) -> None:
        """Begins another training."""
        if self._written_loss is not None and self._written_meter is not None:
            self._written_loss.begin_training()
            self._written_meter.reset()

    def _collect_on_policy_logs(self) -> dict[str, float]:
        """Returns what is logged of the student's texts. Every rank has to call this."""
        if self._written_meter is None or not isinstance(self._passes, WrittenPasses):
            return {}
        sums, rows = self._passes.take_sums(), self._written_meter.take_sums()
        largest = self._passes.meter.max_staleness
        if self.args.world_size > 1:
            numbers = torch.cat([sums.to(rows), rows, rows.new_tensor([largest])])
            each = self.accelerator.gather(numbers[None])  # type: ignore[union-attr]
            total = each.sum(0)  # type: ignore[union-attr,call-overload]
            largest = int(each[:, -1].max())  # type: ignore[union-attr,call-overload]
            sums, rows = total[: len(sums)].cpu(), total[len(sums) : -1]
        found = TrainerMeter.compute_logs(rows)
        return {
            **{f"on_policy_{name}": found[name] for name in LOGGED if name in found},
            **compute_logs(sums, largest, self.args.world_size),
        }

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        passes = self._find_written_passes()
        if passes is not None:
            save_file(passes.save(), self._find_written_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        passes = self._find_written_passes()
        if checkpoint is None or passes is None:
            return
        path = self._find_written_file(checkpoint)
        tensors: dict[str, Tensor] = load_file(path) if path.is_file() else {}
        passes.load(tensors)

    def _find_written_passes(self) -> WrittenPasses | None:
        """Returns the passes over what the student writes; a Trainer without a teacher has none."""
        passes = getattr(self, "_passes", None)
        return passes if isinstance(passes, WrittenPasses) else None

    def _find_written_file(self, folder: str) -> Path:
        return Path(folder) / WRITTEN_FILE.format(rank=self.args.process_index)

    def _describe_on_policy(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the settings."""
        return {} if self.on_policy is None else self.on_policy.describe()

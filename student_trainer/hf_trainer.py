"""A transformers.Trainer whose loss comes from a teacher, and a mixin for every other Trainer.

The teacher is asked in `get_batch_samples`: what the Trainer skips when it resumes from a checkpoint
never gets there, and so is never asked for. The targets travel inside the batch to the loss.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from logit_codec import Targets
from student_trainer.client.remote import RemoteTeacher, connect
from student_trainer.errors import ProtocolError
from student_trainer.hf.alignment import Alignment, warn_of_tail
from student_trainer.hf.arguments import (
    DistillationArguments,
    check_arguments,
    refuse_other_losses,
)
from student_trainer.hf.batch_loss import AttachedTargets, BatchLoss
from student_trainer.hf.checkpoints import (
    IDENTITY_FILE,
    check_identity,
    find_newest_complete,
    write_identity,
)
from student_trainer.hf.column_hooks import ColumnHooks
from student_trainer.hf.feature_hooks import FeatureHooks, make_feature_loss
from student_trainer.hf.meter import TrainerMeter
from student_trainer.hf.on_policy_hooks import OnPolicyHooks
from student_trainer.losses.causal import check_causal
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.teachers.batch_targets import Taken
from student_trainer.teachers.local import LocalTeacher
from student_trainer.teachers.several import Teachers, Weights
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView
from student_trainer.transfer import move_to_device

__all__ = [
    "ATTACHED",
    "IDENTITY_FILE",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
]

ATTACHED = "distillation_targets"
"""The key in a batch under which its targets travel to the loss."""


OneTeacher = str | Sequence[str] | nn.Module | Teacher
"""What stands for a teacher."""


class DistillationMixin(ColumnHooks, FeatureHooks, OnPolicyHooks):
    """Put before a Trainer class: `class Distilled(DistillationMixin, SFTTrainer)`.

    teacher: an address, several addresses of one service, a causal LM in this process, or a
    `Teacher`; None leaves the Trainer as it is. Only training asks the teacher; evaluation is the
    Trainer's own and needs labels.

    Several teachers are a mapping from names to these, see `Teachers`: teacher_column is the column of
    the training data that names the teacher of each row, or teacher_weights says how much each counts.
    teacher_view shows the teacher another text with the same trained tokens, see
    `Teacher.stream_batches`; it gets every column of the data. on_policy: the student writes some of
    the batches itself, after prompts from the data.
    """

    def __init__(
        self,
        *args: Any,
        teacher: OneTeacher | Mapping[str, OneTeacher] | None = None,
        teacher_column: str | None = None,
        teacher_weights: Weights | None = None,
        teacher_view: TeacherView | None = None,
        distillation: DistillationArguments | None = None,
        on_policy: OnPolicyArguments | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation = distillation or DistillationArguments()
        self.on_policy = on_policy
        self.teacher = None
        self._view = teacher_view
        if on_policy is not None and teacher is None:
            raise ValueError("on_policy needs a teacher that says what it thinks of the texts")
        choosing = {"teacher_column": teacher_column, "teacher_weights": teacher_weights}
        for name, value in choosing.items():
            if value is not None and not isinstance(teacher, Mapping):
                raise ValueError(
                    f"{name}={value!r} is for several teachers: teacher={{name: address, ...}}"
                )
        if teacher is not None:  # before a Trainer tokenizes its data
            check_arguments(self.distillation)
            for settings in (*args, *kwargs.values()):
                if isinstance(settings, transformers.TrainingArguments):
                    refuse_other_losses(settings, kwargs.get("compute_loss_func"))
        super().__init__(*args, **kwargs)
        if teacher is None:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: start one process for each with "
                "torchrun or accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
            )
        assert self.model is not None
        check_causal(self.model)
        refuse_other_losses(self.args, self.compute_loss_func)  # a subclass may set its own
        self._opened: list[RemoteTeacher] = []
        """Connections that this Trainer made, and closes."""
        if isinstance(teacher, Mapping):
            found = {name: self._open_teacher(one) for name, one in teacher.items()}
            self.teacher = Teachers(found, column=teacher_column, weights=teacher_weights)
        else:
            self.teacher = self._open_teacher(teacher)
        # The loss is divided by the rows of the whole accumulation window, see compute_loss.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 calls the same
        self._meter = TrainerMeter(self.args.device)
        self._alignment = Alignment(teacher_view)
        self._passes = self._make_passes(self.teacher, self.distillation, teacher_view)
        if self.distillation.features:
            found = self.distillation, self.teacher, self.model, self.args.seed
            self._begin_features(make_feature_loss(*found))
        self._batch_loss = BatchLoss(
            self.distillation,
            self._meter,
            used_ids=self.teacher.info.effective_vocab_size or self.teacher.info.vocab_size,
            may_fuse=True,
            unwrap=lambda model: self.accelerator.unwrap_model(model, keep_torch_compile=False),
            feature_loss=self.feature_loss,
        )
        self._make_written_loss(self.teacher, self.distillation)
        self.add_callback(_Callback(self))

    # What the Trainer calls, in the order of a step.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains as the Trainer does; True resumes from the newest complete checkpoint.

        Raises IncompatibleTeacher for a checkpoint of another teacher.
        """
        if resume_from_checkpoint and self.teacher is not None:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = find_newest_complete(Path(str(self.args.output_dir)))
            if isinstance(resume_from_checkpoint, str):
                check_identity(Path(resume_from_checkpoint), self._get_identity())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Returns the batches of one optimizer step with their targets, and the number of trained rows."""
        if self.teacher is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        began_s, loading_s = time.perf_counter(), self._passes.loading_s
        samples, num_rows = [], 0
        for taken, targets, features in self._passes.take(epoch_iterator, num_batches):
            if targets is not None:
                num_rows += targets.num_rows
                self._count_fetched(taken, targets)
            # Tensors in such a way that nothing waits for them; then whatever else accelerate can move.
            of_student = {k: v for k, v in taken.batch.items() if k not in self._of_teacher}
            batch: Any = send_to_device(move_to_device(of_student, device), device)
            batch[ATTACHED] = AttachedTargets.of(taken, targets, features)
            samples.append(batch)
        waited_s = time.perf_counter() - began_s
        # Any Trainer waits for its loader: only the rest is due to the teacher.
        self._meter.begin_step(began_s, waited_s - (self._passes.loading_s - loading_s))
        if not samples:
            return samples, None
        count = torch.full((), num_rows, device=device)  # filled there: nothing waits for a copy
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return samples, count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the distillation loss of a training batch; the Trainer's own of any other batch.

        The loss is summed over the rows of this batch and divided by those of all batches of the
        optimizer step, on all ranks: however they are cut into batches, the gradient is the same.
        """
        attached: AttachedTargets | None = inputs.pop(ATTACHED, None)
        if attached is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._refuse_unknown_ids(attached.largest_id)
        progress = self.state.global_step / max(1, self.state.max_steps - 1)
        loss, outputs = self._find_loss(attached).compute(
            model, inputs, attached, keep=return_outputs, progress=progress
        )
        if num_items_in_batch is None:
            loss = loss / max(len(attached.rows), 1)
        else:
            # The ranks' gradients are averaged.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last time to what the Trainer logs of training."""
        if self.teacher is not None and "loss" in logs:
            logs = {**logs, **self._collect_logs()}
        super().log(logs, start_time)

    def close(self) -> None:
        """Ends the connection to the teacher, if this Trainer made it."""
        if self.teacher is not None:
            self._end_passes()
            for one in self._opened:
                one.close()

    # How it is done.

    def _open_teacher(self, teacher: OneTeacher) -> Teacher:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if not hasattr(tokenizer, "get_vocab"):
            tokenizer = None
        if isinstance(teacher, nn.Module):
            return LocalTeacher(teacher, tokenizer)
        if isinstance(teacher, str | list | tuple):
            patience_s = self.distillation.patience_s
            self._opened.append(connect(teacher, tokenizer=tokenizer, patience_s=patience_s))
            return self._opened[-1]
        if hasattr(teacher, "stream_batches"):
            return teacher  # type: ignore[return-value]
        raise ValueError(
            "teacher must be an address such as teacher.lab:50051, a list of them, a causal LM, an "
            f"object with stream_batches or a mapping from names to these; got {type(teacher).__name__}"
        )

    def _count_fetched(self, taken: Taken, targets: Targets) -> None:
        if taken.is_written:
            assert self._written_meter is not None
            self._written_meter.rows_fetched += targets.num_rows
            return
        if self.distillation.check_first_batch:
            self._check_targets(taken.batch, targets)
        self._meter.rows_fetched += targets.num_rows

    def _check_targets(self, batch: Mapping[str, Any], targets: Targets) -> None:
        """Raises ProtocolError if the targets of the first rows do not belong to them."""
        if self._meter.rows_fetched == 0:
            warn_of_tail(targets, max(self.distillation.weights[1].ends))
        if not self._alignment.is_enough:
            self._alignment.add(batch, targets)

    def _refuse_unknown_ids(self, largest: int) -> None:
        """Raises ValueError, where the embeddings would raise an IndexError or a GPU would abort."""
        get_embeddings = getattr(self.model, "get_input_embeddings", None)
        size = getattr(get_embeddings and get_embeddings(), "num_embeddings", None)
        if size is not None and largest >= size:
            raise ValueError(
                f"a batch has the id {largest}, and the student has {size} ids. Use a student with "
                "every id of the tokenizer, or student.resize_token_embeddings(len(tokenizer))."
            )

    def _collect_logs(self) -> dict[str, float]:
        sums = self._meter.take_sums()
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)  # type: ignore[union-attr,call-overload]
        logs = self._meter.compute_logs(sums)
        if self._passes.in_flight is not None:
            logs["lookahead"] = float(self._passes.in_flight)
        counters = getattr(self.teacher, "counters", None)
        if counters is not None and counters.rows > self._rows_before:
            nbytes = counters.payload_nbytes - self._nbytes_before
            # With features, each row was asked for twice.
            rows = (counters.rows - self._rows_before) / (2 if self.feature_loss else 1)
            logs["bytes_per_token"] = nbytes / rows
        if isinstance(self.teacher, Teachers):
            logs |= self._compute_shares(self.teacher)
        return logs | self._collect_on_policy_logs()

    def _begin_counting(self) -> None:
        """Leaves what the teacher was asked before this training out of the bytes per token."""
        counters = getattr(self.teacher, "counters", None)
        self._rows_before = counters.rows if counters else 0
        self._nbytes_before = counters.payload_nbytes if counters else 0
        if isinstance(self.teacher, Teachers):
            self._rows_of_each = self.teacher.rows_by_teacher

    def _get_identity(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the teacher and of the loss."""
        assert self.teacher is not None
        return {
            "teacher_fingerprint": self.teacher.info.teacher_fingerprint,
            **self.distillation.describe_loss(),
            **self._describe_on_policy(),
            **(self.teacher.choice if isinstance(self.teacher, Teachers) else {}),
        }


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    """`transformers.Trainer` with a teacher: `DistillationTrainer(model, args, ..., teacher=...)`."""


class _Callback(transformers.TrainerCallback):
    """Follows the Trainer's steps and checkpoints on behalf of the mixin."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Data without a length has no epochs; the Trainer begins with its first pass in any case.
        has_epochs = has_length(kwargs.get("train_dataloader"))
        self._trainer._passes.start_at(int(state.epoch or 0) if has_epochs else 0)
        self._trainer._alignment = Alignment(self._trainer._view)
        self._trainer._meter.reset()
        self._trainer._begin_counting()
        self._trainer._batch_loss.begin_training()
        self._trainer._begin_written()
        self._trainer._clear_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        meters = [self._trainer._meter]
        meters[0].end_step()
        if self._trainer._written_meter is not None:
            meters.append(self._trainer._written_meter)
        self._trainer._clear_gradients()
        fetched = sum(meter.rows_fetched for meter in meters)
        in_loss = sum(meter.rows_in_loss for meter in meters)
        if fetched != in_loss:
            raise ProtocolError(
                f"{fetched} rows of targets were fetched and {in_loss} "
                "reached the loss: another class replaces compute_loss. DistillationMixin must be "
                "the first of the base classes, and no subclass may override compute_loss."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_identity(folder, self._trainer._get_identity())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._passes.close()

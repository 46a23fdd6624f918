"""A transformers.Trainer whose loss comes from a teacher, and a mixin for every other Trainer.

Letters: B sequences, T tokens, R trained rows, V vocabulary.

The teacher is asked in `get_batch_samples`: what the Trainer skips when it goes on from a checkpoint
never gets there, and so is never asked for. What was asked for travels inside the batch.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.data
import transformers
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint, has_length

from logit_codec import Targets, select
from student_trainer.client.remote import RemoteTeacher, connect
from student_trainer.errors import IncompatibleTeacher, ProtocolError
from student_trainer.losses.causal import check_causal
from student_trainer.losses.checks import check_divergence, check_labels, shared_vocabulary
from student_trainer.losses.distillation import distillation_loss, within
from student_trainer.losses.fused import fused_distillation_loss
from student_trainer.losses.fused_chunk import RowStatistics, most_entries
from student_trainer.losses.fused_head import FusedHead, Unfusable
from student_trainer.teachers.batch_targets import BatchTargets
from student_trainer.teachers.local import LocalTeacher
from student_trainer.teachers.look_ahead import parse_ahead
from student_trainer.teachers.prefetch import move_tensors, move_to_device
from student_trainer.teachers.request import ScoreOptions
from student_trainer.teachers.teacher import Teacher
from student_trainer.training.alignment import Alignment, warn_of_tail
from student_trainer.training.meter import SUMS, Meter, cross_entropy_sum, means

logger = logging.getLogger(__name__)

ATTACHED = "distillation_targets"
"""The key in a batch under which its targets travel to the loss."""
IDENTITY_FILE = "distillation.json"
"""In a checkpoint: the teacher and the settings it was trained with."""


@dataclass
class DistillationArguments:
    """How to learn from the teacher; `HfArgumentParser` makes flags of it."""

    targets: str = field(
        default="sampled", metadata={"help": "What to ask for: sampled, sampled:N, top_k:K, ..."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of both distributions in the divergence."}
    )
    divergence: str = field(
        default="forward_kl", metadata={"help": "From the teacher, see distillation_loss."}
    )
    beta: float | None = field(default=None, metadata={"help": "Of the divergences that have one."})
    kd_weight: float = field(default=1.0, metadata={"help": "Of the divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "Of the cross-entropy on the labels."})
    ahead: str = field(
        default="30s",
        metadata={"help": "Look-ahead: what is trained in this time, or a number of batches."},
    )
    check_first_batch: bool = field(
        default=True, metadata={"help": "Check that targets and tokens belong together."}
    )
    fused: bool = field(
        default=True,
        metadata={"help": "Never make the student's logits in full, where its head allows that."},
    )
    patience_s: float = field(
        default=300.0, metadata={"help": "How long to wait while the teacher does not answer."}
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Attached:
    """What the loss of one batch needs beside the batch."""

    targets: Targets | None
    """None if nothing of the batch is trained."""
    rows: Tensor
    """(R,) int64: the trained positions of the flattened batch, in reading order."""
    labels: Tensor
    """(R,) int64: the tokens that come behind them."""
    num_without: int
    """Tokens, padding aside, that are not trained."""
    largest_id: int
    """Of the batch's tokens."""
    max_entries: int
    """Of a row of the targets: counted on the host, so that no step waits for the device."""


if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object


class DistillationMixin(_Trainer):
    """Put before a Trainer class: `class Distilled(DistillationMixin, SFTTrainer)`.

    teacher: an address, several addresses of one service, a causal LM in this process, or a
    `Teacher`; None leaves the Trainer as it is. Only training asks the teacher; evaluation is the
    Trainer's own and needs labels.
    """

    def __init__(
        self,
        *args: Any,
        teacher: str | Sequence[str] | nn.Module | Teacher | None = None,
        distillation: DistillationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation = distillation or DistillationArguments()
        self.teacher: Teacher | None = None
        if teacher is not None:  # before a Trainer tokenizes its data
            for settings in (*args, *kwargs.values()):
                if isinstance(settings, transformers.TrainingArguments):
                    _check_settings(settings, self.distillation, kwargs.get("compute_loss_func"))
        super().__init__(*args, **kwargs)
        self._ahead: BatchTargets | None = None
        self._epoch_iterator: Iterator[Any] | None = None
        """Whose batches are looked ahead for."""
        self._pass = -1
        """Over the training data: the epoch of its draws."""
        self._may_end_apart = False
        """Whether ranks may have unequal numbers of batches."""
        self._pass_state = "new"
        """Of the pass over such data: new, begun or ended."""
        self._head: FusedHead | None = None
        self._head_was_tried = False
        if teacher is None:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: start one process for each with "
                "torchrun or accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
            )
        assert self.model is not None
        check_causal(self.model)
        wish = self.distillation
        _check_settings(self.args, wish, self.compute_loss_func)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.teacher = _as_teacher(
            teacher,
            tokenizer if hasattr(tokenizer, "get_vocab") else None,
            wish.patience_s,
        )
        self._owns_teacher = self.teacher is not teacher
        # The loss is divided by the rows of the whole accumulation window, see compute_loss.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # how transformers before 5.19 asks for the same
        self._meter = _Meter(self.args.device)
        self._alignment = Alignment()
        self.add_callback(_Watch(self))

    # What the Trainer calls, in the order of a step.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's. Of several checkpoints, the newest that is whole is gone on from."""
        if resume_from_checkpoint and self.teacher is not None:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = _newest_whole(Path(str(self.args.output_dir)))
            if isinstance(resume_from_checkpoint, str):
                self._compare(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimizer step with their targets, and how many rows are trained."""
        if self.teacher is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        began, loading_s = time.perf_counter(), self._meter.loading_s
        if epoch_iterator is not self._epoch_iterator or self._ahead is None:
            self._end_look_ahead()
            self._epoch_iterator, self._pass_state = epoch_iterator, "new"
            self._ahead = self._look_ahead(epoch_iterator)
        taken = [] if self._pass_state == "ended" else self._ahead.take(num_batches)
        if self._may_end_apart and self._pass_state != "ended":
            taken = taken[: self._shortest(len(taken), num_batches)]
        samples, num_rows = [], 0
        for one, targets in taken:
            if targets is not None:
                self._check(one.batch, targets)
                num_rows += targets.num_rows
                self._meter.rows_fetched += targets.num_rows
            batch: Any = send_to_device(one.batch, device, non_blocking=True)
            batch[ATTACHED] = _Attached(
                targets,
                one.rows,
                one.labels,
                one.num_without,
                one.largest_id,
                0 if targets is None else most_entries(targets),
            )
            samples.append(batch)
        waited_s = time.perf_counter() - began
        self._meter.step_began(began, waited_s - (self._meter.loading_s - loading_s))
        if not samples:
            return samples, None
        count = torch.full((), num_rows, device=device)  # filled there: nothing waits for a copy
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return samples, count.clamp(min=1)

    def get_train_dataloader(self) -> Any:
        """The Trainer's; with a teacher its batches stay on the host until they are trained."""
        loader = super().get_train_dataloader()
        if self.teacher is not None and isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a training batch; the Trainer's own loss of any other.

        Summed over the rows of this batch and divided by those of all batches of the optimizer
        step, on all ranks: however they are cut into batches, the gradient is the same.
        """
        attached: _Attached | None = inputs.pop(ATTACHED, None)
        if attached is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._refuse_unknown_ids(attached.largest_id)
        # Without labels the model computes no loss of its own.
        without_labels = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        self._meter.num_without += attached.num_without
        outputs = None
        head = None if return_outputs else self._fused_head(model, without_labels)
        if head is not None:
            loss = head.loss(model, without_labels, partial(self._sum_in_head, head, attached))
        else:
            outputs = model(**without_labels)
            logits_BTV = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            if logits_BTV.shape[:2] != inputs["input_ids"].shape:
                raise ValueError(
                    f"the student gave logits of {tuple(logits_BTV.shape[:2])} tokens for input_ids "
                    f"of {tuple(inputs['input_ids'].shape)}; the targets belong to the latter. "
                    "Adapters that add virtual tokens (prompt tuning) are not supported."
                )
            loss = self._sum_of_logits(logits_BTV, attached)
        if num_items_in_batch is None:
            loss = loss / max(len(attached.rows), 1)
        else:
            # The ranks' gradients are averaged.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last time to what the Trainer logs of training."""
        if self.teacher is not None and "loss" in logs:
            logs = {**logs, **self._measured()}
        super().log(logs, start_time)

    def close(self) -> None:
        """Ends the connection, if it was this Trainer that made it."""
        self._end_look_ahead()
        if isinstance(self.teacher, RemoteTeacher) and self._owns_teacher:
            self.teacher.close()

    # How it is done.

    def _check(self, batch: Mapping[str, Any], targets: Targets) -> None:
        """Of the first rows, whether their targets belong to them. Raises ProtocolError."""
        if not self.distillation.check_first_batch:
            return
        if self._meter.rows_fetched == 0:
            warn_of_tail(targets, self.distillation.ce_weight)
        if not self._alignment.is_enough:
            self._alignment.add(batch, targets)

    def _look_ahead(self, epoch_iterator: Iterator[Any]) -> BatchTargets:
        """The batches of a pass, each with its targets, asked for well before."""
        assert self.teacher is not None
        wish, state = self.distillation, self.state
        self._pass += 1
        loader: Any = self.callback_handler.train_dataloader
        several, alone = self.args.world_size > 1, isinstance(loader, DataLoaderShard)
        # What a loader that is not known does with all ranks is not known either.
        together = several and not alone
        # With data in shards, some ranks may come to the end of theirs before the others.
        is_even = isinstance(loader, DataLoaderDispatcher) or (alone and not _is_iterable(loader))
        self._may_end_apart = several and not is_even
        # No more than the run will use: targets behind max_steps would be made for nothing.
        most = (state.max_steps - state.global_step) * self.args.gradient_accumulation_steps
        return BatchTargets(
            self._loaded(itertools.islice(epoch_iterator, most), together),
            self.teacher,
            ScoreOptions.of(wish.targets, wish.temperature, self.args.seed, self._pass),
            _ahead(wish.ahead),
            agree=self._agree if together else None,
        )

    def _loaded(self, batches: Iterator[Any], together: bool) -> Iterator[Any]:
        """The batches, on the host until they are trained, and how long they took."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is not None and together:
                # A dispatcher leaves them on the device, as views of what it sent to all ranks.
                batch = move_tensors(batch, lambda tensor: tensor.to("cpu", copy=True))
            self._meter.loading_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _agree(self, wanted: int, room: int) -> tuple[int, int]:
        numbers = self._of_all_ranks(wanted, room)
        return max(one for one, _ in numbers), min(one for _, one in numbers)

    def _of_all_ranks(self, *numbers: int) -> list[list[int]]:
        """What each rank says, which all have to ask for."""
        own = torch.tensor([numbers], device=self.args.device)
        return self.accelerator.gather(own).tolist()  # type: ignore[union-attr]

    def _shortest(self, count: int, num_batches: int) -> int:
        """How many of the batches of a step all ranks have; this one has `count`.

        Where one has less than the step needs, the pass ends for all: a step is taken together.
        Raises ValueError if a rank had none at all.
        """
        assert self._ahead is not None
        counts = [found for (found,) in self._of_all_ranks(count)]
        shortest, rank = min(counts), counts.index(min(counts))
        if not shortest and max(counts) and self._pass_state == "new":
            raise ValueError(
                f"rank {rank} got no batch of the training data, and others did: the data set has too few "
                "shards, or empty ones. Set dispatch_batches=True in accelerator_config: then one rank "
                "reads, and all get their part."
            )
        self._pass_state = "begun" if shortest == num_batches else "ended"
        if self._pass_state == "ended":
            self._ahead.close()
            if shortest < max(counts):
                logger.warning("the data of rank %d has ended: so does this pass, for all", rank)
        return shortest

    def _refuse_unknown_ids(self, largest: int) -> None:
        """Raises ValueError rather than an IndexError of the embeddings, or an abort of the GPU."""
        get_embeddings = getattr(self.model, "get_input_embeddings", None)
        size = getattr(get_embeddings and get_embeddings(), "num_embeddings", None)
        if size is not None and largest >= size:
            raise ValueError(
                f"a batch has the id {largest}, and the student has {size} ids. Use a student with "
                "every id of the tokenizer, or student.resize_token_embeddings(len(tokenizer))."
            )

    def _end_look_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self._epoch_iterator = None, None

    def _fused_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> FusedHead | None:
        """The student's head, if the loss can be computed in its place; tried once a training."""
        if not self._head_was_tried:
            self._head_was_tried, self._head = True, None
            if self.distillation.fused and not self.args.torch_compile:
                try:
                    student = self.accelerator.unwrap_model(model)
                    self._head = FusedHead.of(model, student, inputs)
                except Unfusable as reason:
                    logger.info("the student's logits are made in full: %s", reason)
        return self._head

    def _sum_in_head(
        self,
        head: FusedHead,
        attached: _Attached,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        """As _sum_of_logits, without them."""
        wish, device = self.distillation, hidden_BTD.device
        if attached.targets is None:
            used = [hidden_BTD, weight_VD, *([] if bias_V is None else [bias_V])]
            return sum((one.sum() * 0.0 for one in used), start=hidden_BTD.new_zeros(()))
        targets, rows_R, labels_R = move_to_device(
            (_shared(attached, len(weight_VD)), attached.rows, attached.labels), device
        )
        statistics = RowStatistics.zeros(targets.num_rows, device)
        loss = fused_distillation_loss(
            hidden_BTD.flatten(0, 1)[rows_R],
            weight_VD,
            targets,
            head_bias=bias_V,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            divergence=wish.divergence,
            labels=labels_R,
            kd_weight=wish.kd_weight,
            ce_weight=wish.ce_weight,
            reduction="sum",
            statistics=statistics,
            max_entries=attached.max_entries,
            **self._beta(),
        )
        kd = statistics.divergence.sum() * targets.temperature**2 if wish.kd_weight else None
        self._meter.add(targets, kd, statistics.cross_entropy.sum(), statistics.best)
        return loss

    def _sum_of_logits(self, logits_BTV: Tensor, attached: _Attached) -> Tensor:
        """kd_weight * divergence + ce_weight * cross-entropy, summed over the rows."""
        wish, device = self.distillation, logits_BTV.device
        if attached.targets is None:
            return logits_BTV.sum() * 0.0  # every rank and batch takes part in the backward pass
        targets, rows_R, labels_R = move_to_device(
            (_shared(attached, logits_BTV.shape[-1]), attached.rows, attached.labels), device
        )
        logits_RV = logits_BTV.flatten(0, 1)[rows_R, : targets.vocab_size]
        loss = logits_RV.new_zeros((), dtype=torch.float32)
        kd = None
        if wish.kd_weight:
            kd = distillation_loss(
                logits_RV,
                targets,
                divergence=wish.divergence,
                reduction="sum",
                **self._beta(),
            )
            loss = loss + wish.kd_weight * kd
        ce = cross_entropy_sum(logits_RV if wish.ce_weight else logits_RV.detach(), labels_R)
        if wish.ce_weight:
            loss = loss + wish.ce_weight * ce
        self._meter.add(targets, kd, ce, logits_RV.argmax(1))
        return loss

    def _beta(self) -> dict[str, Any]:
        """The argument of the divergences that have one."""
        return {} if self.distillation.beta is None else {"beta": self.distillation.beta}

    def _step_ended(self) -> None:
        meter = self._meter
        meter.step_ended()
        if meter.rows_fetched != meter.rows_in_loss:
            raise ProtocolError(
                f"{meter.rows_fetched} rows of targets were fetched and {meter.rows_in_loss} "
                "reached the loss: another class replaces compute_loss. DistillationMixin must be "
                "the first of the base classes, and compute_loss not be overridden below it."
            )

    def _measured(self) -> dict[str, float]:
        sums = self._meter.take_sums()
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)  # type: ignore[union-attr,call-overload]
        found = self._meter.ratios(sums)
        if self._ahead is not None:
            found["lookahead"] = float(self._ahead.in_flight)
        counters = getattr(self.teacher, "counters", None)
        if counters is not None and counters.rows:
            found["bytes_per_token"] = counters.payload_nbytes / counters.rows
        return found

    def _identity(self) -> dict[str, Any]:
        assert self.teacher is not None
        wish = self.distillation
        return {
            "teacher_fingerprint": self.teacher.info.teacher_fingerprint,
            "targets": wish.targets,
            "temperature": wish.temperature,
            "divergence": wish.divergence,
            "beta": wish.beta,
            "kd_weight": wish.kd_weight,
            "ce_weight": wish.ce_weight,
        }

    def _compare(self, checkpoint: Path) -> None:
        """Raises IncompatibleTeacher for another teacher; other settings are the user's to change."""
        if not (checkpoint / IDENTITY_FILE).is_file():
            logger.warning("%s does not say which teacher it was trained with", checkpoint)
            return
        saved, ours = _read_identity(checkpoint / IDENTITY_FILE), self._identity()
        if saved["teacher_fingerprint"] != ours["teacher_fingerprint"]:
            raise IncompatibleTeacher(
                f"{checkpoint} was trained with another teacher: its fingerprint is "
                f"{saved['teacher_fingerprint']}, this one's is {ours['teacher_fingerprint']}. "
                f"Serve the same weights in the same way, or delete {IDENTITY_FILE} in the "
                "checkpoint to go on with this teacher on purpose."
            )
        for name in ours:
            if saved.get(name) != ours[name]:
                logger.warning("%s was %s and is now %s", name, saved.get(name), ours[name])


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    """`transformers.Trainer` with a teacher: `DistillationTrainer(model, args, ..., teacher=...)`."""


class _Watch(transformers.TrainerCallback):
    """Tells the mixin when steps end and checkpoints are written."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Data without a length has no epochs; the Trainer begins with its first pass in any case.
        loader = kwargs.get("train_dataloader")
        first = int(state.epoch or 0) if has_length(loader) else 0
        self._trainer._pass = first - 1
        self._trainer._alignment = Alignment()
        self._trainer._meter.reset()
        self._trainer._head_was_tried = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._step_ended()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            text = json.dumps(self._trainer._identity(), indent=2) + "\n"
            (folder / IDENTITY_FILE).write_text(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_look_ahead()


OWN_SUMS = ("tokens_without_target", "waiting_s", "busy_s", "target_rows")
"""What is added up over ranks beside the meter's sums."""


class _Meter:
    """What the steps measure: of their rows, and of their time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._rows = Meter(self._device)
        self.rows_fetched = 0
        self.rows_in_loss = 0
        self.num_without = 0
        self.loading_s = 0.0
        self._waiting_s = 0.0
        self._busy_s = 0.0
        self._began_s = time.perf_counter()

    def step_began(self, began_s: float, waited_s: float) -> None:
        self._began_s = began_s
        self._waiting_s += waited_s

    def step_ended(self) -> None:
        self._busy_s += time.perf_counter() - self._began_s

    def add(self, targets: Targets, kd: Tensor | None, ce: Tensor, best_R: Tensor) -> None:
        """One batch: sums over its rows, and the student's likeliest ids."""
        self.rows_in_loss += targets.num_rows
        self._rows.add(targets, kd_sum=kd, ce_sum=ce, best_R=best_R)

    def take_sums(self) -> Tensor:
        """(len(SUMS) + len(OWN_SUMS),), and begins anew; target_rows goes on counting."""
        rows = self._rows.take()
        own = (self.num_without, self._waiting_s, self._busy_s, self.rows_in_loss)
        self.num_without, self._waiting_s, self._busy_s = 0, 0.0, 0.0
        return torch.cat([rows, rows.new_tensor(own)])

    @staticmethod
    def ratios(sums: Tensor) -> dict[str, float]:
        """What is logged, from the sums of all ranks."""
        found = means(sums[: len(SUMS)])
        own = dict(zip(OWN_SUMS, sums[len(SUMS) :].tolist(), strict=True))
        found["waiting_fraction"] = own["waiting_s"] / max(own["busy_s"], 1e-9)
        found["tokens_without_target"] = own["tokens_without_target"]
        found["target_rows"] = own["target_rows"]
        return found


def _as_teacher(
    teacher: str | Sequence[str] | nn.Module | Teacher, tokenizer: Any, patience_s: float
) -> Teacher:
    if isinstance(teacher, nn.Module):
        return LocalTeacher(teacher, tokenizer)
    if isinstance(teacher, str | list | tuple):
        return connect(teacher, tokenizer=tokenizer, patience_s=patience_s)
    if hasattr(teacher, "stream_batches"):
        return teacher  # type: ignore[return-value]
    raise ValueError(
        "teacher must be an address such as teacher.lab:50051, a list of them, a causal LM or an "
        f"object with stream_batches; got {type(teacher).__name__}"
    )


def _check_settings(
    args: transformers.TrainingArguments, wish: DistillationArguments, loss_func: Any
) -> None:
    """Raises ValueError for what the loss cannot be, or would leave out without a word."""
    spec = ScoreOptions.of(wish.targets, wish.temperature, args.seed, 0).spec
    parse_ahead(_ahead(wish.ahead))
    row = select(
        torch.zeros(1, getattr(spec, "k", 2)),
        spec,
        temperature=wish.temperature,
        uniforms=torch.zeros(1, dtype=torch.float64),
        realized_ids=torch.zeros(1, dtype=torch.int64),
    )
    check_divergence(row, wish.divergence, 0.5 if wish.beta is None else wish.beta, False)
    for name in ("kd_weight", "ce_weight"):
        weight = getattr(wish, name)
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    if not wish.kd_weight and not wish.ce_weight:
        raise ValueError("kd_weight and ce_weight are both 0: there is nothing to learn")
    ours = (
        "would have no effect: with a teacher the loss is kd_weight times the divergence from it and "
        "ce_weight times the cross-entropy on the labels"
    )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} {ours}. Leave it at 0; the teacher's "
            "distribution is the smoother of the two targets as it is."
        )
    if getattr(args, "loss_type", "nll") == "dft":
        raise ValueError(f"loss_type='dft' {ours}. Leave it at 'nll', or train without a teacher.")
    if loss_func is not None:
        raise ValueError(f"compute_loss_func {ours}. Leave it out, or train without a teacher.")


def _ahead(ahead: int | str) -> int | str:
    """As `stream_batches` takes it: flags are texts."""
    return int(ahead) if str(ahead).isdigit() else ahead


def _is_iterable(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset)


def _shared(attached: _Attached, head_size: int) -> Targets:
    """The targets, over the ids that the student's head has too; while they are on the CPU."""
    assert attached.targets is not None
    width = shared_vocabulary(attached.targets, head_size)
    check_labels(attached.labels, None, width)
    return within(attached.targets, width)


def _read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its teacher. Raises ValueError that names the file."""
    try:
        saved = json.loads(path.read_text())
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict) or not isinstance(saved.get("teacher_fingerprint"), str):
        raise ValueError(
            f"{path} is damaged: it does not say which teacher the checkpoint was trained with. Delete "
            "it to go on with this teacher, or go on from an older checkpoint."
        )
    return saved


def _newest_whole(output_dir: Path) -> str | bool:
    """The newest checkpoint that was written to its end, which is when its state is readable."""
    newest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if newest is None:
        return True  # the Trainer says what is missing
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError, RecursionError):
            logger.warning("%s was not written to its end and is left out", path)
    return True

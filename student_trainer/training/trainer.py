"""Trains one student of a run: DistillationTrainer with the run's order, measurements and checkpoints."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from student_trainer import disk
from student_trainer.errors import FailedElsewhere, Interrupted, NotWritten
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.hf.meter import cross_entropies
from student_trainer.hf_trainer import DistillationTrainer
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.teachers.layout import IGNORE_INDEX, Layout
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView
from student_trainer.training import checkpoints, ranks
from student_trainer.training.corpus import Corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.interrupts import CtrlC
from student_trainer.training.optimizers import make_muon
from student_trainer.training.order import EpochOrder
from student_trainer.training.progress import Counts, Progress, read_history, read_measurements
from student_trainer.training.results import Scores, StudentResults
from student_trainer.training.students import save_student

logger = logging.getLogger(__name__)


class StudentTrainer(DistillationTrainer):
    """Trains one student of a run, from a teacher's targets or, without a teacher, from labels."""

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        corpus: Corpus,
        held_out: HeldOut,
        *,
        label: str,
        teacher: Teacher | None = None,
        teacher_view: TeacherView | None = None,
        distillation: DistillationArguments | None = None,
        on_policy: OnPolicyArguments | None = None,
        uses_muon: bool = False,
        identity: Mapping[str, Any],
        keep_checkpoints: int = 2,
        callbacks: Sequence[transformers.TrainerCallback] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        """label: what the student is called. identity: what must be the same in a run that resumes.

        say: as for `Progress`.
        """
        self.progress = Progress(label, say)
        self._label = label
        self._held_out = held_out
        self._uses_muon = uses_muon
        self._identity = identity
        self._keep_checkpoints = keep_checkpoints
        self._ctrl_c = CtrlC()
        self._were_pressed: Tensor | None = None
        """Of a step ago: in how many processes Ctrl-C was pressed."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=corpus.train,
            eval_dataset=corpus.held_out,
            processing_class=corpus.tokenizer,
            data_collator=corpus.collate if teacher is not None else _with_labels(corpus.collate),
            compute_loss_func=None if teacher is not None else _make_label_loss(held_out.num_ids),
            callbacks=[*callbacks],
            teacher=teacher,
            teacher_view=teacher_view,
            distillation=distillation,
            on_policy=on_policy,
        )
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.add_callback(self.progress)
        self.add_callback(_RunCallback(self))

    @property
    def has_fused_loss(self) -> bool:
        """Whether the steps so far have made no logits in full."""
        losses = [] if self.teacher is None else [self._batch_loss, self._written_loss]
        return any(loss is not None and loss.head is not None for loss in losses)

    def run(self) -> StudentResults:
        """Trains from the newest checkpoint, if there is one, and measures the student.

        Raises ValueError for a checkpoint of another run or a damaged one, NotWritten, Interrupted
        after Ctrl-C, and what a teacher can raise.
        """
        newest, counts = ranks.share(self._find_newest)
        if counts is not None:
            self.progress.resume(counts)
            logger.info("%s: resuming from %s", self._label, newest)
        try:
            with self._ctrl_c.caught():
                self.train(resume_from_checkpoint=None if newest is None else str(newest))
        except KeyboardInterrupt:
            raise self._interrupted() from None
        finally:
            self.progress.close()
            self.close()
        if any(gather_object([self._ctrl_c.was_pressed])):
            raise self._interrupted()
        counts, log = self.progress.counts, self.state.log_history
        return StudentResults(
            seconds=counts.seconds,
            waiting_s=counts.waiting_s,
            tokens=counts.tokens,
            history=read_history(log),
            measurements=read_measurements(log),
            scores=self._measure(),
        )

    # What the Trainer calls.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes Muon for the matrices of the layers, if the run wants it, or the Trainer's own."""
        if self._uses_muon and self.optimizer is None:
            wrapped = self.model if model is None else model
            assert wrapped is not None
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if self.is_deepspeed_enabled or getattr(plugin, "fsdp_version", 2) == 1:
                raise ValueError(
                    "--optimizer muon needs matrices, and DeepSpeed and FSDP 1 train flat parts of "
                    "them: give --optimizer adamw, or fsdp_version 2"
                )
            args = self.args
            self.optimizer = make_muon(
                wrapped,
                learning_rate=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.weight_decay,
                others=self._get_projectors(),
            )
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Returns what a step needs. Ctrl-C while it waits saves a checkpoint of the step before."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # the Trainer takes one step too many from a checkpoint of the last
        began_s, random = time.perf_counter(), torch.get_rng_state()
        waited_s = self._get_waited_s()
        # Several processes have to agree on the step after which they stop.
        waiting = self._ctrl_c.idle() if self.args.world_size == 1 else nullcontext()
        try:
            with waiting:
                samples, num_rows = super().get_batch_samples(epoch_iterator, num_batches, device)
        except KeyboardInterrupt:
            if self.state.global_step > self._initial_global_step and self.args.world_size == 1:
                torch.set_rng_state(random)  # a loader that began an epoch has drawn its seed
                assert self.model_wrapped is not None
                self._save_checkpoint(self.model_wrapped, None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        self.progress.begin_step(began_s, num_rows, self._get_waited_s() - waited_s)
        return samples, num_rows

    def evaluate(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, Any]:
        """Measures the student on the held-out text, beside the teacher."""
        scores = self._measure()
        found = {
            "loss": scores.loss,
            "accuracy": scores.accuracy,
            "top1_agreement": scores.top1_agreement,
            "calibration_error": scores.calibration_error,
        }
        metrics: dict[str, Any] = {
            f"{metric_key_prefix}_{name}": value
            for name, value in found.items()
            if value is not None
        }
        counts = self.progress.counts
        self.log({**metrics, "tokens": counts.tokens, "seconds": counts.seconds})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was counted to what is logged of the steps."""
        if "loss" in logs:
            logs = self.progress.add_to(logs)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data_set: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")  # since transformers 5.2
        if strategy != "random" or not hasattr(data_set, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self._order = EpochOrder(len(data_set), per_step, seed)
        return self._order

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if (checkpoint / checkpoints.SEAL).exists():
            return
        what = f"the checkpoint of step {self.state.global_step} to {folder}"

        def save() -> None:
            with disk.writing(folder, what):
                super(StudentTrainer, self)._save_checkpoint(model, trial)

        try:
            ranks.together(save)
        except (NotWritten, FailedElsewhere):
            if ranks.is_first():
                shutil.rmtree(checkpoint, ignore_errors=True)  # so that its room is free again
            raise

    def save_student(self, folder: Path) -> None:
        """Writes the student as it is into a Hugging Face folder. Raises NotWritten."""
        weights: Any = None
        student = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # it is in parts
            weights = self.accelerator.get_state_dict(self.model_wrapped)
            for name in getattr(student, "all_tied_weights_keys", ()):
                weights.pop(name, None)  # a head that is the embeddings is gathered as a copy
        ranks.share(lambda: save_student(student, self.processing_class, folder, weights))

    # How it is done.

    def _find_newest(self) -> tuple[Path | None, Counts | None]:
        newest = checkpoints.find_newest(Path(str(self.args.output_dir)))
        return newest, newest and checkpoints.check(newest, self._identity)

    def _measure(self) -> Scores:
        assert self.model is not None
        return self._held_out.measure(
            self.model,
            self.args.eval_batch_size,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
            add_up=lambda tensor: self.accelerator.reduce(tensor, "sum"),  # type: ignore[arg-type]
        )

    def _agree_to_stop(self) -> bool:
        """Returns whether Ctrl-C was pressed, which all processes find out after the same step.

        Where there are several, each looks at what they knew a step ago: no device is waited for.
        """
        pressed, before = self._ctrl_c.was_pressed, self._were_pressed
        if self.args.world_size > 1:
            own = torch.tensor(float(pressed), device=self.args.device)
            self._were_pressed = self.accelerator.reduce(own, "sum")  # type: ignore[arg-type]
            pressed = before is not None and bool(before > 0)
        return pressed

    def _get_waited_s(self) -> float:
        """Returns how long this process has waited for targets since its training began."""
        return 0.0 if self.teacher is None else self._meter.total_waiting_s

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"after step {self.state.global_step} of {self._label}")


class _RunCallback(transformers.TrainerCallback):
    """Seals checkpoints, keeps the order of each epoch, and ends the training after Ctrl-C."""

    def __init__(self, trainer: StudentTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Else all ranks would drop the same units. What a checkpoint has of this rank replaces it.
        if args.process_index or state.global_step:
            numbers = f"{args.seed} {args.process_index} {state.global_step}"
            torch.manual_seed(
                xxhash.xxh32_intdigest(numbers.encode())
            )  # of which a CPU takes 32 bits

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The loader of a resumed epoch hides the sampler from accelerate.
        order = getattr(self._trainer, "_order", None)
        if order is not None:
            order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._agree_to_stop():
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.progress.count()
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"

        def seal() -> None:
            with disk.writing(folder, f"the checkpoint of step {state.global_step} to {folder}"):
                checkpoints.seal(checkpoint, trainer._identity, trainer.progress.counts)
            checkpoints.rotate(folder, trainer._keep_checkpoints, also=state.best_model_checkpoint)

        ranks.share(seal)  # every process has written its files


def _with_labels(collate: Callable[[list[Any]], dict[str, Any]]) -> Any:
    """Adds labels to batches whose tokens are their own; tokens that are not trained have none."""

    def collate_with_labels(rows: list[Any]) -> dict[str, Any]:
        batch = {k: v for k, v in collate(rows).items() if isinstance(v, Tensor)}
        layout = Layout.of(batch)
        labels = torch.full_like(layout.ids, IGNORE_INDEX)
        trained = layout.trained[:, :-1]
        labels[:, 1:][trained] = layout.labels[:, 1:][trained]
        return {**batch, "labels": labels}

    return collate_with_labels


def _make_label_loss(num_ids: int | None) -> Any:
    """Returns the cross-entropy as a loss function of a Trainer.

    num_ids: what the head has after so many ids is padding, without a probability.
    """

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        next_ids = labels[:, 1:].flatten()
        logits = outputs["logits"][:, :-1, :num_ids].flatten(0, 1)
        total = cross_entropies(logits, next_ids).sum()  # 0 for IGNORE_INDEX
        num_rows = num_items_in_batch
        if num_rows is None:
            num_rows = (next_ids != IGNORE_INDEX).sum()
        return total / num_rows

    return compute

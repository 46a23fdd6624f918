"""Passes over a Trainer's data in which the student writes some of the batches itself.

A batch of the data gives its prompts and its place in the order. What the student writes is asked for
at once, some optimizer steps before it is trained, and never with weights older than that.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from logit_codec import Targets
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.hf.passes import Passes, TakenTargets
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.on_policy.measures import OnPolicyMeter
from student_trainer.on_policy.prompts import TOKEN_KEYS, take_columns, take_prompts
from student_trainer.on_policy.scoring import Scorer
from student_trainer.on_policy.writing import Writer, WrittenTexts
from student_trainer.teachers.batch_targets import Taken
from student_trainer.teachers.layout import IGNORE_INDEX
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView

PROMPTS, NUMBER = "on_policy_prompts", "on_policy_number"
"""Keys of a batch of the data that the student is to write anew: its prompts, and its number."""


@dataclass(slots=True, eq=False)
class _Written:
    number: int
    texts: WrittenTexts
    taken: Taken
    targets: "Future[Targets | None]"


@dataclass(slots=True, eq=False)
class _Step:
    """The batches of one optimizer step, in order."""

    number: int
    """Optimizer steps before it."""
    batches: list[TakenTargets]
    written: dict[int, _Written] = field(default_factory=dict)
    """By their place among the batches."""


class WrittenPasses(Passes):
    """Passes of which the student writes a part."""

    def __init__(
        self,
        trainer: transformers.Trainer,
        teacher: Teacher,
        arguments: DistillationArguments,
        view: TeacherView | None,
        on_policy: OnPolicyArguments,
        writer: Writer,
        *,
        longest_prompt: int,
    ) -> None:
        super().__init__(trainer, teacher, arguments, view)
        self._on_policy = on_policy
        self._writer = writer
        self._longest_prompt = longest_prompt
        self._scorer = Scorer(teacher, view)
        self.meter = OnPolicyMeter()
        self._saved: dict[int, WrittenTexts] = {}
        """What a checkpoint had of batches that were written and not trained, by number."""
        self._begin_queue()

    def take(self, epoch_iterator: Iterator[Any], count: int) -> list[TakenTargets]:
        """Returns the next batches of a pass, those of the student with what it wrote."""
        if epoch_iterator is not self._epoch_iterator:
            self._begin_queue()
        step = self._trainer.state.global_step
        while not self._has_ended and len(self._queue) <= self._on_policy.max_staleness:
            batches = super().take(epoch_iterator, count)
            self._has_ended = not batches
            if batches:
                self._queue.append(_Step(step + len(self._queue), batches))
        for one in self._queue:
            self._write_step(one)
        if not self._queue:
            return []
        first = self._queue[0]
        taken: list[TakenTargets] = []
        for place, batch in enumerate(first.batches):
            written = first.written.get(place)
            if written is None:
                taken.append(batch)
                continue
            targets = written.targets.result()
            self.meter.add_training(written.texts, step - written.texts.version)
            taken.append((written.taken, targets, None))
        # Not before everything is there: what is interrupted here is saved as it is.
        self._last = self._queue.popleft()
        return taken

    def close(self) -> None:
        """Gives up what is in flight."""
        super().close()
        self._begin_queue()

    def end(self) -> None:
        """Ends the threads that ask the teacher."""
        self.close()
        self._scorer.close()

    def take_sums(self) -> Tensor:
        """Returns the sums of `OnPolicyMeter` since the last time."""
        self.meter.add_scoring(*self._scorer.take_counts())
        return self.meter.take()

    def save(self) -> dict[str, Tensor]:
        """Returns what was written for steps that are not taken yet."""
        steps = [*([self._last] if self._last is not None else []), *self._queue]
        done = self._trainer.state.global_step
        return {
            f"{written.number}.{name}": tensor
            for step in steps
            if step.number >= done
            for written in step.written.values()
            for name, tensor in written.texts.to_tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what `save` returned for when these batches come again."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, part = name.partition(".")
            found.setdefault(int(number), {})[part] = tensor
        self._saved = {number: WrittenTexts.of_tensors(parts) for number, parts in found.items()}

    def _begin_queue(self) -> None:
        self._queue: deque[_Step] = deque()
        self._last: _Step | None = None
        """The step whose batches were handed out last."""
        self._has_ended = False

    def _load(self, batches: Iterator[Any], together: bool) -> Iterator[Any]:
        """Yields the batches; of those that the student writes, the prompts, of which none is trained."""
        args, state = self._trainer.args, self._trainer.state
        first = state.global_step * args.gradient_accumulation_steps
        for number, batch in enumerate(super()._load(batches, together), first):
            if not self._on_policy.chooses(args.seed, number):
                yield batch
                continue
            prompts = take_prompts(batch, self._on_policy.prompt_tokens, self._longest_prompt)
            ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
            yield {
                **{name: value for name, value in batch.items() if name not in TOKEN_KEYS},
                "input_ids": ids,
                "labels": torch.full_like(ids, IGNORE_INDEX),
                PROMPTS: prompts,
                NUMBER: number,
            }

    def _write_step(self, step: _Step) -> None:
        """Writes the batches of a step that the student writes and has not written."""
        args, state = self._trainer.args, self._trainer.state
        for place, (prompted, _, _) in enumerate(step.batches):
            if PROMPTS not in prompted.batch or place in step.written:
                continue
            number, prompts = prompted.batch[NUMBER], prompted.batch[PROMPTS]
            texts = self._saved.pop(number, None)
            if texts is None or not self._is_usable(texts, prompts, step.number):
                name = f"batch {number} rank {args.process_index}"
                texts = self._writer.write(prompts, name=name, version=state.global_step)
                self.meter.add_writing(texts)
                self.loading_s += texts.seconds  # nobody waits for the teacher meanwhile
            columns = take_columns(prompted.batch)
            columns.pop(PROMPTS, None)
            writer = self._writer
            batch = texts.make_batch(writer.pad_id, writer.untrained, columns)
            taken = Taken.of(batch, is_written=True)
            request = self._on_policy.make_request(
                self._arguments.temperature, args.seed, self._number
            )
            targets = self._scorer.ask(taken, texts, writer.untrained, request)
            step.written[place] = _Written(number, texts, taken, targets)

    def _is_usable(self, texts: WrittenTexts, prompts: list[Tensor], step: int) -> bool:
        """Whether what a checkpoint had may be trained on in a step: of another bound it may be too old."""
        staleness = step - texts.version
        return staleness <= self._on_policy.max_staleness and texts.continues(prompts)

"""A source of batches that the student writes itself, with their targets, for loops of one's own."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from logit_codec import Targets
from student_trainer.errors import TeacherError
from student_trainer.on_policy.arguments import OnPolicyArguments
from student_trainer.on_policy.measures import OnPolicyMeter, compute_logs
from student_trainer.on_policy.prompts import read_prompt
from student_trainer.on_policy.scoring import Scorer
from student_trainer.on_policy.writing import Writer, WrittenTexts
from student_trainer.teachers.batch_targets import Taken
from student_trainer.teachers.position import read_position
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Pending:
    """A batch that was written and not handed out."""

    number: int
    prompts: list[Tensor]
    texts: WrittenTexts
    taken: Taken
    targets: "Future[Targets | None]"


class OnPolicyBatches(Iterator[tuple[dict[str, Any], Targets]]):
    """Yields (batch, targets): the student continues prompts, the teacher says what it thinks of that.

        batches = OnPolicyBatches(student, prompts, teacher, tokenizer)
        for batch, targets in batches:
            rows = batch["labels"][:, 1:].flatten() != -100
            logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = distillation_loss(logits[:, :-1].flatten(0, 1)[rows], targets, divergence="reverse_kl")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            batches.step()

    The batch is on the CPU and padded on the right; its labels are the tokens that are trained. `step`
    says that the weights have changed. A batch that is handed out was written at most max_staleness
    steps before, also where `step` is called more often than announced: then it is written again.

    `state_dict` holds what was written and not handed out, so that a training that resumes with the
    same student, optimizer and prompts goes on to the bit.
    """

    def __init__(
        self,
        student: Any,
        prompts: Iterable[Any],
        teacher: Teacher,
        tokenizer: Any = None,
        *,
        arguments: OnPolicyArguments | None = None,
        batch_size: int = 8,
        batches_per_step: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        teacher_view: TeacherView | None = None,
    ) -> None:
        """prompts: token ids, texts, or messages of chats, which end where the student is to answer;
        what does not fill a last batch is left out. arguments: its fraction does not matter here.
        batches_per_step: how many batches come between two calls of `step`. temperature: of the
        targets. Raises ValueError."""
        self._arguments = arguments or OnPolicyArguments()
        self._arguments.check()
        for name, value in (("batch_size", batch_size), ("batches_per_step", batches_per_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        info = teacher.info
        self._tokenizer = tokenizer
        self._writer = Writer(
            student,
            tokenizer,
            self._arguments,
            num_ids=info.effective_vocab_size or info.vocab_size,
            seed=seed,
        )
        self._options = self._arguments.make_request(temperature, seed, 0)
        self._scorer = Scorer(teacher, teacher_view)
        self._longest = find_longest_prompt(self._arguments, teacher, student, teacher_view)
        self._prompts = prompts
        self._source: Iterator[Any] | None = None
        self._batch_size = batch_size
        self._per_step = batches_per_step
        self._pending: deque[_Pending] = deque()
        self._saved: dict[int, WrittenTexts] = {}
        """Written before this object was made, by number."""
        self._num_steps = 0
        self._num_taken = 0
        """Batches of prompts taken from the source."""
        self._num_handed_out = 0
        self._since_step = 0
        """Batches handed out since the last step."""
        self._num_rewritten = 0
        self._meter = OnPolicyMeter()

    def __next__(self) -> tuple[dict[str, Any], Targets]:
        while True:
            # What this step still needs, and what the weights of now may write for later steps.
            ahead = self._arguments.max_staleness * self._per_step
            rest = max(self._per_step - self._since_step, 1)
            while len(self._pending) < rest + ahead and self._write_next():
                pass
            if not self._pending:
                raise StopIteration
            pending = self._pending[0]
            if self._num_steps - pending.texts.version > self._arguments.max_staleness:
                self._num_rewritten += 1
                pending = self._pending[0] = self._write(pending.number, pending.prompts)
            targets = pending.targets.result()
            self._pending.popleft()
            self._num_handed_out += 1
            if targets is None:
                logger.warning("batch %d was left out: nothing is trained of it", pending.number)
                continue
            self._since_step += 1
            self._meter.add_training(pending.texts, self._num_steps - pending.texts.version)
            return pending.taken.batch, targets

    def step(self) -> None:
        """Notes that the optimizer has changed the weights."""
        self._num_steps += 1
        self._since_step = 0

    def take_logs(self) -> dict[str, float]:
        """Returns length, repetition, entropy, staleness and both speeds since the last time."""
        self._meter.add_scoring(*self._scorer.take_counts())
        logs = compute_logs(self._meter.take(), self._meter.max_staleness)
        return {**logs, "on_policy_rewritten": float(self._num_rewritten)}

    def state_dict(self) -> dict[str, Any]:
        """Returns where to resume, after a step: with what is written for later ones."""
        return {
            "handed_out": self._num_handed_out,
            "steps": self._num_steps,
            "since_step": self._since_step,
            "pending": {one.number: one.texts.to_tensors() for one in self._pending},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes there; skips the prompts of what was handed out.

        Raises TeacherError after the first batch was taken, InvalidRequest for another dict.
        """
        if self._source is not None:
            raise TeacherError("load_state_dict must be called before the first batch is taken")
        self._num_handed_out = self._num_taken = read_position(state)
        self._num_steps, self._since_step = int(state["steps"]), int(state["since_step"])
        self._saved = {
            int(number): WrittenTexts.of_tensors(tensors)
            for number, tensors in state["pending"].items()
        }

    def close(self) -> None:
        """Gives up what is in flight."""
        self._scorer.close()
        self._pending.clear()

    def _write_next(self) -> bool:
        """Writes the next batch; False if there are no prompts for one."""
        if self._source is None:
            self._source = islice(self._prompts, self._num_taken * self._batch_size, None)
        first = self._num_taken * self._batch_size
        prompts = [
            read_prompt(one, self._tokenizer, self._longest, f"prompt {first + place}")
            for place, one in enumerate(islice(self._source, self._batch_size))
        ]
        if len(prompts) < self._batch_size:
            return False
        self._pending.append(self._write(self._num_taken, prompts))
        self._num_taken += 1
        return True

    def _write(self, number: int, prompts: list[Tensor]) -> _Pending:
        texts = self._saved.pop(number, None)
        if texts is None or not texts.continues(prompts):
            name = f"batch {number} step {self._num_steps}"
            texts = self._writer.write(prompts, name=name, version=self._num_steps)
            self._meter.add_writing(texts)
        batch = texts.make_batch(self._writer.pad_id, self._writer.untrained, {})
        taken = Taken.of(batch, is_written=True)
        targets = self._scorer.ask(taken, texts, self._writer.untrained, self._options)
        return _Pending(number, prompts, texts, taken, targets)


def find_longest_prompt(
    arguments: OnPolicyArguments, teacher: Teacher, student: Any, view: TeacherView | None = None
) -> int:
    """Returns how long a prompt may be, so that teacher and student take the whole text.

    Raises ValueError if no prompt would leave room for the new tokens.
    """
    config: Any = getattr(student, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = {"the teacher": teacher.info.max_sequence_tokens}
    if view is not None and hasattr(view, "__len__"):
        limits["the teacher"] -= len(view)  # type: ignore[arg-type]
    if context := getattr(config, "max_position_embeddings", None):
        limits["the student"] = int(context)
    who = min(limits, key=lambda name: limits[name])
    longest = limits[who] - arguments.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens={arguments.max_new_tokens} leaves no room for a prompt: {who} takes "
            f"{limits[who]} tokens. Give less."
        )
    return longest

"""Measures students and their teacher on the held-out text."""

import logging
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from student_trainer.config import CorpusConfig
from student_trainer.errors import NotRecorded
from student_trainer.record.recorded import Recorded
from student_trainer.teachers.several import Teachers
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView
from student_trainer.training.corpus import Corpus
from student_trainer.training.evaluate import Collate, evaluate, evaluate_teacher
from student_trainer.training.results import Scores

logger = logging.getLogger(__name__)


def find_live(teacher: Teacher) -> Teacher | None:
    """Returns the teacher that a service answers for; None if there is only a record of it."""
    if isinstance(teacher, Recorded):
        return teacher.fallback
    return teacher.replace(find_live) if isinstance(teacher, Teachers) else teacher


def is_recorded(teacher: Teacher) -> bool:
    """Whether targets come from a record, or go into one."""
    return find_live(teacher) is not teacher


class HeldOut:
    """The held-out text, what the teacher makes of it, and what a student did last time."""

    def __init__(
        self,
        rows: Any,
        collate: Collate,
        best_ids: Tensor | None = None,
        teacher: Scores | None = None,
        unknown: str = "",
        num_ids: int | None = None,
    ) -> None:
        """rows, collate, best_ids, num_ids: as for `evaluate`. teacher: its scores; unknown: why some
        of them are not known."""
        self.rows = rows
        self.collate = collate
        self.num_ids = num_ids
        self.best_ids = best_ids
        self.teacher = teacher or Scores(loss=None)
        self.unknown = unknown
        self.last: Scores | None = None

    @classmethod
    def ask(
        cls,
        config: CorpusConfig,
        teacher: Teacher | None,
        corpus: Corpus,
        num_ids: int | None = None,
        view: TeacherView | None = None,
    ) -> Self:
        """Asks the teacher, as far as it can tell, about the text that it reads.

        Raises what `Teacher.stream_batches` does.
        """
        rows, collate = corpus.held_out, corpus.collate
        if teacher is None:
            return cls(rows, collate, unknown="no teacher was asked", num_ids=num_ids)
        if isinstance(teacher, Recorded) and not config.has_targets:
            recorded = {"targets": str(teacher.default_targets), "temperature": teacher.temperature}
            config = config.model_copy(update=recorded)
        if not is_recorded(teacher):
            scores, best_ids = evaluate_teacher(teacher, rows, collate=collate, view=view)
            return cls(rows, collate, best_ids, scores, num_ids=num_ids)
        try:
            scores, best_ids = evaluate_teacher(
                teacher,
                rows,
                collate=collate,
                targets=config.targets,
                temperature=config.temperature,
                seed=config.seed,
                view=view,
            )
        except NotRecorded:
            unknown = "the held-out text was not recorded"
            logger.warning("%s: the teacher's own loss is unknown", unknown)
            return cls(rows, collate, unknown=unknown, num_ids=num_ids)
        if None not in (scores.loss, scores.accuracy, scores.calibration_error):
            return cls(rows, collate, best_ids, scores, num_ids=num_ids)
        asked = find_live(teacher)
        if asked is not None:
            live, best_ids = evaluate_teacher(asked, rows, collate=collate, view=view)
            if scores.loss is not None:  # the same, whether there is a live teacher or not
                same = {"loss": scores.loss, "sequence_losses": scores.sequence_losses}
                live = live.model_copy(update=same)
            return cls(rows, collate, best_ids, live, num_ids=num_ids)
        found = f"the record holds {config.targets} at temperature {config.temperature:g}"
        unknown = f"{found}, which does not tell it; with --teacher too, the teacher is asked"
        return cls(rows, collate, best_ids, scores, unknown, num_ids)

    def measure(
        self,
        student: nn.Module,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        add_up: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Scores:
        """Measures a student on the text, beside the teacher; with several ranks as `evaluate` does."""
        self.last = evaluate(
            student,
            self.rows,
            self.best_ids,
            collate=self.collate,
            batch_size=batch_size,
            num_ids=self.num_ids,
            rank=rank,
            num_ranks=num_ranks,
            add_up=add_up,
        )
        return self.last

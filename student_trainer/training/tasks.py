"""Measures students and their teacher on tasks of lm-eval (EleutherAI's lm-evaluation-harness)."""

import copy
import difflib
import io
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import nn

from logitstream.extras import check_installed
from logitstream.logs import first_line
from student_trainer.errors import TeacherError
from student_trainer.teachers.teacher import Teacher
from student_trainer.training.results import TaskScore, TaskScores

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

logger = logging.getLogger(__name__)

OPTION = "--eval-tasks"
SCORING = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""What lm-eval calls the tasks that score given texts."""
REHEARSED = 2
"""Documents of each task: the fewest that have a standard error."""
BOOTSTRAP_DRAWS = 1000
"""For standard errors without a formula; they are then right to about 2 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Holds tasks with their data sets; `load` makes one, and without tasks it measures nothing."""

    loaded: "TaskDict | None"
    tokenizer: Any
    limit: int | None
    """Documents of each task at most."""

    @classmethod
    def load(cls, names: Sequence[str], tokenizer: Any, *, limit: int | None = None) -> Self:
        """Loads tasks and their data sets, so that nothing is missing when they are run.

        names: as --eval-tasks takes them. tokenizer: of the student. Raises ValueError for a task
        that does not exist, that cannot be loaded or that a teacher cannot be measured on.
        """
        if not names:
            return cls(None, tokenizer, limit)
        check_installed("eval", "lm_eval")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"{OPTION} needs a student whose tokenizer has a BOS or EOS token, to put before texts"
            )
        return cls(_load_tasks(names), tokenizer, limit)

    def measure(self, student: nn.Module, label: str, *, batch_size: int) -> TaskScores:
        """Measures a student; label: what the log calls it. Every rank measures all of it."""
        if self.loaded is None:
            return {}
        from lm_eval.models.huggingface import HFLM

        # HFLM gives its tokenizer a padding token if it has none.
        tokenizer = copy.deepcopy(self.tokenizer)
        make: Any = HFLM  # its decorator hides its arguments
        was_training = student.training
        try:
            with _quietly():
                lm = make(pretrained=student, tokenizer=tokenizer, batch_size=batch_size)
            return _log(self._run(lm, self.limit), label)
        finally:
            student.train(was_training)

    def measure_teacher(self, teacher: Teacher | None) -> TaskScores:
        """Measures the teacher as it is served; None: there is only a record of it.

        Raises what `Teacher.stream_batches` does.
        """
        if self.loaded is None or teacher is None:
            return {}
        from student_trainer.training.teacher_lm import TeacherLM

        return _log(self._run(TeacherLM(teacher, self.tokenizer), self.limit), "teacher")

    def rehearse(self, teacher: Teacher | None) -> None:
        """Measures the teacher on the first documents, so that what fails does so before a training.

        Raises what `Teacher.stream_batches` does, and ValueError for tasks that cannot be measured.
        """
        if self.loaded is None or teacher is None:
            return
        from student_trainer.training.teacher_lm import TeacherLM

        try:
            self._run(TeacherLM(teacher, self.tokenizer), REHEARSED)
        except TeacherError:
            raise
        except Exception as error:  # of other people's code
            raise ValueError(
                f"{OPTION}: measuring the teacher on the first documents failed: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    def _run(self, lm: "LM", limit: int | None) -> TaskScores:
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        assert self.loaded is not None
        for task in self.loaded["tasks"].values():  # every model gets the same examples
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with _quietly():
            found: Any = evaluate(
                lm=lm,
                task_dict=self.loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
            )
        read = {
            name: _read_scores(metrics, found["higher_is_better"].get(name, {}))
            for name, metrics in found["results"].items()
        }
        return {name: scores for name, scores in read.items() if scores}  # not every group has any


def _load_tasks(names: Sequence[str]) -> "TaskDict":
    paths = [_resolve(name) for name in names if _is_path(name)]
    manager = _make_manager(tuple(path for path in paths if path.is_dir()))
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(known for one in names for known in _find(one, manager)):
        entry = manager.task_index.get(name)
        if entry is not None and entry.cfg is not None and "output_type" in entry.cfg:
            _check_output_type(name, entry.cfg["output_type"])
        try:
            with _quietly():
                found = manager.load([name])
        except Exception as error:  # a task is made of other people's code
            raise ValueError(
                f"{OPTION}: the task {name} cannot be loaded: {type(error).__name__}: "
                f"{first_line(error)}. The data set of a task is fetched when the run starts, unless "
                "it is in the cache of this machine (HF_HOME) or the task names local files"
            ) from error
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found["groups"]  # type: ignore[typeddict-item]
        loaded["group_map"] |= found["group_map"]  # type: ignore[typeddict-item]
    for name, task in loaded["tasks"].items():
        _check_output_type(name, task.OUTPUT_TYPE)
        for flag, what in (("MULTIMODAL", "has images or sound"), ("UNSAFE_CODE", "runs code")):
            if getattr(task, flag, False):
                raise ValueError(f"{OPTION}: the task {name} {what}, which is not supported here")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith((".yaml", ".yml")) or name in (".", "..")


def _resolve(name: str) -> Path:
    return Path(name).expanduser().resolve()


@cache
def _make_manager(folders: tuple[Path, ...]) -> "TaskManager":
    """Reads the task files of lm-eval and of these folders, which takes seconds."""
    from lm_eval.tasks import TaskManager

    with _quietly():
        return TaskManager(include_path=[*folders])


def _find(name: str, manager: "TaskManager") -> list[str]:
    """Returns what a name of --eval-tasks stands for: names that the manager knows, or a file.

    Raises ValueError if there is no such task.
    """
    path = _resolve(name)
    if _is_path(name) and path.is_file():
        return [str(path)]
    if _is_path(name):
        found = [
            known
            for known, entry in manager.task_index.items()
            if entry.yaml_path is not None and entry.yaml_path.is_relative_to(path)
        ]
        what = "has no task file (*.yaml)" if path.is_dir() else "is neither a file nor a folder"
        problem = f"{path} {what}"
    else:
        found = manager.match_tasks([name])
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f" (similar: {', '.join(near)})" if near else ""
        problem = f"lm-eval has no task {name!r}{hint}; one of your own is given by its path"
    if not found:
        raise ValueError(f"{OPTION}: {problem}")
    return found


def _check_output_type(name: str, output_type: str | None) -> None:
    if output_type not in SCORING:
        raise ValueError(
            f"{OPTION}: the task {name} lets a model generate text (output_type {output_type}), and a "
            f"served teacher only scores: give tasks of output_type {', '.join(SCORING)}"
        )


def _read_scores(
    metrics: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]
) -> dict[str, TaskScore]:
    """Reads what lm-eval says of one task: numbers under "metric,filter", and texts."""
    scores = {}
    for key, value in metrics.items():
        metric, has_filter, filter_name = key.partition(",")
        if not has_filter or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = metrics.get(f"{metric}_stderr,{filter_name}")
        scores[metric if filter_name == "none" else key] = TaskScore(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, Real) else None,
            higher_is_better=higher_is_better.get(metric),
        )
    return scores


def _log(found: TaskScores, label: str) -> TaskScores:
    for task, scores in found.items():
        told = ", ".join(f"{metric} {score.value:.4g}" for metric, score in scores.items())
        logger.info("%s on the task %s: %s", label, task, told)
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Hides what lm-eval prints and logs, and leaves the random numbers of the run as they were.

    Inside, random numbers are those of lm-eval's own command. Modules are loaded outside: a handler
    of logging writes for ever to the stderr that it was made with.
    """
    # A standard error by bootstrap would fork, and gRPC does not survive that.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    lm_eval_logger = logging.getLogger("lm_eval")
    level, states = lm_eval_logger.level, (random.getstate(), np.random.get_state())
    lm_eval_logger.setLevel(logging.ERROR)
    random.seed(0)
    np.random.seed(1234)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        lm_eval_logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])

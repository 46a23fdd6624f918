"""What one training left behind in its folder: all that a report of it, made later, needs.

results.json is written once, when the training has ended; `report.py` reads one or several.
"""

import sys
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from student_trainer.disk import put

FILE_NAME = "results.json"
FORMAT = 1
MOST = 1e12
"""Nothing that is counted or timed here comes near it."""
SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("sequence_length", "batch_size", "steps", "seed"), (int,)),
    **dict.fromkeys(("learning_rate", "temperature"), (int, float)),
    **dict.fromkeys(("kd_weight", "ce_weight"), (int, float, str)),
    **dict.fromkeys(("targets", "optimizer"), (str,)),
}
"""Those that a report shows."""


class _Part(BaseModel):
    # A loss that is not a number is written as "NaN": it has to be told, not lost.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


class Bin(_Part):
    """The rows whose likeliest token got a probability of one tenth of 0 to 1."""

    count: int
    """Rows; at least 1."""
    confidence: float
    """Mean probability of the likeliest token."""
    accuracy: float
    """How often that was the next token."""


class Scores(_Part):
    """One model on the held-out text. None, or an empty list: it could not be known."""

    loss: float | None
    """Mean cross-entropy of the next token, in nats."""
    sequence_losses: list[float] = []
    """The same of each held-out sequence."""
    accuracy: float | None = None
    """How often the likeliest token was the next one."""
    calibration_error: float | None = None
    """Expected calibration error: mean over the rows of |confidence - accuracy| of their bin."""
    bins: list[Bin] = []
    """Those that are not empty, in ascending order."""
    top1_agreement: float | None = None
    """How often the likeliest token was the teacher's; of a student."""
    agreement_rows: int = 0
    """Rows whose likeliest token the teacher told."""


class TaskScore(_Part):
    """One metric of one task of lm-eval."""

    value: float
    stderr: float | None = None
    """None for a metric that lm-eval knows no standard error of."""
    higher_is_better: bool | None = None
    """None if the task does not say."""


TaskScores = dict[str, dict[str, TaskScore]]
"""By task or group, and by metric: "acc"; "exact_match,strict" for one behind a filter."""


class StudentResults(_Part):
    """One student that was trained, and how."""

    seconds: float
    """In the steps, without the measurements."""
    waiting_s: float
    tokens: int
    """Trained rows."""
    history: list[dict[str, float]]
    """At every logged step: step, tokens, seconds, loss, tokens_per_s, waiting_fraction, ..."""
    measurements: list[dict[str, float]]
    """About ten: step, tokens, seconds, held_out_loss and what else was measured then."""
    scores: Scores
    """At the end."""
    tasks: TaskScores = {}
    """Of --eval-tasks, at the end."""


class TeacherResults(_Part):
    """Who the teacher was, and what could be learnt of it on the held-out text."""

    model: str
    revision: str
    license: str | None
    """As its model card says; None if it has none that can be read here."""
    weights_fingerprint: str
    teacher_fingerprint: str
    precision: str = ""
    """Its dtype, and how its linear layers were quantised; empty if it is not known."""
    vocab_size: int
    scores: Scores
    unknown: str = ""
    """Why some of the scores could not be known."""
    tasks: TaskScores = {}
    """Of --eval-tasks; empty for a teacher that is only recorded."""


class WrittenResults(_Part):
    """Data that a teacher wrote: who, how, and what it is like. None: it could not be known."""

    folder: str
    teacher: str
    revision: str
    teacher_fingerprint: str
    weights_fingerprint: str
    vocab_size: int
    targets: str
    """Those that were stored: "none" if there are none."""
    target_temperature: float
    settings: list[dict[str, Any]]
    """How the texts were drawn; several, if they were written with different settings."""
    texts: int
    prompts: int
    prompt_tokens: int
    tokens: int
    """Written after the prompts."""
    mean_tokens: float
    longest: int
    """Tokens of a text with its prompt."""
    finish: dict[str, int]
    """Texts by how they ended."""
    repetition: float
    """Share of runs of four tokens that were in the same text before, mean over the texts."""
    entropy: float | None
    """Of the distributions that tokens were drawn from, in nats; mean over the tokens."""
    nats: float | None
    """The teacher's loss on what it wrote."""
    bytes_per_token: float
    tokens_per_s: float | None
    """As it was written."""


class Results(_Part):
    """One run of `student-trainer train`."""

    format: Literal[1] = FORMAT
    settings: dict[str, Any]
    """All of TrainConfig."""
    data_digest: str
    held_out_digest: str
    held_out_sequences: int
    student_parameters: int
    student_architecture: str
    student_license: str | None
    """Of the weights that it started from, as their model card says."""
    starts_from_weights: bool
    bytes_per_token: float | None
    """Of the distilled student's targets, as they are sent and stored."""
    versions: dict[str, str]
    """Of the packages that decide the numbers."""
    finished: str
    """UTC, ISO 8601."""
    teacher: TeacherResults
    students: dict[str, StudentResults]
    """By name: distilled, and control and shuffled if they were asked for."""
    written: list[WrittenResults] = []
    """The parts of the data that a teacher wrote."""

    def save(self, folder: Path) -> Path:
        """Writes results.json into the folder, whole or not at all. Raises NotWritten."""
        return put(folder / FILE_NAME, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote. Raises ValueError that names what is missing or damaged."""
        path = folder / FILE_NAME
        if not path.is_file():
            what = "is not a folder" if not folder.is_dir() else f"has no {FILE_NAME}"
            raise ValueError(
                f"{folder} {what}: give the --output folder of a training that has ended. One that "
                "was stopped goes on with the same student-trainer train."
            )
        try:
            found = cls.model_validate_json(path.read_bytes())
            problem = _problem(found)
        except ValidationError as error:
            first = error.errors()[0]
            found, problem = None, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        if found is None or problem:
            raise ValueError(
                f"{path} is damaged, or of another version ({problem}). Run "
                "student-trainer train again: with checkpoints it only measures and writes."
            )
        return found


def _problem(results: Results) -> str | None:
    """Why a report cannot show what was read, although its form is right."""
    if "distilled" not in results.students:
        return "it has no distilled student"
    for name, kinds in SETTINGS.items():
        value: Any = results.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"settings.{name} is missing, or of another type"
        most = (1 << 64) if kinds == (int,) else sys.float_info.max
        if not isinstance(value, str) and not 0 <= value <= most:
            return f"settings.{name} is impossible"
    if not isinstance(results.settings.get("training", {}), dict):
        return "settings.training is of another type"
    students = list(results.students.values())
    scores = [results.teacher.scores, *(student.scores for student in students)]
    if len({len(one.sequence_losses) for one in scores if one.loss is not None}) > 1:
        return "not all losses are of the same sequences"
    counts = [results.held_out_sequences, results.student_parameters, results.teacher.vocab_size]
    counts += [bin.count for one in scores for bin in one.bins]
    for student in students:
        counts.append(student.tokens)
        for needed, entries in (
            ("waiting_fraction", student.history),
            ("held_out_loss", student.measurements),
        ):
            if not all({"step", "seconds", needed} <= entry.keys() for entry in entries):
                return f"an entry of a student lacks step, seconds or {needed}"
        entries = [*student.history, *student.measurements]
        counts += [entry[name] for entry in entries for name in ("step", "seconds")]
        counts += [student.seconds, student.waiting_s]
    return None if all(0 <= one < MOST for one in counts) else "a count or a time is impossible"

"""Results of runs that nobody trained, with losses as a test wants them."""

import math
import random
from collections.abc import Sequence
from typing import Any

from student_trainer.config import TrainConfig
from student_trainer.training.results import (
    Bin,
    Results,
    Scores,
    StudentResults,
    TaskScore,
    TaskScores,
    TeacherResults,
)

NUM_SEQUENCES = 64
STEPS = 100


def make_results(
    *,
    teacher: float | None = 3.0,
    distilled: float = 3.4,
    control: float | None = 4.0,
    shuffled: float | None = None,
    seed: int = 0,
    noise: float = 0.05,
    unknown: str = "",
    waiting: float = 0.02,
    agreement: float = 0.61,
    settings: dict[str, Any] | None = None,
    tasks: bool = False,
    **more: Any,
) -> Results:
    """noise: standard deviation of one student's loss of a sequence, around what all share. tasks:
    whether teacher and students were measured on tasks."""
    config = TrainConfig(
        student="student",  # type: ignore[arg-type]
        data=["text"],
        output="runs/one",  # type: ignore[arg-type]
        teacher="127.0.0.1:1",
        steps=STEPS,
        batch_size=4,
        sequence_length=16,
        seed=seed,
        **(settings or {}),
    )
    final = {"distilled": distilled, "control": control, "shuffled": shuffled}
    return Results(
        **{
            "settings": config.model_dump(mode="json"),
            "data_digest": "d" * 32,
            "held_out_digest": "e" * 32,
            "held_out_sequences": NUM_SEQUENCES,
            "student_parameters": 1_234_567,
            "student_architecture": "Gemma2ForCausalLM",
            "student_license": None,
            "starts_from_weights": False,
            "bytes_per_token": 31.25,
            "versions": {"logitstream": "0.1.0", "torch": "2.9"},
            "finished": "2026-01-01T00:00:00+00:00",
            "teacher": TeacherResults(
                model="big",
                revision="",
                license=None,
                weights_fingerprint="f" * 64,
                teacher_fingerprint="a" * 64,
                precision="bfloat16, quantised with torchao-int8 0.18.0",
                vocab_size=1024,
                scores=make_scores(teacher, "teacher", seed, noise),
                unknown=unknown,
                tasks=make_tasks(teacher) if tasks else {},
            ),
            "students": {
                name: _student(
                    *(loss, name, seed, noise, waiting if name == "distilled" else 0.0),
                    agreement={"distilled": agreement, "control": 0.48, "shuffled": 0.2}[name],
                ).model_copy(update={"tasks": make_tasks(loss) if tasks else {}})
                for name, loss in final.items()
                if loss is not None
            },
            **more,
        }
    )


def make_tasks(loss: float | None) -> TaskScores:
    if loss is None:
        return {}
    return {
        "sciq": {
            "acc": TaskScore(value=1 - loss / 10, stderr=0.013, higher_is_better=True),
            "acc_norm": TaskScore(value=1 - loss / 9, stderr=0.012, higher_is_better=True),
        },
        "wikitext": {"word_perplexity": TaskScore(value=math.exp(loss), higher_is_better=False)},
    }


def make_scores(
    loss: float | None, who: str, seed: int, noise: float, agreement: float | None = None
) -> Scores:
    if loss is None:
        return Scores(loss=None)
    # What is hard about a sequence is hard for all; a tenth of that is how they differ.
    shared, own = random.Random(seed), random.Random(f"{who} {seed}")
    around = [shared.gauss(0, 1) + own.gauss(0, noise) for _ in range(NUM_SEQUENCES)]
    mean = sum(around) / len(around)
    return Scores(
        loss=loss,
        sequence_losses=[loss + one - mean for one in around],
        accuracy=math.exp(-loss) if math.isfinite(loss) else 0.0,
        calibration_error=0.031 if who == "teacher" else 0.052,
        bins=[
            Bin(count=500, confidence=0.07, accuracy=0.05),
            Bin(count=300, confidence=0.34, accuracy=0.31),
            Bin(count=160, confidence=0.86, accuracy=0.79),
        ],
        top1_agreement=agreement,
        agreement_rows=NUM_SEQUENCES * 15 if agreement is not None else 0,
    )


def _student(
    loss: float, name: str, seed: int, noise: float, waiting: float, agreement: float
) -> StudentResults:
    seconds = 12.0 if name == "control" else 14.0
    rows = 4 * 15
    at = [
        {"step": step, "tokens": step * rows, "seconds": seconds * step / STEPS}
        for step in range(10, STEPS + 1, 10)
    ]
    return StudentResults(
        seconds=seconds,
        waiting_s=waiting * seconds,
        tokens=STEPS * rows,
        history=[
            {
                **one,
                "loss": loss + 1,
                "waiting_fraction": waiting * (1 + math.sin(one["step"] + seed)),
                "tokens_per_s": 500.0,
            }
            for one in at
        ],
        measurements=[
            {
                **one,
                "held_out_loss": loss + 2.5 * math.exp(-one["step"] / 25) - 2.5 * math.exp(-4),
                "held_out_top1_agreement": agreement * (1 - math.exp(-one["step"] / 30)),
            }
            for one in at
        ],
        scores=make_scores(loss, name, seed, noise, agreement),
    )


def seeds(gains: Sequence[float], **more: Any) -> dict[str, Results]:
    """One run per gain."""
    return {
        f"runs/seed-{seed}": make_results(
            seed=seed, distilled=4.0 - gain, control=4.0, **{"noise": 0.02, **more}
        )
        for seed, gain in enumerate(gains)
    }

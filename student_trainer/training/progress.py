"""Counts the tokens and seconds of a training, and shows how it gets on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import Tensor
from tqdm import tqdm

HELD_OUT = {
    "eval_loss": "held_out_loss",
    "eval_accuracy": "held_out_accuracy",
    "eval_top1_agreement": "held_out_top1_agreement",
}
"""Maps what the Trainer calls a measurement to what a report calls it."""


@dataclass(slots=True)
class Counts:
    """Counts since the first step of a training, however often it was resumed."""

    tokens: int = 0
    """Trained rows."""
    seconds: float = 0.0
    """In the steps, without measurements and checkpoints."""
    waiting_s: float = 0.0
    """Of those, waiting for targets."""


class Progress(transformers.TrainerCallback):
    """Follows the steps of one student's training."""

    def __init__(self, label: str, say: Callable[[str], None] | None = None) -> None:
        """say: prints a line of text for each log, instead of a progress bar."""
        self.counts = Counts()
        self._label = label
        self._say = say
        self._bar: tqdm[Any] | None = None
        self._began_s = 0.0
        self._logged = Counts()
        self._pending: list[Tensor | int] = []
        """Trained rows of the steps since the last log; those of a device are not waited for."""

    def resume(self, counts: Counts) -> None:
        """Goes on counting from a checkpoint."""
        self.counts, self._logged = counts, replace(counts)

    def begin_step(self, began_s: float, num_rows: Tensor | int | None, waited_s: float) -> None:
        """Notes when a step began, as time.perf_counter(), its trained rows and its wait for targets."""
        self._began_s = began_s
        self.counts.waiting_s += waited_s
        self._pending.append(0 if num_rows is None else num_rows)

    def add_to(self, logs: dict[str, float]) -> dict[str, float]:
        """Returns the logs with tokens, seconds and rates since the last time."""
        self.count()
        counts, before = self.counts, self._logged
        seconds = max(counts.seconds - before.seconds, 1e-9)
        self._logged = replace(counts)
        return {
            **logs,
            "tokens": counts.tokens,
            "seconds": counts.seconds,
            "tokens_per_s": (counts.tokens - before.tokens) / seconds,
            "waiting_fraction": (counts.waiting_s - before.waiting_s) / seconds,
        }

    def count(self) -> None:
        """Brings the counts up to date; waits for the device."""
        self.counts.tokens += int(sum(int(rows) for rows in self._pending))
        self._pending.clear()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown = state.is_world_process_zero and self._say is None
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._label,
            unit=" steps",
            disable=not shown,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.seconds += time.perf_counter() - self._began_s
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        line = (
            f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:,.0f} tokens/s, "
            f"waiting {logs['waiting_fraction']:.1%}"
        )
        if self._say is not None:
            self._say(f"{self._label}: step {state.global_step} of {state.max_steps}, {line}")
        elif self._bar is not None:
            self._bar.set_postfix_str(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the progress bar as it is."""
        if self._bar is not None:
            self._bar.close()


def read_history(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Returns what was logged of the steps, from a TrainerState."""
    return [_numbers(entry) for entry in log_history if "loss" in entry]


def read_measurements(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Returns what was measured on the held-out text, from a TrainerState."""
    return [
        {HELD_OUT.get(name, name): value for name, value in _numbers(entry).items()}
        for entry in log_history
        if "eval_loss" in entry
    ]


def _numbers(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if isinstance(value, int | float)}

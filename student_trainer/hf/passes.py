"""Takes the batches of each pass over a Trainer's data early, together with their targets.

Ranks that read from one loader, or that may run out of data at different times, agree here on how
many batches each of them takes.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import IterableDataset

from logit_codec import Targets
from student_trainer.hf.arguments import DistillationArguments
from student_trainer.teachers.batch_targets import BatchTargets, Taken
from student_trainer.teachers.request import ScoreOptions
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView
from student_trainer.transfer import move_tensors

logger = logging.getLogger(__name__)

TakenTargets = tuple[Taken, Targets | None, Targets | None]
"""A batch, its targets and, if they are wanted, the states of the teacher's layers; without either
where nothing is trained."""


class Passes:
    """The passes of one Trainer over its training data, one after another."""

    def __init__(
        self,
        trainer: transformers.Trainer,
        teacher: Teacher,
        arguments: DistillationArguments,
        view: TeacherView | None = None,
    ) -> None:
        self._trainer = trainer
        self._teacher = teacher
        self._arguments = arguments
        self._view = view
        self._number = -1
        """Of the current pass: the epoch of its draws."""
        self._epoch_iterator: Iterator[Any] | None = None
        """The Trainer's iterator over the current pass; a new one begins a new pass."""
        self._ahead: BatchTargets | None = None
        self._features: BatchTargets | None = None
        """Of the same batches: the states of the teacher's layers, if they are wanted."""
        self._may_end_apart = False
        """Whether ranks may have unequal numbers of batches."""
        self._state = "new"
        """Of a pass that may end apart: new, begun or ended."""
        self.loading_s = 0.0
        """Time spent waiting for the loader, in all passes."""

    @property
    def in_flight(self) -> int | None:
        """Batches that were asked for and not taken; None between passes."""
        return None if self._ahead is None else self._ahead.in_flight

    def start_at(self, number: int) -> None:
        """Makes the next pass the one with this number, from 0: a Trainer may resume."""
        self._number = number - 1

    def take(self, epoch_iterator: Iterator[Any], count: int) -> list[TakenTargets]:
        """Returns the next batches of a pass, as many on all ranks; fewer than `count` at its end."""
        if epoch_iterator is not self._epoch_iterator or self._ahead is None:
            self.close()
            self._epoch_iterator, self._state = epoch_iterator, "new"
            self._begin(epoch_iterator)
        if self._ahead is None or self._state == "ended":
            return []
        taken: list[TakenTargets] = [(*pair, None) for pair in self._ahead.take(count)]
        if self._features is not None:
            features = self._features.take(count)
            taken = [
                (batch, targets, states)
                for (batch, targets, _), (_, states) in zip(taken, features, strict=True)
            ]
        return taken[: self._find_shortest(len(taken), count)] if self._may_end_apart else taken

    def close(self) -> None:
        """Gives up what is in flight."""
        self._close_streams()
        self._ahead, self._features, self._epoch_iterator = None, None, None

    def _close_streams(self) -> None:
        for stream in (self._ahead, self._features):
            if stream is not None:
                stream.close()

    def _begin(self, epoch_iterator: Iterator[Any]) -> None:
        args, state = self._trainer.args, self._trainer.state
        self._number += 1
        loader: Any = self._trainer.callback_handler.train_dataloader
        several, alone = args.world_size > 1, isinstance(loader, DataLoaderShard)
        # A loader of unknown kind may do something with all ranks for each batch, as a dispatcher does.
        together = several and not alone
        # With data in shards, some ranks may reach the end of theirs before the others.
        is_even = isinstance(loader, DataLoaderDispatcher) or (alone and not _is_iterable(loader))
        self._may_end_apart = several and not is_even
        # No more than the run will use: targets after max_steps would be made for nothing.
        most = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
        batches = self._load(itertools.islice(epoch_iterator, most), together)
        arguments = self._arguments

        def open_stream(batches: Iterator[Any], options: ScoreOptions) -> BatchTargets:
            return BatchTargets(
                batches,
                self._teacher,
                options,
                arguments.look_ahead,
                agree=self._agree if together else None,
                view=self._view,
            )

        if arguments.features:
            batches, again = itertools.tee(batches)
            options = arguments.make_feature_request(args.seed, self._number)
            self._features = open_stream(again, options)
        self._ahead = open_stream(batches, arguments.make_request(args.seed, self._number))

    def _load(self, batches: Iterator[Any], together: bool) -> Iterator[Any]:
        """Yields the batches on the host, where they stay until they are trained; measures the time."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is not None and together:
                # A dispatcher leaves them on the device, as views of what it sent to all ranks.
                batch = move_tensors(batch, lambda tensor: tensor.to("cpu", copy=True))
            self.loading_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _agree(self, wanted: int, room: int) -> tuple[int, int]:
        numbers = self._gather(wanted, room)
        return max(wanted for wanted, _ in numbers), min(room for _, room in numbers)

    def _gather(self, *numbers: int) -> list[list[int]]:
        """Returns the numbers of each rank. Every rank has to call this."""
        own = torch.tensor([numbers], device=self._trainer.args.device)
        return self._trainer.accelerator.gather(own).tolist()  # type: ignore[union-attr]

    def _find_shortest(self, count: int, num_batches: int) -> int:
        """Returns how many batches of a step all ranks have; this one has `count`.

        Where a rank has fewer than the step needs, the pass ends for all: a step is taken together.
        Raises ValueError if a rank had none at all.
        """
        counts = [of_rank for (of_rank,) in self._gather(count)]
        shortest, rank = min(counts), counts.index(min(counts))
        if not shortest and max(counts) and self._state == "new":
            raise ValueError(
                f"rank {rank} got no batch of the training data, and others did: the data set has too "
                "few shards, or empty ones. Set dispatch_batches=True in accelerator_config: then one "
                "rank reads, and sends each of the others its part."
            )
        self._state = "begun" if shortest == num_batches else "ended"
        if self._state == "ended":
            # What this rank has left over is never trained: no other rank has batches for the step.
            self._close_streams()
            if shortest < max(counts):
                logger.warning(
                    "the data of rank %d has ended, so the pass ends for all ranks", rank
                )
        return shortest


def _is_iterable(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), IterableDataset)

"""Defines `Teacher`, which served, local and recorded teachers implement."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import Tensor

from logit_codec import HiddenTargets, IdTable, Targets, TargetSpec, TeacherHead
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, InvalidRequest, TeacherError
from student_trainer.teachers.generation import GenerateOptions, Generation
from student_trainer.teachers.look_ahead import LookAhead, make_look_ahead
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.stream import (
    Assign,
    GiveIds,
    Join,
    TargetStream,
    ask_as_they_are,
    stream_loader,
    stream_sequences,
)
from student_trainer.teachers.view import TeacherView
from student_trainer.teachers.writing import Writer, make_generate_options, write_texts

NO_HEAD = "use top_k or sampled targets"


class Teacher(ABC):
    """Gives targets: a service, a model in this process, or a record; a context manager."""

    default_ahead: int = 16
    """Default for the sequences in flight in `stream`."""
    default_look_ahead: int | str = "30s"
    """Default for the look-ahead of `stream_batches`."""
    default_targets: str | TargetSpec = "sampled"
    has_one_kind: ClassVar[bool] = False
    """Whether everything that is asked for must have the same spec, as in a record."""
    who_writes: ClassVar[str] = "the teacher that connect(address) returns, or LocalTeacher"
    """For the error of a teacher that cannot write texts: what can."""
    is_remote: ClassVar[bool] = False
    """Whether answers come from another process: then it may be asked in any thread, and does not
    compete with whoever asks."""
    id_tables: Sequence[IdTable] = ()
    """What payloads may be coded with, beside the built-in identity."""
    tokenizer: Any = None
    """For the text in errors, where one was given."""

    @property
    @abstractmethod
    def info(self) -> teacher_pb2.TeacherInfo:
        """Who the teacher is, as its Describe answers."""

    @abstractmethod
    def submit(self, piece: Piece, options: ScoreOptions) -> "Future[Answer]":
        """Asks for the targets of some rows of one sequence."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is in flight and releases what the teacher holds."""

    @abstractmethod
    def check_usable(self) -> None:
        """Raises TeacherError if the teacher is closed, or was made in another process."""

    def head(self) -> TeacherHead:
        """Returns the teacher's vocabulary head, for targets of kind `hidden`. Raises TeacherError."""
        raise TeacherError(f"this teacher has no vocabulary head to give: {NO_HEAD}")

    def _assigner(self, options: ScoreOptions) -> Assign:
        """Returns what says how each item is asked for, and how its answers are joined."""
        if not options.spec.needs_hidden:
            return ask_as_they_are
        head = self.head()

        def join(parts: list[Targets]) -> Targets:
            targets = Targets.cat(parts)
            assert isinstance(targets, HiddenTargets)
            return targets.with_head(head)

        def assign(
            batch: Mapping[str, Any] | None, pieces: dict[str, Piece]
        ) -> tuple[dict[str, Piece], Join]:
            return pieces, join

        return assign

    def make_options(
        self, targets: str | TargetSpec | None, temperature: float, seed: int, epoch: int
    ) -> ScoreOptions:
        """Makes the options of a stream. Raises InvalidRequest for what no teacher accepts."""
        return ScoreOptions.of(targets or self.default_targets, temperature, seed, epoch)

    def stream(
        self,
        sequences: Iterable[Any],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | None = None,
        interactive: bool = False,
        given_ids: Iterable[Any] | None = None,
    ) -> TargetStream[Tensor]:
        """Yields (token_ids, targets) of each sequence, in order, with `ahead` in flight.

        token_ids: (L,) int64; targets: L-1 rows, row i is the teacher's distribution of token i+1.
        targets and ahead: by default `default_targets` and `default_ahead` of the teacher.
        interactive: a person waits for the answers, so a service scores them before the team's other
        work and, while the team uses less than its share, before the work of other teams. given_ids:
        for targets="given_ids", the ids whose logprobs are wanted: for each sequence (L-1, m) int64,
        where -1 fills a row up, or a pair of row splits and ids. Raises InvalidRequest for what the
        teacher refuses, TeacherUnavailable after the patience.
        """
        self.check_usable()
        options = self.make_options(targets, temperature, seed, epoch)
        options = replace(options, interactive=interactive)
        ahead = self.default_ahead if ahead is None else ahead
        return stream_sequences(
            self.submit,
            sequences,
            options,
            ahead,
            self.check_usable,
            given_ids=given_ids,
            assign=self._assigner(options),
        )

    def stream_batches(
        self,
        loader: Iterable[Mapping[str, Any]],
        *,
        targets: str | TargetSpec | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        ahead: int | str | LookAhead | None = None,
        given_ids: GiveIds | None = None,
        teacher_view: TeacherView | None = None,
    ) -> TargetStream[Any]:
        """Yields (batch, targets) of each batch of a loader, in order.

        A batch is a mapping with input_ids and, if it is padded, packed or masked, attention_mask,
        position_ids, cu_seq_lens_q, seq_idx or labels (`Layout.of`); it is returned unchanged. The
        rows of `targets` are its trained positions in reading order. A number under "epoch" in a batch
        overrides `epoch`. ahead: batches in flight, or "30s" for as many as the trainer consumes in
        that time, with at most 512 MiB of batches and targets ("30s,2048MiB": at most 2 GiB), or a
        LookAhead; by default `default_look_ahead`. given_ids: for targets="given_ids", a function of
        the batch that returns (R, m) ids for its trained positions, as for `stream`. teacher_view:
        shows the teacher another text with the same trained tokens, see `TeacherView`: a function of the
        ids of a sequence and the columns of its row of the batch. Raises InvalidRequest for a view
        whose tokens are not the student's.
        """
        self.check_usable()
        if given_ids is not None and not callable(given_ids):
            raise InvalidRequest(
                "given_ids of stream_batches is a function of the batch, such as lambda batch: ids, "
                f"since batches are asked for one after another; got {type(given_ids).__name__}"
            )
        options = self.make_options(targets, temperature, seed, epoch)
        ahead = self.default_look_ahead if ahead is None else ahead
        look_ahead = make_look_ahead(ahead, options.spec, self.info)
        return stream_loader(
            self.submit,
            loader,
            options,
            look_ahead,
            self.check_usable,
            given_ids=given_ids,
            view=teacher_view,
            tokenizer=self.tokenizer,
            assign=self._assigner(options),
        )

    def compute_logprobs(self, token_ids: Any, *, temperature: float = 1.0) -> Tensor:
        """Returns (L-1,) float32: the teacher's logprob of each token but the first of a sequence.

        Raises what `stream` raises.
        """
        stream = self.stream(
            [token_ids], targets="realized", temperature=temperature, ahead=1, interactive=True
        )
        _, targets = next(stream)
        assert targets.realized_logprob is not None
        return targets.realized_logprob

    def generate(
        self,
        prompts: Iterable[Any],
        *,
        targets: str | TargetSpec | None = "sampled",
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        epoch: int = 0,
        stop_ids: Iterable[int] = (),
        stop_strings: Iterable[str] = (),
        num_samples: int = 1,
        as_finished: bool = False,
        ahead: int = 16,
        target_temperature: float = 0.0,
        ignore_teacher_stop_ids: bool = False,
    ) -> Generator[Generation, None, None]:
        """Yields texts that the teacher writes after prompts, each with the targets of its tokens.

        prompts: sequences of token ids; an iterator is pulled as texts are handed out, so that `ahead` of
        them are in flight. targets: the kind of what is kept of each new token's distribution, before
        temperature 0, top_k and top_p change what is drawn from it; None for texts alone. temperature:
        0 for the most likely tokens. target_temperature: of the targets, 0 for that of the draws.
        Prompt, sample number, seed and epoch decide a text, wherever it is written and beside whatever.
        A text ends with any of stop_ids or of the teacher's own (unless ignored), with the token that
        completes one of stop_strings, or at max_new_tokens.
        Texts come in the order of the prompts, the num_samples of a prompt by number, or as they end.
        Closing the iterator gives up what is in flight. Raises InvalidRequest for arguments that make no
        sense, IncompatibleTeacher for a teacher that writes no texts, and what `stream` raises.
        """
        self.check_usable()
        options = make_generate_options(
            targets,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            target_temperature=target_temperature,
            seed=seed,
            epoch=epoch,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            ignore_teacher_stop_ids=ignore_teacher_stop_ids,
            num_samples=num_samples,
        )
        make_writer = self._writer_maker(options)
        return write_texts(
            prompts,
            options,
            self.info,
            make_writer,
            self.check_usable,
            ahead=ahead,
            as_finished=as_finished,
        )

    def _writer_maker(self, options: GenerateOptions) -> "Callable[[], Writer]":
        """Returns what makes a Writer for one call. Raises TeacherError if there is none."""
        raise IncompatibleTeacher(f"{type(self).__name__} writes no texts: use {self.who_writes}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""Asks a teacher to continue prompts, a few at once, and hands its texts out in the caller's order.

To this module a teacher is a `Writer`; remote and local teachers make theirs and share everything else.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from logit_codec import TargetSpec, parse_targets
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher, InvalidRequest, TeacherError
from student_trainer.teachers.generation import GenerateOptions, Generation
from student_trainer.teachers.layout import as_token_ids


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Says how one text ended."""

    index: int
    sample: int
    result: Generation | TeacherError


class Writer(Protocol):
    """Continues the prompts of one call, all in the same way."""

    def ask(self, index: int, prompt_ids: Tensor) -> None:
        """Asks for all samples of a prompt; returns at once."""
        ...

    def take(self) -> list[Written]:
        """Waits until a text has ended; returns those that have ended since."""
        ...

    def close(self) -> None:
        """Gives up the texts that have not ended."""
        ...


def make_generate_options(targets: str | TargetSpec | None, **options: Any) -> GenerateOptions:
    """Reads the arguments of `generate`. Raises InvalidRequest."""
    spec = None
    if targets is not None:
        try:
            spec = parse_targets(targets)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if spec.needs_given_ids:
            raise InvalidRequest(
                "targets='given_ids' needs ids for each token, which nobody knows before it is written: "
                "use targets='top_k', whose ids the teacher chooses"
            )
    for name in ("stop_ids", "stop_strings"):
        given = options[name]
        if isinstance(given, str) or not isinstance(given, Iterable):
            what = "strings" if name == "stop_strings" else "ids"
            raise InvalidRequest(f"{name} must be a list of {what}, got {given!r}: use [{given!r}]")
        options[name] = tuple(given)
    return GenerateOptions(spec, **options)


def check_can_write(info: teacher_pb2.TeacherInfo, options: GenerateOptions) -> None:
    """Raises IncompatibleTeacher for a teacher that only scores, InvalidRequest for wrong ids."""
    most = info.max_generation_tokens
    if not most:
        raise IncompatibleTeacher(
            f"{info.model or 'this teacher'} writes no texts, it only scores: its architecture or its "
            "operator does not allow it. Let another teacher write, and score its texts with stream"
        )
    if options.max_new_tokens >= most:
        raise InvalidRequest(
            f"max_new_tokens must be at most {most - 1}, so that a prompt fits in front, got "
            f"{options.max_new_tokens}"
        )
    wrong = [one for one in options.stop_ids if one >= info.vocab_size]
    if wrong:
        raise InvalidRequest(f"stop_ids are 0 to {info.vocab_size - 1}, got {wrong[0]}")


def check_prompt(
    prompt: Any, index: int, info: teacher_pb2.TeacherInfo, options: GenerateOptions
) -> Tensor:
    """Returns (P,) int64 ids of a prompt. Raises InvalidRequest."""
    whose = f"prompt {index}"
    if isinstance(prompt, str):
        raise InvalidRequest(
            f"{whose} must be token ids, got the string {_shorten(prompt)}: use "
            "tokenizer(text).input_ids"
        )
    if isinstance(prompt, Sequence) and not prompt:
        raise InvalidRequest(f"{whose} has 0 tokens; at least 1 is needed")
    ids = as_token_ids(prompt, whose, at_least=1)
    largest = (info.effective_vocab_size or info.vocab_size) - 1
    if int(ids.max()) > largest:
        raise InvalidRequest(f"{whose}: ids are 0 to {largest}, got {int(ids.max())}")
    room = info.max_generation_tokens - options.max_new_tokens
    if len(ids) > room:
        raise InvalidRequest(
            f"{whose} has {len(ids)} tokens; with max_new_tokens={options.max_new_tokens} it may have "
            f"{room}, because this teacher's texts end at {info.max_generation_tokens}"
        )
    return ids


@dataclass(slots=True)
class _Held:
    """Holds the texts that the caller has not got yet."""

    due: deque[tuple[int, int]] = field(default_factory=deque)
    """(index, sample) of those that were asked for, in order."""
    ended: dict[tuple[int, int], Generation | TeacherError] = field(default_factory=dict)


def write_texts(
    prompts: Iterable[Any],
    options: GenerateOptions,
    info: teacher_pb2.TeacherInfo,
    make_writer: Callable[[], Writer],
    check_usable: Callable[[], None],
    *,
    ahead: int,
    as_finished: bool,
) -> Generator[Generation, None, None]:
    """Implements `Teacher.generate`. Raises what it raises, as far as it can be known now."""
    if not isinstance(ahead, int) or ahead < 1:
        raise InvalidRequest(f"ahead must be a number of texts, at least 1, got {ahead!r}")
    check_can_write(info, options)
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        got = _shorten(prompts) if isinstance(prompts, str) else type(prompts).__name__
        raise InvalidRequest(f"prompts must be a list of sequences of token ids, got {got}")
    if isinstance(prompts, Sequence):  # a mistake at the end shows up before anything is asked for
        prompts = [check_prompt(one, index, info, options) for index, one in enumerate(prompts)]

    def run() -> Generator[Generation, None, None]:
        source = _Source(iter(prompts), options, info)
        writer = make_writer()
        held = _Held()
        try:
            while True:
                check_usable()  # a fork would wait for ever for what its parent asked for
                # The samples of a prompt are asked for together, if need be alone.
                while not held.due or len(held.due) + options.num_samples <= ahead:
                    found = source.pull()
                    if found is None:
                        break
                    writer.ask(*found)
                    held.due.extend((found[0], sample) for sample in range(options.num_samples))
                if not held.due:
                    source.raise_failure()
                    return
                for written in writer.take():
                    held.ended[written.index, written.sample] = written.result
                yield from _hand_out(held, as_finished)
        finally:
            # Closed or failed: what is still in flight would be written for nothing.
            writer.close()

    return run()


class _Source:
    """Pulls prompts; after one that is wrong, no more: its error comes behind the texts before it."""

    def __init__(
        self, prompts: Iterator[Any], options: GenerateOptions, info: teacher_pb2.TeacherInfo
    ) -> None:
        self._numbered = enumerate(prompts)
        self._options = options
        self._info = info
        self._failure: Exception | None = None
        self._is_at_end = False

    def pull(self) -> tuple[int, Tensor] | None:
        """Returns the next prompt and its number, or None behind the last."""
        if self._is_at_end:
            return None
        try:
            index, prompt = next(self._numbered)
            return index, check_prompt(prompt, index, self._info, self._options)
        except StopIteration:
            pass
        except Exception as error:
            self._failure = error
        self._is_at_end = True
        return None

    def raise_failure(self) -> None:
        """Raises what ended the prompts, if anything did."""
        if self._failure is not None:
            raise self._failure


def _hand_out(held: _Held, as_finished: bool) -> Iterator[Generation]:
    """Yields the texts that are due; raises the error of one that failed, at its place."""
    while held.ended and held.due:
        key = next(iter(held.ended)) if as_finished else held.due[0]
        result = held.ended.pop(key, None)
        if result is None:
            return
        if isinstance(result, TeacherError):
            raise type(result)(f"prompt {key[0]}: {result}") from result
        held.due.remove(key)  # the first of them, but for as_finished
        yield result


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")

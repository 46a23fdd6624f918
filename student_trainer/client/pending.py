"""Defines the requests that have no answer yet: for the targets of a sequence, and for texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from logit_codec import GivenIds, TeacherHead
from protos import teacher_pb2
from student_trainer.errors import TeacherError
from student_trainer.teachers.generation import GenerateOptions
from student_trainer.teachers.request import Answer
from student_trainer.teachers.writing import Written

LinkKey = Hashable
"""Identifies one stream to one replica; never used again once it is lost."""


@dataclass(slots=True, eq=False, kw_only=True)
class Attempts(ABC):
    """Follows one request from attempt to attempt; subclasses have `request` and `future`."""

    order: int = 0
    """Its place among all requests: the oldest are sent again first."""
    number: int = 0
    """The request_id of the current attempt."""
    digest: bytes = b""
    """The digest of the current attempt's request."""
    link: LinkKey | None = None
    """Where the current attempt is; None while it waits for a link."""
    is_out: bool = False
    """Whether an attempt is on a link, or waits for one."""
    written_s: float = 0.0
    """When the current attempt was written to its link's stream."""
    num_damaged: int = 0
    """How often its answer arrived damaged."""
    passed_s: float | None = None
    """Since when requests that were sent later on the same link have been answered, or have begun to be."""
    waited_since_s: float | None = None
    """Since when the teacher has been asking to come back later."""
    failed_at: set[LinkKey] = field(default_factory=set)
    """Links whose replica answered it with INTERNAL: it goes to others while there are any."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """What it costs, to compare links by."""

    @abstractmethod
    def begin_attempt(self) -> None:
        """Gets the request ready to be sent, for the first time or again."""

    @abstractmethod
    def resolve(self, result: Any) -> None:
        """Hands the result or a TeacherError to the caller, unless the caller gave up."""


@dataclass(slots=True, eq=False)
class Pending(Attempts):
    """Holds a request for targets that has no answer yet.

    Parts of one attempt are never joined with those of another. Scoring is a pure function, so asking
    twice gives the same bytes.
    """

    request: teacher_pb2.ScoreRequest
    num_rows: int
    future: "Future[Answer]" = field(default_factory=Future)
    given_ids: GivenIds | None = None
    """The ids that its rows were asked for; the answer does not repeat them."""
    keep_payloads: bool = False
    """Whether the answer also needs the bytes that it is decoded from."""
    parts: dict[int, teacher_pb2.TargetsPart] = field(default_factory=dict)
    """The parts that the current attempt brought, by first row."""

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids) // 4

    def begin_attempt(self) -> None:
        """Forgets the parts of the attempt before, which must not end up in the answer."""
        self.parts = {}

    def is_complete(self) -> bool:
        """Whether the parts of the current attempt make a whole answer."""
        return sum(part.num_rows for part in self.parts.values()) >= self.num_rows or any(
            part.last for part in self.parts.values()
        )

    def resolve(self, result: Answer | TeacherError) -> None:
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, TeacherError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


@dataclass(slots=True, eq=False)
class Received:
    """Holds what has come of one text, from all attempts."""

    token_ids: bytearray = field(default_factory=bytearray)
    """int32, little-endian."""
    payloads: list[tuple[int, bytes]] = field(default_factory=list)
    """(tokens, container), in order."""
    finish: int = teacher_pb2.FINISH_UNSPECIFIED
    is_handed_out: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4

    def clear(self) -> None:
        """Forgets everything, because some of it arrived damaged."""
        self.token_ids.clear()
        self.payloads.clear()
        self.finish = teacher_pb2.FINISH_UNSPECIFIED


@dataclass(slots=True, eq=False)
class PendingTexts(Attempts):
    """Holds the texts of one prompt that have not all ended.

    What one attempt brought counts for the next, which asks for the rest: the same text goes on
    wherever it is written.
    """

    request: teacher_pb2.GenerateRequest
    index: int
    prompt_ids: Tensor
    options: GenerateOptions
    samples: range
    """The samples of the prompt that it asks for."""
    deliver: Callable[[Written], None]
    """Takes texts as they end, and the error that ends the others; called in the io thread."""
    future: "Future[None]" = field(default_factory=Future)
    """Done when all texts have been handed out; cancelled when they are not wanted any more."""
    texts: dict[int, Received] = field(default_factory=dict)
    """By sample."""
    last_part_s: float = 0.0
    """When the current attempt brought something; 0 if it has not."""
    num_silent: int = 0
    """How often it was asked for again because nothing came."""
    head: TeacherHead | None = None
    """For targets of kind `hidden`."""

    def __post_init__(self) -> None:
        self.texts = {sample: Received() for sample in self.samples}

    @property
    def num_tokens(self) -> int:
        texts = len(self.texts)
        return texts * (len(self.prompt_ids) + self.options.max_new_tokens)

    @property
    def unfinished(self) -> dict[int, Received]:
        """The texts that have not ended, by sample."""
        return {sample: text for sample, text in self.texts.items() if not text.finish}

    def begin_attempt(self) -> None:
        """Asks for the rest of the texts that have not ended."""
        del self.request.samples[:]
        for sample, text in self.unfinished.items():
            self.request.samples.add(number=sample, received_ids=bytes(text.token_ids))
        self.written_s = self.last_part_s = 0.0

    def add(self, part: teacher_pb2.GeneratedPart) -> bool:
        """Takes what an attempt brought; False if it does not follow what is there."""
        text = self.texts.get(part.sample)
        if text is None or text.finish or len(part.token_ids) % 4:
            return False
        if part.first != len(self.prompt_ids) + text.num_tokens:
            return False
        if bool(part.payload) != (self.options.spec is not None and bool(part.token_ids)):
            return False
        text.token_ids += part.token_ids
        if part.payload:
            text.payloads.append((len(part.token_ids) // 4, part.payload))
        text.finish = part.finish
        return not text.finish or text.num_tokens > 0

    def resolve(self, result: TeacherError) -> None:
        """Ends all texts that were not handed out with an error."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        self.future.set_result(None)
        for sample, text in self.texts.items():
            if not text.is_handed_out:
                text.is_handed_out = True
                self.deliver(Written(self.index, sample, result))

    def hand_out(self, sample: int, written: Written) -> None:
        """Hands out a text that has ended."""
        text = self.texts[sample]
        if text.is_handed_out or self.future.done():
            return
        text.is_handed_out = True
        self.deliver(written)
        if all(text.is_handed_out for text in self.texts.values()):
            self.future.set_running_or_notify_cancel()
            self.future.set_result(None)

"""Lets the ranks of a divided teacher compute the same, at the same time.

The first rank decides what is launched. Before it launches anything it tells the others, its
followers, who launch the same; what they find is the same too, and dropped. An order names texts by
number and says what is new of them, so that it is small however long they are.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from logit_codec import TargetSpec
from teacher_server.engine.batch import RowRequest
from teacher_server.engine.continuation import Continuation, DrawRule


@dataclass(frozen=True, slots=True)
class Score:
    """Launches the scoring of some sequences."""

    requests: tuple[dict[str, Any], ...]
    """The fields of each RowRequest; tensors as arrays, which take their own bytes with them only."""

    @classmethod
    def of(cls, requests: Sequence[RowRequest]) -> "Score":
        return cls(
            tuple(
                {name: _to_array(getattr(request, name)) for name in RowRequest.__slots__}
                for request in requests
            )
        )

    def read(self) -> list[RowRequest]:
        return [
            RowRequest(**{name: _to_tensor(value) for name, value in fields.items()})
            for fields in self.requests
        ]


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """Makes a pool of keys, and gets ready to write texts."""

    pool_nbytes: int


@dataclass(frozen=True, slots=True)
class TextNews:
    """Says what is new of a text since it was named last."""

    number: int
    pages: tuple[int, ...]
    num_cached: int
    first: int
    """The place of the new tokens among those after the prompt."""
    new_ids: tuple[int, ...]
    begun: tuple[np.ndarray, DrawRule, TargetSpec | None, float] | None
    """The prompt's ids, and how the text is written; None if the followers know."""


@dataclass(frozen=True, slots=True)
class WriteChunks:
    """Launches the computation of the next tokens of some texts, so many of each."""

    texts: tuple[TextNews, ...]
    counts: tuple[int, ...]
    gone: tuple[int, ...]
    """Numbers of texts that nobody needs any more."""


@dataclass(frozen=True, slots=True)
class WriteStep:
    """Launches one token of each text."""

    texts: tuple[TextNews, ...]
    gone: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyPage:
    """Makes a page hold what another one holds."""

    source: int
    target: int


Order = Score | OpenGeneration | WriteChunks | WriteStep | CopyPage


class Followers(Protocol):
    """The other ranks, as the first one sees them."""

    def tell(self, order: Order) -> None:
        """Sends an order, without waiting for its end. Raises LostStep if a rank is gone."""


class LostStep(Exception):
    """Raised when the ranks no longer do the same: the first one has to end, and the others with it."""


class TextReporter:
    """Knows what the followers have been told of each text."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._told: weakref.WeakKeyDictionary[Continuation, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        """The number of a text, and how many tokens after its prompt are known."""
        self._gone: list[int] = []

    def report(self, texts: Sequence[Continuation]) -> tuple[TextNews, ...]:
        """Returns what is new of the texts; it has to be sent."""
        return tuple(map(self._report, texts))

    def take_gone(self) -> tuple[int, ...]:
        """Returns the numbers of the texts that have gone since the last call."""
        # A text may go in any thread, at any time: what is appended meanwhile stays.
        gone = tuple(self._gone)
        del self._gone[: len(gone)]
        return gone

    def _report(self, text: Continuation) -> TextNews:
        begun = None
        if text not in self._told:
            number = next(self._numbers)
            self._told[text] = number, 0
            weakref.finalize(text, self._gone.append, number)
            begun = text.prompt_ids.numpy(), text.rule, text.spec, text.target_temperature
        number, first = self._told[text]
        new_ids = tuple(text.new_ids[first:])
        self._told[text] = number, first + len(new_ids)
        return TextNews(number, tuple(text.pages), text.num_cached, first, new_ids, begun)


class TextMirror:
    """Holds the followers' copies of the texts."""

    def __init__(self) -> None:
        self._texts: dict[int, Continuation] = {}

    def read(self, news: TextNews) -> Continuation:
        """Returns the copy of a text, brought up to date."""
        if news.begun is not None:
            prompt, rule, spec, temperature = news.begun
            self._texts[news.number] = Continuation(
                torch.from_numpy(prompt), rule, spec, temperature
            )
        text = self._texts[news.number]
        text.pages[:] = news.pages
        text.num_cached = news.num_cached
        text.new_ids[news.first :] = news.new_ids
        return text

    def forget(self, numbers: Sequence[int]) -> None:
        """Drops the copies of texts that are gone."""
        for number in numbers:
            del self._texts[number]


def _to_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

"""Decides when a text that is being written has ended."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from teacher_server.engine.continuation import Continuation


class StopRule:
    """Ends a text at a stop id, at a stop string, or at a number of new tokens.

    What it says depends on the tokens alone, so it is the same wherever and however often a text is
    interrupted. Stop strings are looked for in what was written, not in the prompt.
    """

    def __init__(
        self,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        max_new_tokens: int,
        tokenizer: Any | None,
    ) -> None:
        """stop_ids: all of them, the teacher's own included. Raises ValueError for strings that cannot
        be found."""
        if stop_strings and tokenizer is None:
            raise ValueError(
                "stop strings need a tokenizer, and this teacher has none: use stop ids instead"
            )
        if "" in stop_strings:
            raise ValueError("a stop string must have at least one character, got an empty one")
        self._stop_ids = frozenset(stop_ids)
        self._stop_strings = tuple(stop_strings)
        self._max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._longest = max(map(len, stop_strings), default=0)
        # Nearly every token stands for a byte at least; where some do not, the tail is made longer.
        longest_nbytes = max((len(one.encode()) for one in stop_strings), default=0)
        self._tail_tokens = longest_nbytes + 4

    def check(self, text: Continuation) -> Literal["", "stop", "length"]:
        """Tells whether the last token of a text ends it; call it after every token."""
        ids = text.new_ids
        if ids and (ids[-1] in self._stop_ids or self._completes_a_string(ids)):
            return "stop"
        return "length" if len(ids) >= self._max_new_tokens else ""

    def _completes_a_string(self, ids: Sequence[int]) -> bool:
        """Whether a stop string is in the text up to its last token, and ends in this token."""
        if not self._stop_strings:
            return False
        count = self._tail_tokens
        while True:
            tail = self._decode(ids[-count:])
            if len(tail) > self._longest or count >= len(ids):
                break
            count *= 2
        before = self._decode(ids[-count:-1])
        # A string that was there before would have ended the text then, unless the cut made it up.
        return any(tail.count(one) > before.count(one) for one in self._stop_strings)

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

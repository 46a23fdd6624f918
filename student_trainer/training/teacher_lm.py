"""Makes a teacher a model of lm-eval, so that its tasks measure the teacher that is served.

Loaded only where tasks are run: lm-eval comes with the extra [eval].
"""

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from student_trainer.teachers.layout import IGNORE_INDEX
from student_trainer.teachers.teacher import Teacher

Encoded = tuple[Any, list[int], list[int]]
"""What lm-eval knows a request by, the ids of its context, and those of its continuation."""
TARGETS = "top_k:1"
"""Tells the logprob of the token that came next, to 1/4096 nats, and the likeliest one."""


class TeacherLM(TemplateLM):
    """Scores continuations with a teacher, tokenised and truncated as lm-eval's HFLM does it."""

    def __init__(self, teacher: Teacher, tokenizer: Any) -> None:
        """tokenizer: of the student; its ids must be the teacher's."""
        super().__init__()
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.max_length = teacher.info.max_sequence_tokens - 1
        """Tokens that the teacher reads: the last one of a sequence is only predicted."""

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenises as the tokenizer does by itself, but never puts a second prefix token."""
        if add_special_tokens is None:
            if not string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                return self.tokenizer.encode(string)
            add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the logprob of each whole text, in windows of the teacher's longest sequence."""
        windows: list[Encoded] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(pair)) for pair in pairs]
        totals = [0.0] * len(requests)
        for (number, *_), (logprob, _) in zip(
            windows, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError: a teacher only scores."""
        raise ValueError("a served teacher scores texts and does not generate any")

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the logprob of each continuation, and whether each of its tokens is the likeliest.

        All are asked for in one stream, and of each only the rows of its continuation.
        """
        stream = self.teacher.stream_batches(self._make_batches(requests), targets=TARGETS)
        found = []
        for (batch, targets), (_, _, continuation) in zip(stream, requests, strict=True):
            ids_R: Tensor = batch["labels"][0, -len(continuation) :]
            assert targets.realized_logprob is not None
            is_greedy = torch.equal(targets.most_likely(), ids_R)
            found.append((float(targets.realized_logprob.double().sum()), is_greedy))
        return found

    def _make_batches(self, requests: list[Encoded]) -> Iterator[dict[str, Tensor]]:
        """Yields each request as a batch of one sequence, whose continuation alone is trained.

        Raises ValueError for an empty continuation, or one that leaves no room for any context.
        """
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; it must have 1 to "
                    f"{self.max_length}, so that a token of context fits before it"
                )
            token_ids = torch.tensor([(context + continuation)[-(self.max_length + 1) :]])
            labels = torch.full_like(token_ids, IGNORE_INDEX)
            labels[:, -len(continuation) :] = token_ids[:, -len(continuation) :]
            yield {"input_ids": token_ids, "labels": labels}

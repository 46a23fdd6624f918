"""Checks and collects the parts of texts, and hands out those that have ended."""

import asyncio
import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from logit_codec import CodecError, IdTable, decode
from protos import teacher_pb2
from protos.answer_check import generation_check
from student_trainer.client.answers import Answers
from student_trainer.client.counters import Counters
from student_trainer.client.dispatch import Dispatch
from student_trainer.client.links import Link
from student_trainer.client.pending import PendingTexts, Received
from student_trainer.client.side_tasks import CLOSED, SideTasks, unexpected
from student_trainer.errors import IncompatibleTeacher, TargetsCorrupt, TeacherError
from student_trainer.teachers.generation import Finish, Generation, join_targets
from student_trainer.teachers.writing import Written

logger = logging.getLogger(__name__)

FINISHES: dict[int, Finish] = {
    teacher_pb2.FINISH_STOP: "stop",
    teacher_pb2.FINISH_LENGTH: "length",
}

SILENT_FACTOR = 12.0
"""A text is asked for again after so many times as long as a batch may take, doubled each time.

That is while it does not grow, or while texts that were asked for later grow and it has not begun.
"""


class Texts:
    """Takes what the Generate streams of all links bring.

    What one attempt brought of a text is kept for the next one. Only a text that turns out to be damaged
    when it is decoded is asked for from its beginning.
    """

    def __init__(
        self, dispatch: Dispatch, answers: Answers, tasks: SideTasks, counters: Counters
    ) -> None:
        self._dispatch = dispatch
        self._answers = answers
        self._tasks = tasks
        self._counters = counters

    def receive(self, link: Link, response: teacher_pb2.GenerateResponse) -> bool:
        """Takes one message; returns whether it was wanted and arrived undamaged."""
        pending = self._dispatch.find(link, response.request_id)
        if not isinstance(pending, PendingTexts):
            return False  # of an earlier attempt
        if pending.future.cancelled():
            self._dispatch.forget(pending)
            link.cancel(pending)
            return False
        try:
            return self._receive(link, pending, response)
        except BaseException as error:  # nothing may leave a caller waiting
            logger.error("the client failed", exc_info=error)
            if pending.is_out:
                self._dispatch.forget(pending)
            pending.resolve(unexpected(error))
            return False

    def check(self, link: Link, now: float, batch_s: float) -> None:
        """Asks again for texts of which nothing has come for long: something was lost on its way.

        batch_s: how long a batch may take before it counts as stuck. A text that waits for its turn at
        the replica is left alone, however long that takes.
        """
        for pending in self._dispatch.outstanding(link, PendingTexts).values():
            since_s = pending.last_part_s or pending.passed_s
            longest_s = SILENT_FACTOR * batch_s * 2**pending.num_silent
            if since_s and now - since_s > longest_s:
                logger.warning("a text has not grown for %.0f s, asking again", now - since_s)
                self._counters.resent += 1
                pending.num_silent += 1
                link.cancel(pending)
                self._dispatch.resend(pending)

    def give_up(self, pending: PendingTexts) -> None:
        """Ends the current attempt of a request, which may still be computed."""
        pending.future.cancel()  # where it waits for a link, it is left out for this
        link = pending.link
        if pending.is_out and isinstance(link, Link):
            self._dispatch.forget(pending)
            link.cancel(pending)

    def _receive(
        self, link: Link, pending: PendingTexts, response: teacher_pb2.GenerateResponse
    ) -> bool:
        if response.check != generation_check(pending.digest, response):
            self._ask_again(link, pending, "a part of a text was damaged on its way")
            return False
        if not response.HasField("part"):
            self._dispatch.forget(pending)
            refusal = self._answers.handle_refusal(pending, response.error)
            self._tasks.spawn(refusal, pending.resolve)
            return True
        part, wanted = response.part, pending.request.teacher_fingerprint
        if part.teacher_fingerprint != wanted:
            self._dispatch.forget(pending)
            link.cancel(pending)
            self._answers.ask_again(
                pending,
                IncompatibleTeacher(
                    f"a text came from teacher {part.teacher_fingerprint}, this run began with {wanted}"
                ),
            )
            return True
        if not pending.add(part):
            self._ask_again(link, pending, "a part of a text does not follow the one before it")
            return False
        link.clear_failures()
        now = time.monotonic()
        if not pending.last_part_s:
            self._note_passed_over(link, pending, now)
        pending.last_part_s, pending.waited_since_s = now, None
        if part.finish:
            text = pending.texts[part.sample]
            self._tasks.spawn(self._finish(pending, part.sample, text), pending.resolve)
        if part.last or not pending.unfinished:
            self._dispatch.forget(pending)
            if pending.unfinished:
                error = TargetsCorrupt("a request for texts ended before all of them had")
                self._answers.ask_again(pending, error)
        return True

    def _note_passed_over(self, link: Link, pending: PendingTexts, now: float) -> None:
        """Marks the texts of a link that have not begun although one that was sent later has now."""
        for earlier in self._dispatch.outstanding(link, PendingTexts).values():
            if earlier is pending:
                return
            if not earlier.last_part_s:
                earlier.passed_s = earlier.passed_s or now

    def _ask_again(self, link: Link, pending: PendingTexts, why: str) -> None:
        """Asks for the rest of the texts, after something that cannot be used."""
        self._dispatch.forget(pending)
        link.cancel(pending)
        self._answers.ask_again(pending, TargetsCorrupt(why))

    async def _finish(self, pending: PendingTexts, sample: int, text: Received) -> None:
        """Decodes a text off the loop and hands it out; asks for it again if it is damaged."""
        loop = asyncio.get_running_loop()
        tables = self._answers.id_tables
        try:
            decoding = loop.run_in_executor(
                self._answers.decoder, _make_generation, pending, sample, text, tables
            )
        except RuntimeError:  # the executor was shut down: closed, or the interpreter ends
            pending.resolve(TeacherError(CLOSED))
            return
        try:
            generation = await decoding
        except (CodecError, TargetsCorrupt) as error:
            text.clear()
            # A request that has not ended asks for it when it has.
            if not pending.is_out:
                self._answers.ask_again(pending, error)
            return
        self._counters.texts += 1
        self._counters.new_tokens += text.num_tokens
        self._counters.payload_nbytes += sum(map(len, generation.payloads))
        if generation.targets is not None:
            self._counters.rows += generation.targets.num_rows
        pending.hand_out(sample, Written(pending.index, sample, generation))


def _make_generation(
    pending: PendingTexts, sample: int, text: Received, id_tables: Sequence[IdTable]
) -> Generation:
    """Decodes a text, in the decoding thread. Raises CodecError, TargetsCorrupt or ProtocolError."""
    try:
        decoded = []
        for num_tokens, payload in text.payloads:
            decoded.append(decode(payload, id_tables=id_tables))
            if decoded[-1].num_rows != num_tokens:
                raise TargetsCorrupt(
                    f"{num_tokens} tokens came with targets of {decoded[-1].num_rows}"
                )
        token_ids = np.frombuffer(bytes(text.token_ids), "<i4").astype(np.int64)
        return Generation(
            prompt_ids=pending.prompt_ids,
            token_ids=torch.from_numpy(token_ids),
            targets=join_targets(decoded, pending.head) if pending.options.spec else None,
            finish=FINISHES[text.finish],
            index=pending.index,
            sample=sample,
            payloads=tuple(payload for _, payload in text.payloads),
        )
    except (CodecError, TargetsCorrupt):
        raise
    except BaseException as error:  # StopIteration and SystemExit too, which no loop can carry
        raise unexpected(error) from error

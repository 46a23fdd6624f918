"""Runs the streams of every link, one for targets and one for texts, and deals with their ends."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc

from protos import teacher_pb2
from student_trainer.client.answers import Answers
from student_trainer.client.describe import RETRIED
from student_trainer.client.dispatch import Dispatch
from student_trainer.client.links import Link
from student_trainer.client.pending import Pending, PendingTexts
from student_trainer.client.refusals import Refusals
from student_trainer.client.texts import Texts


class FailAll(Protocol):
    """Ends every request with an error, or only those for texts."""

    def __call__(self, error: Exception, *, texts_only: bool = False) -> None: ...


class Streams:
    """Passes requests to links and what they bring to `Answers` and `Texts`."""

    def __init__(
        self,
        dispatch: Dispatch,
        answers: Answers,
        texts: Texts,
        *,
        lose: Callable[[Link, str], None],
        fail_all: FailAll,
        note_answer: Callable[[], None],
    ) -> None:
        """lose: gives a link up, for a reason. note_answer: hears of every good answer."""
        self._dispatch = dispatch
        self._answers = answers
        self._texts = texts
        self._lose = lose
        self._fail_all = fail_all
        self._note_answer = note_answer
        self._refusals, self._text_refusals = Refusals(), Refusals()
        self._listen_first = False
        """Whether the last stream ended in a way that may hide a refusal."""

    def open(self, link: Link) -> None:
        """Opens the stream for targets of a new link."""
        link.tasks.append(asyncio.create_task(self._converse(link)))

    def send(self, link: Link, number: int) -> None:
        """Queues a request to be written to a link; opens its stream for texts when one is needed."""
        if not isinstance(self._dispatch.find(link, number), PendingTexts):
            link.outbox.put_nowait(number)
            return
        link.text_outbox.put_nowait(number)
        if not link.has_text_stream:
            link.has_text_stream = True
            link.tasks.append(asyncio.create_task(self._converse_on_texts(link)))

    async def _converse(self, link: Link) -> None:
        """Runs a link's stream for targets."""
        while True:
            end = await link.converse(
                self._dispatch, self._receive, listen_first=self._listen_first
            )
            is_needed = self._dispatch.oldest(link, Pending) is not None
            has_texts = self._dispatch.oldest(link, PendingTexts) is not None
            if is_needed or not has_texts or end.code not in RETRIED:
                break
            # The service ends a stream without a request; texts come over another one, which tells
            # whether the replica is lost.
            await link.wait_for_a_request()
        # No await from here on: losing the link cancels this very task.
        self._listen_first = end.code == grpc.StatusCode.INTERNAL
        if end.bug is not None:  # sending the requests again would only repeat it
            self._fail_all(end.bug)
        self._lose(link, end.reason)
        if failure := self._refusals.judge(link, end):
            self._fail_all(failure)

    async def _converse_on_texts(self, link: Link) -> None:
        """Runs a link's stream for texts."""
        end = await link.converse(
            self._dispatch, self._receive_texts, listen_first=self._listen_first, texts=True
        )
        # No await from here on, as above.
        link.has_text_stream = False
        self._listen_first = end.code == grpc.StatusCode.INTERNAL
        if end.bug is not None:
            self._fail_all(end.bug, texts_only=True)
        if self._dispatch.oldest(link, PendingTexts) is not None:
            self._lose(link, end.reason)
        if failure := self._text_refusals.judge(link, end):
            self._fail_all(failure, texts_only=True)

    def _receive(self, link: Link, response: teacher_pb2.ScoreResponse) -> None:
        if self._answers.receive(link, response):
            self._refusals.clear()
            self._note_answer()

    def _receive_texts(self, link: Link, response: teacher_pb2.GenerateResponse) -> None:
        if self._texts.receive(link, response):
            self._text_refusals.clear()
            self._note_answer()

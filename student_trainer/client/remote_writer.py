"""Asks a service for the texts of one call of `RemoteTeacher.generate`."""

import queue
from collections.abc import Callable

from torch import Tensor

from logit_codec import IdTable, TeacherHead
from logitstream.messages import fill_targets
from protos import teacher_pb2
from student_trainer.client.io_thread import IoThread
from student_trainer.client.pending import PendingTexts
from student_trainer.client.session import Session
from student_trainer.teachers.generation import GenerateOptions
from student_trainer.teachers.writing import Written


class RemoteWriter:
    """Continues prompts at the replicas of a service: one request for the samples of each prompt."""

    def __init__(
        self,
        io: IoThread,
        session: Session,
        options: GenerateOptions,
        head: TeacherHead | None,
        fingerprint: str,
        check_usable: Callable[[], None],
    ) -> None:
        """fingerprint: of the teacher that must write."""
        self._io = io
        self._session = session
        self._options = options
        self._head = head
        self._template = make_request(options, session.id_tables)
        self._template.session_id = session.session_id
        self._template.teacher_fingerprint = fingerprint
        self._check_usable = check_usable
        self._ended: queue.SimpleQueue[Written] = queue.SimpleQueue()
        self._asked: dict[int, PendingTexts] = {}

    def ask(self, index: int, prompt_ids: Tensor) -> None:
        """Sends the request; returns at once."""
        self._check_usable()
        request = teacher_pb2.GenerateRequest()
        request.CopyFrom(self._template)
        request.prompt_ids = prompt_ids.numpy().astype("<i4").tobytes()
        pending = PendingTexts(
            request, index, prompt_ids, self._options, self._ended.put, head=self._head
        )
        self._asked[index] = pending
        self._io.call(self._session.submit, pending)

    def take(self) -> list[Written]:
        """Waits until a text has ended; returns those that have ended since."""
        ended = [self._ended.get()]
        while not self._ended.empty():
            ended.append(self._ended.get())
        for one in ended:
            pending = self._asked.get(one.index)
            if pending is not None and pending.future.done():
                del self._asked[one.index]
        return ended

    def close(self) -> None:
        """Cancels the requests that have not ended."""
        left = [pending for pending in self._asked.values() if not pending.future.done()]
        self._asked.clear()
        if left:
            self._io.call(self._session.give_up, left)


def make_request(options: GenerateOptions, id_tables: list[IdTable]) -> teacher_pb2.GenerateRequest:
    """Makes what the requests for all prompts have in common."""
    request = teacher_pb2.GenerateRequest(
        max_new_tokens=options.max_new_tokens,
        draw=teacher_pb2.Draw(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        ),
        target_temperature=options.target_temperature,
        seed=options.seed,
        epoch=options.epoch,
        stop_ids=options.stop_ids,
        stop_strings=options.stop_strings,
        ignore_teacher_stop_ids=options.ignore_teacher_stop_ids,
        level=teacher_pb2.LEVEL_TRAINING,
    )
    if options.spec is not None:
        fill_targets(request.targets, options.spec)
        if id_tables:
            request.targets.id_table = id_tables[0].digest
    return request

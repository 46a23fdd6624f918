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

REQUEST_SAMPLES = 64
"""Most samples of a prompt in one request: they share their prompt's keys, several requests the replicas."""


class RemoteWriter:
    """Continues prompts at the replicas of a service: one request for up to 64 samples of a prompt."""

    def __init__(
        self,
        io: IoThread,
        session: Session,
        options: GenerateOptions,
        head: TeacherHead | None,
        info: teacher_pb2.TeacherInfo,
        check_usable: Callable[[], None],
    ) -> None:
        """info: describes the teacher that must write."""
        self._io = io
        self._session = session
        self._options = options
        self._head = head
        self._template = make_request(options, session.id_tables)
        self._template.session_id = session.session_id
        self._template.teacher_fingerprint = info.teacher_fingerprint
        self._max_request_tokens = info.caller.max_request_tokens
        self._check_usable = check_usable
        self._ended: queue.SimpleQueue[Written] = queue.SimpleQueue()
        self._asked: dict[tuple[int, int], PendingTexts] = {}
        """Who follows each text that has not ended, by index and sample."""

    def ask(self, index: int, prompt_ids: Tensor) -> None:
        """Sends the requests; returns at once."""
        self._check_usable()
        prompt = prompt_ids.numpy().astype("<i4").tobytes()
        every = range(self._options.num_samples)
        most = REQUEST_SAMPLES
        if self._max_request_tokens:  # of the team
            text_tokens = len(prompt_ids) + self._options.max_new_tokens
            most = max(1, min(most, self._max_request_tokens // text_tokens))
        for samples in (every[first : first + most] for first in every[::most]):
            request = teacher_pb2.GenerateRequest()
            request.CopyFrom(self._template)
            request.prompt_ids = prompt
            pending = PendingTexts(
                request,
                index,
                prompt_ids,
                self._options,
                samples,
                self._ended.put,
                head=self._head,
            )
            for sample in samples:
                self._asked[index, sample] = pending
            self._io.call(self._session.submit, pending)

    def take(self) -> list[Written]:
        """Waits until a text has ended; returns those that have ended since."""
        ended = [self._ended.get()]
        while not self._ended.empty():
            ended.append(self._ended.get())
        for one in ended:
            del self._asked[one.index, one.sample]
        return ended

    def close(self) -> None:
        """Cancels the requests that have not ended."""
        left = set(self._asked.values())
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

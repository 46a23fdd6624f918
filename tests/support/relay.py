"""A gRPC server that passes everything on to one replica, and changes messages on the way."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import grpc

from protos import teacher_pb2, teacher_pb2_grpc
from protos.answer_check import answer_check, full_answer_check, request_digest

Change = Callable[[teacher_pb2.ScoreResponse], Iterable[teacher_pb2.ScoreResponse]]
"""What is sent instead of one message."""


class Relay(AbstractContextManager["Relay"]):
    """`address` stands for the replica at `target`; clients are told of nobody else.

    change: what becomes of an answer; `requests` are those that passed, by number.
    described: changes an answer to Describe in place. id_tables: files that FetchIdTable gives, one
    after the other. refuse: codes that the next streams end with at once. garbage:
    methods whose next answer is bytes that are no message.
    """

    def __init__(self, target: str) -> None:
        self.change: Change = lambda response: [response]
        self.described: Callable[[teacher_pb2.TeacherInfo], None] = lambda info: None
        self.id_tables: list[bytes] = []
        self.requests: dict[int, teacher_pb2.ScoreRequest] = {}
        self.refuse: list[grpc.StatusCode] = []
        self.garbage: list[str] = []
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(target, options=options)
        self._stub = teacher_pb2_grpc.TeacherStub(self._channel)
        self._server = grpc.server(ThreadPoolExecutor(16), options=options)
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.Describe,
                teacher_pb2.DescribeRequest.FromString,
                lambda answer: self._serialized("Describe", answer),
            ),
            "FetchIdTable": grpc.unary_unary_rpc_method_handler(
                self.FetchIdTable,
                teacher_pb2.FetchIdTableRequest.FromString,
                lambda answer: self._serialized("FetchIdTable", answer),
            ),
            "Score": grpc.stream_stream_rpc_method_handler(
                self.Score,
                teacher_pb2.ScoreRequest.FromString,
                lambda answer: self._serialized("Score", answer),
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("logitstream.v1.Teacher", handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _serialized(self, method: str, answer: Any) -> bytes:
        if method in self.garbage:
            self.garbage.remove(method)
            return b"\xff"
        return answer.SerializeToString()

    def Describe(self, request: Any, context: grpc.ServicerContext) -> teacher_pb2.TeacherInfo:
        info = self._stub.Describe(request, timeout=10)
        own = [card for card in info.replicas if card.id == info.replica_id]
        own[0].address = self.address
        del info.replicas[:]
        info.replicas.extend(own)
        self.described(info)
        return info

    def FetchIdTable(
        self, request: Any, context: grpc.ServicerContext
    ) -> teacher_pb2.FetchIdTableResponse:
        return teacher_pb2.FetchIdTableResponse(data=self.id_tables.pop(0))

    def Score(
        self, request_iterator: Any, context: grpc.ServicerContext
    ) -> Iterator[teacher_pb2.ScoreResponse]:
        if self.refuse:
            context.abort(self.refuse.pop(), "refused on the way")
        call = self._stub.Score(map(self._noted, request_iterator))
        if not context.add_callback(call.cancel):
            call.cancel()  # the client has gone already
        try:
            for response in call:
                yield from self.change(response)
        except grpc.RpcError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the replica is gone")

    def _noted(self, request: teacher_pb2.ScoreRequest) -> teacher_pb2.ScoreRequest:
        self.requests[request.request_id] = request
        return request

    def refusal(
        self, response: teacher_pb2.ScoreResponse, error: teacher_pb2.RequestError
    ) -> teacher_pb2.ScoreResponse:
        """What the replica would write to the same request if it failed."""
        digest = request_digest(self.requests[response.request_id])
        refusal = teacher_pb2.ScoreResponse(request_id=response.request_id, error=error)
        refusal.check = answer_check(digest, refusal)
        refusal.full_check = full_answer_check(digest, refusal)
        return refusal

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.2).wait(5)
        self._channel.close()

"""What a batch may look like, and that nothing else is taken for one."""

from concurrent.futures import Future

import numpy as np
import pytest
import torch
from torch import Tensor

from protos import teacher_pb2
from student_trainer import InvalidRequest, TeacherError
from student_trainer.client import _request
from student_trainer.streaming import Layout, Teacher, stream_sequences
from student_trainer.wish import Wish

IDS = torch.arange(1, 31).view(3, 10)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IDS, ["batch 7", "mapping", "Tensor"]),
        ({}, ["no input_ids"]),
        ({"input_ids": IDS + 0.7}, ["whole numbers", "float32"]),
        ({"input_ids": IDS > 3}, ["whole numbers", "bool"]),
        ({"input_ids": IDS[None]}, ["(B, T)", "(1, 3, 10)"]),
        ({"input_ids": [[1, 2, 3], [1, 2]]}, ["whole numbers", "length"]),
        ({"input_ids": IDS.where(IDS > 5, -100)}, ["-100", "padded with labels"]),
        ({"input_ids": IDS + 2**32}, [str(2**32 + 30)]),
        ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, ["attention_mask", "(3, 3)"]),
        # Added to the attention's scores by some models; read as a mask it means the contrary.
        ({"input_ids": IDS, "attention_mask": (IDS % 2) * -1e9}, ["1 for a token", "-1000000000"]),
        ({"input_ids": IDS, "attention_mask": IDS}, ["1 for a token and 0", "got 2"]),
    ],
)
def test_what_is_no_batch_is_refused_with_its_number(batch, words):
    with pytest.raises(InvalidRequest) as caught:
        Layout.of(batch, 7)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "ids",
    [IDS, IDS.int(), IDS.to(torch.uint8), IDS.tolist(), IDS.numpy(), IDS.numpy().astype("u2")],
)
def test_ids_may_have_any_type_of_whole_numbers(ids):
    layout = Layout.of({"input_ids": ids, "attention_mask": np.ones((3, 10), dtype=bool)})
    assert torch.equal(layout.ids, IDS)
    assert int(layout.trained.sum()) == 27


def test_padding_may_hold_any_id():
    mask = torch.ones_like(IDS)
    mask[0, :4] = mask[1, 1:] = 0
    layout = Layout.of({"input_ids": IDS.where(mask > 0, -1), "attention_mask": mask.float()})
    assert [(ids.tolist(), rows.tolist()) for ids, rows in layout.pieces()] == [
        (list(range(5, 11)), list(range(5))),
        (list(range(21, 31)), list(range(9))),
    ]


@pytest.mark.parametrize("value", [-1, 2**64, 1.5, "3", None])
def test_a_seed_or_epoch_that_is_no_number_of_64_bits_is_refused(value):
    for seed, epoch in ((value, 0), (0, value)):
        with pytest.raises(InvalidRequest, match="whole number"):
            Wish.of("sampled", 1.0, seed, epoch)
    assert Wish.of("sampled", 1.0, np.int64(3), 2**64 - 1).seed == 3


@pytest.mark.parametrize("ahead", [0, -3, "30s", 2.5])
def test_a_stream_of_sequences_is_ahead_by_a_number_of_them(ahead):
    with pytest.raises(InvalidRequest, match="number of sequences"):
        stream_sequences(lambda *_: None, [], Wish.of("sampled", 1.0, 0, 0), ahead)  # type: ignore[arg-type,return-value]


class Noted(Teacher):
    """Answers nothing, and keeps the messages that would have been sent."""

    info = teacher_pb2.TeacherInfo()  # type: ignore[assignment]

    def __init__(self) -> None:
        self.requests: list[teacher_pb2.ScoreRequest] = []

    def submit(self, token_ids: Tensor, rows: Tensor | None, wish: Wish) -> Future:
        self.requests.append(_request(token_ids, rows, wish)[0])
        future: Future = Future()
        future.set_exception(TeacherError("nobody is here"))
        return future

    def close(self) -> None: ...
    def check_usable(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "level"),
    [({}, teacher_pb2.LEVEL_TRAINING), ({"interactive": True}, teacher_pb2.LEVEL_INTERACTIVE)],
)
def test_a_stream_says_whether_somebody_waits_for_it(options, level):
    teacher = Noted()
    with pytest.raises(TeacherError, match="nobody is here"):
        next(teacher.stream([[1, 2, 3]], ahead=1, **options))
    assert [request.level for request in teacher.requests] == [level]

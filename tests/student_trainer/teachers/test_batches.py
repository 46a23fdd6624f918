"""What a batch may look like, and that nothing else is taken for one."""

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from protos import teacher_pb2
from student_trainer import InvalidRequest, TeacherError
from student_trainer.client.remote import _request
from student_trainer.teachers.layout import Layout
from student_trainer.teachers.request import Piece, ScoreOptions
from student_trainer.teachers.stream import stream_sequences
from student_trainer.teachers.teacher import Teacher

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
    assert [(piece.token_ids.tolist(), piece.rows.tolist()) for piece in layout.pieces()] == [
        (list(range(5, 11)), list(range(5))),
        (list(range(21, 31)), list(range(9))),
    ]


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]])},
        # Parts of longer documents: their positions do not begin at 0.
        {"position_ids": torch.tensor([[5, 6, 7, 512, 513, 514, 515, 9, 10, 11]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 7, 10], dtype=torch.int32)},
        {"cu_seq_lens_q": [0, 3, 7]},  # what is behind the last is one more
        {
            "cu_seq_lens_q": torch.tensor([[0, 3, 10]]),
            "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]),
        },
    ],
)
def test_documents_are_cut_wherever_the_batch_says_that_one_begins(marks):
    ids = torch.arange(10, 20)[None]
    layout = Layout.of({"input_ids": ids, **marks})
    assert [piece.token_ids.tolist() for piece in layout.pieces()] == [
        [10, 11, 12],
        [13, 14, 15, 16],
        [17, 18, 19],
    ]
    assert layout.trained[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_padded_positions_are_no_documents():
    """As generate() makes them: padding on the left has any position."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = mask[1, 7:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    layout = Layout.of({"input_ids": IDS, "attention_mask": mask, "position_ids": positions})
    assert [piece.num_rows for piece in layout.pieces()] == [5, 6, 9]


@pytest.mark.parametrize(
    ("marks", "word"),
    [
        ({"position_ids": torch.zeros(3, 3, 10)}, "position_ids must have the shape of input_ids"),
        ({"seq_idx": torch.zeros(3, 9)}, "seq_idx must have the shape"),
        ({"cu_seq_lens_q": [0, 8, 31]}, "at most the 30 tokens"),
        ({"cu_seq_lens_q": [3, 8, 30]}, "go up from 0"),
        ({"cu_seq_lens_q": [0, 8, 7, 30]}, "go up from 0"),
        ({"cu_seq_lens_q": []}, "go up from 0"),
    ],
)
def test_marks_of_documents_that_do_not_fit_are_refused(marks, word):
    with pytest.raises(InvalidRequest, match=f"batch 7: .*{word}"):
        Layout.of({"input_ids": IDS, **marks}, 7)


@pytest.mark.parametrize("value", [-1, 2**64, 1.5, "3", None])
def test_a_seed_or_epoch_that_is_no_number_of_64_bits_is_refused(value):
    for seed, epoch in ((value, 0), (0, value)):
        with pytest.raises(InvalidRequest, match="whole number"):
            ScoreOptions.of("sampled", 1.0, seed, epoch)
    assert ScoreOptions.of("sampled", 1.0, np.int64(3), 2**64 - 1).seed == 3


@pytest.mark.parametrize("ahead", [0, -3, "30s", 2.5])
def test_a_stream_of_sequences_is_ahead_by_a_number_of_them(ahead):
    with pytest.raises(InvalidRequest, match="number of sequences"):
        stream_sequences(lambda *_: None, [], ScoreOptions.of("sampled", 1.0, 0, 0), ahead)  # type: ignore[arg-type,return-value]


class Noted(Teacher):
    """Answers nothing, and keeps the messages that would have been sent."""

    info = teacher_pb2.TeacherInfo()  # type: ignore[assignment]

    def __init__(self) -> None:
        self.requests: list[teacher_pb2.ScoreRequest] = []

    def submit(self, piece: Piece, options: ScoreOptions) -> Future:
        self.requests.append(_request(piece, options))
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

"""Draws over the wire: unbiased, repeatable, the same everywhere; id tables that travel."""

import shutil
from pathlib import Path

import grpc
import pytest
import torch

from logit_codec import IdTable, SampledTargets, fit_id_table
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import InvalidRequest, LocalTeacher, connect
from teacher_server.engine.loading import ID_TABLE_NAME
from tests.conftest import Served
from tests.support import tiny

VOCAB = 1001


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def drawn(teacher, sequences, **options) -> list[SampledTargets]:
    found = [targets for _, targets in teacher.stream(sequences, **options)]
    assert all(isinstance(targets, SampledTargets) for targets in found)
    return found


def same(first: SampledTargets, second: SampledTargets) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("row_splits", "token_ids", "counts", "realized_logprob")
    )


def test_the_default_targets_are_64_draws_and_the_same_request_draws_the_same(
    gemma_service: Served,
):
    sequences = tiny.random_sequences(12, VOCAB, seed=3)
    with connect(gemma_service.address) as teacher:
        together = drawn(teacher, sequences, ahead=12)
        alone = [drawn(teacher, [sequence], ahead=1)[0] for sequence in sequences]
        later = drawn(teacher, sequences, epoch=1)
        otherwise = drawn(teacher, sequences, seed=1)
    for sequence, targets in zip(sequences, together, strict=True):
        assert targets.num_draws == 64
        assert targets.num_rows == len(sequence) - 1
        sums = torch.zeros(targets.num_rows, dtype=torch.int64)
        sums.index_add_(0, targets.entry_rows(), targets.counts)
        assert (sums == 64).all()
    assert all(map(same, together, alone))
    assert not any(map(same, together, later))
    assert not any(map(same, together, otherwise))


def test_draws_over_epochs_average_to_the_models_own_distribution(gemma_service):
    model = tiny.make_model("Gemma2", VOCAB)
    sequence = tiny.random_sequences(1, VOCAB, seed=5)[0][:9]
    exact = torch.softmax(tiny.dense_logits(model, sequence), 1)
    total = torch.zeros_like(exact)
    epochs = 64
    with connect(gemma_service.address) as teacher:
        for epoch in range(epochs):
            total += drawn(teacher, [sequence], epoch=epoch)[0].to_dense()
    # A count of systematic draws is floor(64 p) or one more: its variance is at most 1/4.
    limit = 5 * 0.5 / 64 / epochs**0.5
    assert (total / epochs - exact).abs().max() < limit


def test_rows_of_a_masked_batch_draw_what_the_whole_sequence_draws(gemma_service: Served):
    sequence = tiny.random_sequences(1, VOCAB, seed=6)[0]
    labels = sequence.clone()
    labels[:5] = -100
    batch = {"input_ids": sequence[None], "labels": labels[None]}
    with connect(gemma_service.address) as teacher:
        (whole,) = drawn(teacher, [sequence])
        ((_, some),) = teacher.stream_batches([batch], ahead=1)
    assert same(some, whole[4:])


def test_a_local_teacher_draws_the_same(gemma_service: Served):
    local = LocalTeacher(tiny.make_model("Gemma2", VOCAB))
    sequences = tiny.random_sequences(4, VOCAB, seed=7)
    with connect(gemma_service.address) as teacher:
        assert all(map(same, drawn(teacher, sequences), drawn(local, sequences)))


def test_draws_out_of_range_are_refused(gemma_service: Served):
    with connect(gemma_service.address) as teacher:
        with pytest.raises(InvalidRequest, match="65536"):
            teacher.stream([[1, 2]], targets="sampled:65537")
        assert len(drawn(teacher, [[1, 2, 3]], targets="sampled:1000")) == 1


def test_an_id_table_is_fetched_once_and_shortens_the_answers(
    serve, tmp_path: Path, own_cache: Path
):
    model = tiny.make_model("GPT2", VOCAB)  # with favourite words, whatever the text
    torch.nn.init.normal_(
        model.transformer.ln_f.bias, std=8.0, generator=torch.Generator().manual_seed(0)
    )
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    folder = tmp_path / "fitted"
    shutil.copytree(plain, folder)
    sequences = tiny.random_sequences(30, VOCAB, seed=8)
    with connect(serve(plain).address) as teacher:
        expected = drawn(teacher, sequences)
        plain_nbytes = teacher.counters.payload_nbytes
        seen = torch.bincount(torch.cat([t.token_ids for t in expected]), minlength=VOCAB)
        unfitted = teacher.info.teacher_fingerprint
    table = fit_id_table(seen, sum(t.num_rows for t in expected))
    (folder / ID_TABLE_NAME).write_bytes(table.to_bytes())

    service = serve(folder)
    with connect(service.address) as teacher:
        assert teacher.info.teacher_fingerprint != unfitted
        assert list(teacher.info.id_tables) == [table.digest]
        assert all(map(same, drawn(teacher, sequences), expected))
        assert teacher.counters.payload_nbytes < plain_nbytes
    (kept,) = (own_cache / "id_tables").iterdir()
    assert IdTable.from_bytes(kept.read_bytes()).digest == table.digest
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")  # a damaged copy is fetched again
    with connect(service.address) as teacher:
        assert same(drawn(teacher, sequences[:1])[0], expected[0])
    assert IdTable.from_bytes(kept.read_bytes()).digest == table.digest

    with grpc.insecure_channel(service.address) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.FetchIdTable(teacher_pb2.FetchIdTableRequest(digest=bytes(16)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        (metadata,) = caught.value.trailing_metadata()
        assert metadata.key == "logitstream-error-bin"
        error = teacher_pb2.RequestError.FromString(metadata.value)
        assert error.reason == "UNKNOWN_ID_TABLE"
        request = teacher_pb2.ScoreRequest(
            request_id=1,
            token_ids=bytes(8),
            lengths=[2],
            targets=teacher_pb2.TargetSpec(
                sampled=teacher_pb2.Sampled(n=4), id_table=bytes(range(16))
            ),
        )
        (answer,) = stub.Score(iter([request]))
        assert answer.error.reason == "UNKNOWN_ID_TABLE"

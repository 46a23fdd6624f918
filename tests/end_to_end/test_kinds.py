"""Every kind of target over a real port: bytes, parts, resuming, damage, and who may ask for what."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import GivenIds, GivenIdsTargets, Targets, decode_parts, parse_targets
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import LocalTeacher, connect
from student_trainer.client import answers, links, refusals, stalls
from student_trainer.client.remote import RemoteTeacher
from student_trainer.commands.check import check
from student_trainer.teachers.request import Answer, Piece, ScoreOptions
from student_trainer.teachers.teacher import Teacher
from teacher_server.cli import main
from tests.conftest import Served, one_torch_thread
from tests.support import tiny
from tests.support.oracle import digest
from tests.support.proxy import Proxy, flips

VOCAB = 1001
KINDS = (
    "given_ids",
    "given_ids:bits=32,ranks=1,entropy=1",
    "realized",
    "hidden:int8",
    "hidden:bf16,realized=0",
    "features:layers=0+2",
    "sampled:16",
    "top_k:16",
    "dense:bf16",
)
SEQUENCES = tiny.random_sequences(16, VOCAB, seed=17)

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def service(serve, model_folder) -> Served:
    """A service that takes a whole vocabulary of given ids."""
    return serve(model_folder("Gemma2", VOCAB), "--targets.max-top-k", str(VOCAB))


@pytest.fixture(scope="module")
def remote(service: Served) -> Iterator[RemoteTeacher]:
    with connect(service.address) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def local(model_folder) -> LocalTeacher:
    folder: Path = model_folder("Gemma2", VOCAB)
    return LocalTeacher(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())


def draw_ids(num_rows: int, seed: int, most: int = 24) -> Tensor:
    """Some ids for each row, more or fewer; -1 fills up."""
    generator = torch.Generator().manual_seed(seed)
    ids_RM = torch.rand(num_rows, VOCAB, generator=generator).argsort(1)[:, :most]
    sizes_R = torch.randint(1, most + 1, (num_rows,), generator=generator)
    return ids_RM.masked_fill(torch.arange(most) >= sizes_R[:, None], -1)


GIVEN = [draw_ids(len(ids) - 1, seed, 3 + 5 * seed) for seed, ids in enumerate(SEQUENCES)]


def options(kind: str, count: int = len(SEQUENCES)) -> dict[str, Any]:
    """What `stream` takes for this kind."""
    given = {"given_ids": GIVEN[:count]} if kind.startswith("given") else {}
    return {"targets": kind, **given}


def submit(teacher: Teacher, kind: str, number: int) -> "Future[Answer]":
    given = GivenIds.of(GIVEN[number]) if kind.startswith("given") else None
    asked = ScoreOptions(parse_targets(kind), 1.0, 0, 0, keep_payloads=True)
    return teacher.submit(Piece(SEQUENCES[number], None, given), asked)


def test_every_kind_gives_the_same_bytes_alone_in_any_company_and_in_this_process(
    remote: RemoteTeacher, local: LocalTeacher
):
    """The packs of the service hold rows of every kind, with given ids of many widths."""
    assert remote.info.exactness == "bytes"
    asked = [(kind, number) for number in range(len(SEQUENCES)) for kind in KINDS]
    together = [submit(remote, *one) for one in asked]
    found = [future.result(120).payloads for future in together]
    for one, payloads in zip(asked, found, strict=True):
        if one[1] < 3:
            assert submit(remote, *one).result(60).payloads == payloads, one
            assert submit(local, *one).result(60).payloads == payloads, one


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_kind_resumes_where_it_was_saved(local: LocalTeacher, kind: str):
    whole = local.stream(SEQUENCES[:6], **options(kind, 6))
    for _ in range(2):
        next(whole)
    resumed = local.stream(SEQUENCES[:6], **options(kind, 6))
    resumed.load_state_dict(whole.state_dict())
    rest = list(whole)
    assert len(rest) == 4
    for (ids, mine), (theirs, other) in zip(rest, resumed, strict=True):
        assert torch.equal(ids, theirs)
        assert digest(mine) == digest(other)


def test_an_answer_of_many_given_ids_comes_in_parts_and_is_the_teachers_own(
    remote: RemoteTeacher, local: LocalTeacher
):
    ids = torch.arange(tiny.CONTEXT)
    given = torch.arange(VOCAB).expand(len(ids) - 1, VOCAB)
    piece = Piece(ids, None, GivenIds.of(given))
    spec = parse_targets("given_ids:bits=32,ranks=1")
    answer = remote.submit(piece, ScoreOptions(spec, 1.0, 0, 0, keep_payloads=True)).result(60)
    assert len(answer.payloads) > 1
    assert max(map(len, answer.payloads)) <= 1 << 20
    targets = answer.targets
    assert isinstance(targets, GivenIdsTargets)
    model = local._model.causal_lm
    expected = tiny.dense_logits(model, ids).log_softmax(1)
    assert (targets.logprobs.view(-1, VOCAB) - expected).abs().max() < 1e-4
    assert targets.ranks is not None
    ranks_RV, by_rank_RV = targets.ranks.view(-1, VOCAB).sort(1)
    assert bool((ranks_RV <= torch.arange(VOCAB)).all())  # equally likely ids share one
    assert (ranks_RV == torch.arange(VOCAB)).float().mean() > 0.9
    assert bool((targets.logprobs.view(-1, VOCAB).gather(1, by_rank_RV).diff(dim=1) <= 0).all())


def test_rows_of_several_sequences_take_their_given_ids_in_order(service: Served):
    """With another number for each row, and one sequence of which no row is wanted."""
    lengths, given = (4, 3, 5), [[3, 9], [5], [1, 2, 3, 1000], [7], [0, 8]]
    rows = [[0, 2], [], [0, 1, 3]]
    bits = [row in wanted for n, wanted in zip(lengths, rows, strict=True) for row in range(n - 1)]
    ids = torch.arange(sum(lengths))
    request = teacher_pb2.ScoreRequest(
        request_id=1,
        token_ids=ids.int().numpy().tobytes(),
        lengths=lengths,
        row_mask=sum(bit << place for place, bit in enumerate(bits)).to_bytes(2, "little"),
        targets=teacher_pb2.TargetSpec(given_ids={"bits": 32}),
        given_counts=[len(row) for row in given],
        given_ids=torch.tensor([one for row in given for one in row]).int().numpy().tobytes(),
    )
    payloads: dict[int, list[bytes]] = {}
    with grpc.insecure_channel(service.address) as channel:
        for response in teacher_pb2_grpc.TeacherStub(channel).Score(iter([request]), timeout=30):
            assert response.HasField("part"), response.error
            part = response.part
            payloads.setdefault(part.sequence, []).append(part.payload)
            if part.last:
                break
    with connect(service.address) as teacher:
        at = 0
        for sequence, tokens in enumerate(ids.split(list(lengths))):
            wanted = rows[sequence]
            named = GivenIds.of(_pair(given[at : at + len(wanted)]))
            at += len(wanted)
            if not wanted:
                assert sequence not in payloads
                continue
            found = decode_parts(payloads[sequence], given_ids=named)
            piece = Piece(tokens, torch.tensor(wanted), named)
            asked = ScoreOptions(parse_targets("given_ids:bits=32"), 1.0, 0, 0)
            assert digest(found) == digest(teacher.submit(piece, asked).result(30).targets)


def _pair(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    splits = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return splits, torch.tensor([one for row in rows for one in row], dtype=torch.int64)


def test_flipped_bits_in_answers_of_any_kind_are_never_trained_on(
    service: Served, remote: RemoteTeacher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stalls, "STALL_S", 2.0)
    monkeypatch.setattr(links, "PROBE_AFTER_S", 1.0)
    monkeypatch.setattr(answers, "MAX_ATTEMPTS", 20)
    monkeypatch.setattr(refusals, "MAX_UNREADABLE", 20)

    def read(teacher: RemoteTeacher, kind: str) -> list[str]:
        return [digest(targets) for _, targets in teacher.stream(SEQUENCES, **options(kind))]

    kinds = KINDS[:6]
    wanted = {kind: read(remote, kind) for kind in kinds}
    with Proxy(service.address) as proxy, connect(proxy.address) as teacher:
        for seed, kind in enumerate(kinds):
            proxy.down.damage = flips(seed, every_nbytes=40_000, first=proxy.down.nbytes)
            assert read(teacher, kind) == wanted[kind]
        counters = teacher.counters
        assert counters.corrupt + counters.reconnects


@pytest.mark.parametrize("kind", ["given_ids", "hidden:int8"])
def test_check_measures_kinds_that_need_something(service: Served, kind: str):
    found = check(service.address, targets=kind, credentials={}, seconds=0.2)
    assert 30 < found.bytes_per_token < 80  # 16 ids of 2 bytes, or 64 numbers, and what is beside
    assert found.tokens_per_s > 0


def test_describe_names_the_kinds_and_the_head(service: Served, capsys):
    assert main(["describe", service.address, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"given_ids", "realized", "hidden", "features"} < {*said["kinds"]}
    assert (len(said["head_fingerprint"]), said["hidden_size"], said["num_layers"]) == (32, 64, 2)


def test_logprobs_of_a_sequence_are_the_models_own(remote: RemoteTeacher, local: LocalTeacher):
    ids = SEQUENCES[0]
    logprobs = tiny.dense_logits(local._model.causal_lm, ids).log_softmax(1)
    expected = logprobs.gather(1, ids[1:, None])[:, 0]
    assert (remote.compute_logprobs(ids) - expected).abs().max() < 1e-5


def test_a_head_that_was_fetched_gives_the_teachers_own_distribution(
    remote: RemoteTeacher, local: LocalTeacher
):
    ids = SEQUENCES[1]
    ((_, targets),) = remote.stream([ids], targets="hidden:bf16")
    assert isinstance(targets, Targets)
    expected = tiny.dense_logits(local._model.causal_lm, ids).softmax(1)
    assert (targets.to_dense() - expected).abs().sum(1).max() < 0.05
    assert os.listdir(Path(os.environ["LOGITSTREAM_CACHE"]) / "heads")

"""One service, one client, over a real port: targets against the model's own logits, and the edges."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grpc
import pytest
import torch
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from logit_codec import DenseTargets, TopKTargets, decode
from protos import teacher_pb2, teacher_pb2_grpc
from student_trainer import (
    ForkedClient,
    IncompatibleTeacher,
    InvalidRequest,
    LocalTeacher,
    TeacherError,
    connect,
)
from student_trainer.client import stalls
from tests.conftest import Served
from tests.support import tiny

VOCAB = 1001


@pytest.fixture(scope="module")
def gemma(model_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder("Gemma2", VOCAB)).eval()


def by_row(targets: TopKTargets, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return targets.token_ids.view(-1, k), targets.logprobs.view(-1, k)


def same(one, other) -> bool:
    mine, theirs = one._tensors(), other._tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_targets_match_the_teachers_own_logits(serve, model_folder, name):
    service = serve(model_folder(name, VOCAB))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(name, VOCAB)).eval()
    sequences = tiny.random_sequences(12, VOCAB, seed=3)
    sequences += [sequences[0][:2], torch.arange(tiny.CONTEXT) % VOCAB]
    every = [(temperature, sequence) for temperature in (1.0, 2.0) for sequence in sequences]
    with connect(service.address) as teacher:
        streamed = itertools.chain.from_iterable(
            teacher.stream(sequences, targets="top_k:64,bits=16", temperature=temperature, ahead=16)
            for temperature in (1.0, 2.0)
        )
        for (ids, targets), (temperature, sequence) in zip(streamed, every, strict=True):
            assert torch.equal(ids, sequence)
            logits = tiny.dense_logits(model, sequence) / temperature
            logprobs = logits.log_softmax(1)
            expected = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :64]
            expected = expected.sort(1).values
            token_ids, kept = by_row(targets, 64)
            assert torch.equal(token_ids, expected)
            assert (kept - logprobs.gather(1, expected)).abs().max() < 1e-3
            tail = logprobs.exp().scatter(1, expected, 0.0).sum(1)
            assert (targets.tail_logprob.double().exp() - tail).abs().max() < 1e-6
            realized = logprobs.gather(1, sequence[1:, None])[:, 0]
            assert (targets.realized_logprob - realized).abs().max() < 1e-3
            assert (targets.log_z - logits.logsumexp(1)).abs().max() < 1e-4
    assert service.stop() == 0


def test_dense_targets_match_the_teachers_own_logits(gemma_service: Served, gemma):
    sequences = tiny.random_sequences(3, VOCAB, seed=4)
    with connect(gemma_service.address) as teacher:
        for sequence, (_, targets) in zip(
            sequences, teacher.stream(sequences, targets="dense:f32,entropy=1"), strict=True
        ):
            assert isinstance(targets, DenseTargets)
            logprobs = tiny.dense_logits(gemma, sequence).log_softmax(1)
            assert (targets.logprobs - logprobs).abs().max() < 1e-4
            entropy = torch.special.entr(logprobs.exp()).sum(1)
            assert (targets.entropy - entropy).abs().max() < 1e-3


def test_a_sequence_gives_the_same_bytes_alone_and_among_neighbours(gemma_service: Served):
    sequences = tiny.random_sequences(24, VOCAB, seed=5)
    with connect(gemma_service.address) as teacher:
        together = [targets for _, targets in teacher.stream(sequences, ahead=24)]
        alone = [next(teacher.stream([sequence], ahead=1))[1] for sequence in sequences]
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))


def test_the_local_teacher_gives_the_same_targets(gemma_service: Served, gemma):
    sequences = tiny.random_sequences(6, VOCAB, seed=6)
    local = LocalTeacher(gemma)
    for targets in ("top_k:32", "top_k:min_p=1/256,max_k=64,bits=5", "dense:bf16"):
        with connect(gemma_service.address) as teacher:
            pairs = zip(
                teacher.stream(sequences, targets=targets, temperature=2.0),
                local.stream(sequences, targets=targets, temperature=2.0),
                strict=True,
            )
            assert all(same(served, here) for (_, served), (_, here) in pairs)


def test_batches_come_back_whole_with_the_rows_of_their_trained_positions(gemma_service: Served):
    one, two = (torch.arange(start, start + 40) for start in (5, 300))
    padded = {
        "input_ids": torch.stack([one, torch.cat([two[:25], torch.zeros(15, dtype=torch.int64)])]),
        "attention_mask": torch.tensor([[1] * 40, [1] * 25 + [0] * 15]),
        "name": "padded",
    }
    left = {
        "input_ids": torch.stack([one, torch.cat([torch.zeros(15, dtype=torch.int64), two[:25]])]),
        "attention_mask": torch.tensor([[1] * 40, [0] * 15 + [1] * 25]),
    }
    labels = torch.stack([one, two]).clone()
    labels[0, :10] = -100
    labels[1, 30:] = -100
    masked = {"input_ids": torch.stack([one, two]), "labels": labels}
    packed = {
        "input_ids": torch.cat([one, two])[None],
        "position_ids": torch.cat([torch.arange(40), torch.arange(40)])[None],
    }
    with connect(gemma_service.address) as teacher:
        rows_one, rows_two, rows_short = (
            targets for _, targets in teacher.stream([one, two, two[:25]])
        )
        loader = [padded, left, masked, packed] * 2
        for given, (batch, targets) in zip(
            loader, teacher.stream_batches(loader, ahead="1s"), strict=True
        ):
            assert batch is given
            if given is padded or given is left:
                expected = [rows_one, rows_short]
            elif given is masked:
                expected = [rows_one[9:], rows_two[:29]]
            else:
                expected = [rows_one, rows_two]
            assert same(targets, type(targets).cat(expected))


def test_order_is_kept_whatever_the_lengths_and_the_window(gemma_service: Served):
    sequences = tiny.random_sequences(60, VOCAB, seed=7)
    with connect(gemma_service.address) as teacher:
        for ahead in (1, 7, 60):
            back = [ids for ids, _ in teacher.stream(sequences, ahead=ahead)]
            assert all(torch.equal(a, b) for a, b in zip(back, sequences, strict=True))


def test_the_source_is_read_only_as_far_ahead_as_asked(gemma_service: Served):
    taken = itertools.count()
    sequences = iter(lambda: (next(taken), torch.arange(9))[1], None)
    with connect(gemma_service.address) as teacher:
        pairs = teacher.stream(sequences, ahead=5)
        for _ in range(3):
            next(pairs)
        assert next(taken) == 7  # 3 handed out; before the third was waited for, 5 were in flight
        pairs.close()


@pytest.mark.parametrize(
    ("bad", "options", "words"),
    [
        ([1, VOCAB], {}, [str(VOCAB), f"0 to {VOCAB - 1}"]),
        ([1, -1], {}, ["-1"]),
        (list(range(tiny.CONTEXT + 1)), {}, [str(tiny.CONTEXT + 1), f"at most {tiny.CONTEXT}"]),
        ([5], {}, ["1 tokens", "at least 2"]),
        ([], {}, ["whole numbers"]),
        ([1, 2], {"targets": "top_k:257"}, ["between 1 and 256", "257"]),
        ([1, 2], {"targets": "hiden:int8"}, ["hiden", "sampled, top_k, ", "hidden"]),
        ([1, 2], {"targets": "top_k:0"}, ["between 1", "got 0"]),
        ([1, 2], {"temperature": 0.0}, ["temperature", "0.0"]),
        ([1, 2], {"ahead": 0}, ["ahead", "0"]),
        (["a", "b"], {}, ["token ids", "list"]),
        (torch.zeros(2, 3, dtype=torch.int64), {}, ["one row", "(2, 3)"]),
    ],
)
def test_bad_input_says_what_was_got_and_what_is_allowed(gemma_service, bad, options, words):
    with connect(gemma_service.address) as teacher:
        with pytest.raises(InvalidRequest) as caught:
            list(teacher.stream([bad], **options))
        assert all(word in str(caught.value) for word in words)
        assert len(list(teacher.stream([[1, 2, 3]]))) == 1  # the service goes on


def raw_request(number: int, ids: list[int], **fields) -> teacher_pb2.ScoreRequest:
    token_ids = torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
    spec = teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=4, bits=16))
    defaults = {"token_ids": token_ids, "lengths": [len(ids)], "targets": spec}
    return teacher_pb2.ScoreRequest(request_id=number, **{**defaults, **fields})


def test_good_requests_are_answered_among_bad_ones_on_one_stream(gemma_service: Served):
    good = {2: [1, 2, 3], 4: list(range(200)), 7: [9, 8]}
    requests = [
        raw_request(1, [1, VOCAB + 5]),
        raw_request(2, good[2]),
        raw_request(3, []),
        raw_request(4, good[4]),
        raw_request(5, list(range(300))),
        raw_request(6, [1, 2], teacher_fingerprint="00"),
        raw_request(7, good[7]),
        raw_request(8, [1, 2], targets=teacher_pb2.TargetSpec()),
    ]
    with grpc.insecure_channel(gemma_service.address) as channel:
        answers = list(teacher_pb2_grpc.TeacherStub(channel).Score(iter(requests), timeout=30))
    errors = {one.request_id: one.error for one in answers if one.HasField("error")}
    parts = {one.request_id: one.part for one in answers if one.HasField("part")}
    assert len(answers) == len(requests)
    assert {number: error.code for number, error in errors.items()} == {
        1: 3,
        3: 3,
        5: 3,
        6: 9,
        8: 3,
    }
    for number, ids in good.items():
        part = parts[number]
        assert part.last
        assert part.num_rows == decode(part.payload).num_rows == len(ids) - 1
    for error in errors.values():
        assert error.reason
        assert error.field
        assert "/" not in error.message  # no path leaks


def test_several_sequences_of_one_request_come_in_parts_of_at_most_1_mib(gemma_service: Served):
    ids = list(range(256)) * 2
    spec = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
    token_ids = torch.tensor(ids * 2, dtype=torch.int32).numpy().tobytes()
    request = raw_request(
        1, ids, token_ids=token_ids, lengths=[256] * 4, targets=spec, first_rows=[0, 0, 200, 254]
    )
    with grpc.insecure_channel(gemma_service.address) as channel:
        answers = list(teacher_pb2_grpc.TeacherStub(channel).Score(iter([request]), timeout=30))
    parts = [answer.part for answer in answers]
    assert sorted(part.sequence for part in parts) == [0, 1, 2, 3]
    assert {part.sequence: part.num_rows for part in parts} == {0: 255, 1: 255, 2: 55, 3: 1}
    assert [part.last for part in parts] == [False, False, False, True]
    assert all(answer.ByteSize() <= 1 << 20 for answer in answers)


def test_a_long_dense_answer_is_split_and_joined(serve, model_folder):
    service = serve(model_folder("Llama", 32003))
    sequence = torch.arange(100)
    with connect(service.address) as teacher:
        ((_, targets),) = teacher.stream([sequence], targets="dense:f32")
        assert teacher.counters.payload_nbytes > 8 << 20
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("Llama", 32003)).eval()
    logprobs = tiny.dense_logits(model, sequence).log_softmax(1)
    assert (targets.logprobs - logprobs).abs().max() < 1e-4
    assert service.stop() == 0


def test_health_and_reflection_answer(gemma_service: Served):
    with grpc.insecure_channel(gemma_service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "logitstream.v1.Teacher"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([ask]), timeout=5)
        names = {service.name for service in answer.list_services_response.service}
        assert "logitstream.v1.Teacher" in names


def test_another_tokenizer_is_refused_at_connect_with_both_fingerprints(
    serve, model_folder, tmp_path: Path
):
    folder = tiny.save_model(tmp_path / "teacher", "Gemma2", 1001)
    teacher_tokenizer = tiny.make_tokenizer(["a", "b", "c"])
    teacher_tokenizer.save_pretrained(folder)
    service = serve(folder)
    with connect(service.address, tokenizer=teacher_tokenizer) as teacher:
        assert teacher.info.effective_vocab_size == len(teacher_tokenizer)
        ours = teacher.info.tokenizer_fingerprint
    with pytest.raises(IncompatibleTeacher) as caught:
        connect(service.address, tokenizer=tiny.make_tokenizer(["a", "b", "d"]))
    assert ours in str(caught.value)
    assert service.stop() == 0


def test_ids_beyond_the_tokenizer_have_probability_zero(serve, tmp_path: Path):
    folder = tiny.save_model(tmp_path / "teacher", "Gemma2", 64)
    tiny.make_tokenizer(["a", "b", "c"]).save_pretrained(folder)
    service = serve(folder)
    with connect(service.address) as teacher:
        assert (teacher.info.vocab_size, teacher.info.effective_vocab_size) == (64, 5)
        ((_, dense),) = teacher.stream([[0, 1, 2, 3, 4]], targets="dense:f32")
        assert dense.to_dense()[:, 5:].sum() == 0
        assert torch.allclose(dense.to_dense().sum(1), torch.ones(4))
        with pytest.raises(InvalidRequest, match="0 to 4"):
            list(teacher.stream([[0, 5]], targets="top_k:2"))
    assert service.stop() == 0


def _touch_in_child(teacher) -> None:
    try:
        list(teacher.stream([[1, 2, 3]]))
    except ForkedClient:
        os._exit(17)
    os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_touches_the_client_gets_an_error_at_once(gemma_service: Served):
    with connect(gemma_service.address) as teacher:
        list(teacher.stream([[1, 2, 3]]))
        child = os.fork()
        if child == 0:
            _touch_in_child(teacher)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended[0] == child, "the child hung"
        assert os.waitstatus_to_exitcode(ended[1]) == 17
        assert len(list(teacher.stream([[1, 2, 3]]))) == 1  # the parent goes on


def test_a_closed_teacher_says_so(gemma_service: Served):
    with connect(gemma_service.address) as teacher:
        pass
    with pytest.raises(TeacherError, match="closed"):
        list(teacher.stream([[1, 2]]))


def test_a_stream_that_is_left_early_disturbs_nothing(gemma_service: Served):
    sequences = tiny.random_sequences(40, VOCAB, seed=8)
    with connect(gemma_service.address) as teacher:
        for _ in range(5):
            pairs = teacher.stream(sequences, ahead=32)
            next(pairs)
            pairs.close()
        assert len(list(teacher.stream(sequences))) == len(sequences)


def test_a_link_that_nobody_used_for_long_is_not_taken_for_a_dead_one(
    gemma_service: Served, monkeypatch, caplog
):
    # A link that works on something is given 6 times: enough on a machine that does other things, too.
    monkeypatch.setattr(stalls, "STALL_S", 0.5)
    with connect(gemma_service.address) as teacher:
        for _ in range(2):
            assert len(list(teacher.stream([[1, 2, 3]]))) == 1
            time.sleep(5.0)  # as an evaluation between two epochs
        assert teacher.counters.reconnects == 0
    assert "lost the teacher" not in caplog.text


def test_two_clients_of_one_process_share_the_service(gemma_service: Served):
    sequences = tiny.random_sequences(20, VOCAB, seed=9)
    with connect(gemma_service.address) as one, connect(gemma_service.address) as two:
        found: list = [None, None]

        def work(index: int, teacher) -> None:
            found[index] = [targets for _, targets in teacher.stream(sequences)]

        threads = [threading.Thread(target=work, args=(i, t)) for i, t in enumerate((one, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_importing_the_client_loads_neither_ray_nor_transformers():
    code = textwrap.dedent("""
        import sys, student_trainer, student_trainer.data
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"ray", "transformers", "tyro", "pydantic", "matplotlib"}, loaded
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_client_quiets_grpcs_own_lines_unless_they_are_wanted():
    code = "import os, student_trainer; print(os.environ['GRPC_VERBOSITY'])"
    without = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    for environment, wanted in (
        (without, "ERROR"),
        ({**without, "GRPC_VERBOSITY": "INFO"}, "INFO"),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ended.stdout.strip() == wanted

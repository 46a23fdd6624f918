"""Commands as people run them: exit codes, one-line errors, and processes that are killed."""

import contextlib
import json
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from logit_codec.kinds import KINDS
from student_trainer import IncompatibleTeacher, TeacherUnavailable, connect
from tests.conftest import ENDLESS_CLIENT, Served
from tests.support import tiny

VOCAB = 1001


def run(*command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=seconds
    )


def free_port() -> int:
    """A port that nobody has, below those that the kernel gives to connections: one of those could
    be taken before a service listens on it."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def one_line(text: str) -> str:
    """The last line on stderr, which must be the whole message: no traceback anywhere."""
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_describe_prints_what_the_service_says(gemma_service: Served):
    plain = run("teacher_server", "describe", gemma_service.address)
    assert plain.returncode == 0
    assert "Gemma2ForCausalLM" in plain.stdout
    found = json.loads(run("teacher_server", "describe", gemma_service.address, "--json").stdout)
    with connect(gemma_service.address) as teacher:
        assert found["teacher_fingerprint"] == teacher.info.teacher_fingerprint
    assert found["vocab_size"] == found["effective_vocab_size"] == VOCAB
    assert found["max_sequence_tokens"] == tiny.CONTEXT
    assert found["kinds"] == [*KINDS]
    assert found["exactness"] == "bytes"
    assert found["limits"]["max_top_k"] == 256
    (replica,) = found["replicas"]
    assert replica["address"] == gemma_service.address
    assert replica["state"] == "ready"


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (
            ("serve", "--standalone", "--model", "/no/such/folder"),
            1,
            ["/no/such/folder", "save_pretrained"],
        ),
        (("serve", "--standalone", "--model", "{empty}"), 1, ["config.json"]),
        (("serve", "--model", "{empty}", "--port", "99999"), 2, ["65535"]),
        (("serve", "--modle", "x"), 2, ["--modle"]),
        (("serve", "@{empty}/none.toml"), 2, ["none.toml"]),
        (("serve", "--model", "{empty}", "--host", "0.0.0.0"), 2, ["--allow-public"]),
        (("describe", "127.0.0.1:1"), 1, ["127.0.0.1:1", "UNAVAILABLE"]),
        ((), 2, ["serve"]),
    ],
)
def test_server_errors_are_one_clear_line(tmp_path: Path, command, code, words):
    ended = run("teacher_server", *[word.format(empty=tmp_path) for word in command])
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    text = " ".join((ended.stderr + ended.stdout).split())
    assert all(word in text for word in words), text


def test_a_folder_with_pickled_weights_only_is_refused(model_folder, tmp_path: Path):
    (tmp_path / "config.json").write_text(
        (model_folder("Gemma2", VOCAB) / "config.json").read_text()
    )
    torch.save({}, tmp_path / "pytorch_model.bin")
    ended = run("teacher_server", "serve", "--standalone", "--model", str(tmp_path), "--port", "0")
    assert ended.returncode == 1
    assert "safetensors" in one_line(ended.stderr)


def test_a_second_service_on_the_same_port_fails_and_the_first_goes_on(
    gemma_service: Served, model_folder
):
    port = gemma_service.address.rpartition(":")[2]
    ended = run(
        "teacher_server", "serve", "--model", str(model_folder("Gemma2", VOCAB)), "--port", port
    )
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in one_line(ended.stderr)
    assert "--port" in one_line(ended.stderr)
    with connect(gemma_service.address) as teacher:
        assert len(list(teacher.stream([[1, 2, 3]]))) == 1


def test_ctrl_c_drains_the_service_and_it_exits_with_0(serve, model_folder):
    service = serve(model_folder("Gemma2", VOCAB))
    sequences = tiny.random_sequences(400, VOCAB, seed=1)
    with connect(service.address, patience_s=1.0) as teacher:
        pairs = teacher.stream(sequences, ahead=64)
        next(pairs)
        assert service.stop(signal.SIGINT, seconds=20) == 0
        with pytest.raises(TeacherUnavailable) as caught:
            list(pairs)
        assert service.address in str(caught.value)
        assert "stream item" in str(caught.value)  # and says how far it came
    assert "Traceback" not in service.output()


def test_a_trainer_goes_on_after_the_service_was_killed_and_restarted(serve, model_folder):
    folder = model_folder("Gemma2", VOCAB)
    port = str(free_port())
    service = serve(folder, "--port", port)
    sequences = tiny.random_sequences(150, VOCAB, seed=2)
    with connect(service.address) as teacher:
        expected = [targets for _, targets in teacher.stream(sequences, ahead=150)]
        pairs = teacher.stream(sequences, ahead=20)
        got = [next(pairs) for _ in range(10)]
        service.stop(signal.SIGKILL)
        again = serve(folder, "--port", port, ready=False)
        got += list(pairs)
        assert teacher.counters.reconnects >= 1
    assert again.stop() == 0
    for (ids, targets), sequence, wanted in zip(got, sequences, expected, strict=True):
        assert torch.equal(ids, sequence)
        assert torch.equal(targets.token_ids, wanted.token_ids)
        assert torch.equal(targets.counts, wanted.counts)


def test_another_teacher_on_the_same_address_is_refused(serve, model_folder, tmp_path: Path):
    port = str(free_port())
    service = serve(model_folder("Gemma2", VOCAB), "--port", port)
    with connect(service.address) as teacher:
        pairs = teacher.stream(tiny.random_sequences(80, VOCAB), ahead=4)
        next(pairs)
        before = teacher.info.teacher_fingerprint
        service.stop(signal.SIGKILL)
        other = serve(tiny.save_model(tmp_path, "Gemma2", VOCAB, seed=1), "--port", port)
        with pytest.raises(IncompatibleTeacher, match=before):
            list(pairs)
    assert other.stop() == 0


def test_a_killed_trainer_leaves_nothing_behind(gemma_service: Served):
    trainer = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_CLIENT, gemma_service.address],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline().strip() == "streaming"
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    # Its 256 queued sequences are dropped: another client is served at once, not behind them.
    with connect(gemma_service.address) as teacher:
        assert len(list(teacher.stream(tiny.random_sequences(20, VOCAB)))) == 20
    assert "Traceback" not in gemma_service.output()


def test_ctrl_c_in_a_trainer_ends_it(gemma_service: Served):
    trainer = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_CLIENT, gemma_service.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline().strip() == "streaming"
    trainer.send_signal(signal.SIGINT)
    _, errors = trainer.communicate(timeout=20)
    assert trainer.returncode != 0
    assert errors.strip().endswith("KeyboardInterrupt")


def test_a_script_that_never_closes_its_teacher_ends_quietly(gemma_service: Served):
    code = """
import sys, torch
from student_trainer import connect
teacher = connect(sys.argv[1])
pairs = teacher.stream(iter(lambda: torch.arange(200), None), ahead=64)
for _ in range(3):
    next(pairs)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, gemma_service.address],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_connect_to_nobody_fails_soon_and_says_what_to_check():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(TeacherUnavailable) as caught:
        connect(address, patience_s=1.0)
    assert address in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


def test_connect_to_a_port_that_accepts_and_says_nothing_fails(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TeacherUnavailable, match=address):
            connect(address, patience_s=1.0)


def poison() -> None:
    """Runs in the service: rows after a token 13 are not numbers, and token 666 is a bug."""
    from teacher_server.engine.model import TeacherModel
    from teacher_server.replica import Replica

    start, hidden_states = Replica.start, TeacherModel.hidden_states
    started: list[bool] = []

    async def serve(self, *arguments, **options):
        started.append(True)
        return await start(self, *arguments, **options)

    def poisoned(self, token_ids, *arguments):
        hidden = hidden_states(self, token_ids, *arguments).clone()
        if not started:  # what the replica tries before has any ids
            return hidden
        if (token_ids == 666).any():
            raise RuntimeError("planted /secret/path")
        hidden[token_ids == 13] = float("nan")
        return hidden

    Replica.start, TeacherModel.hidden_states = serve, poisoned


def test_a_poisoned_sequence_fails_alone(serve, model_folder):
    from student_trainer import TargetsCorrupt, TeacherInternalError

    service = serve(model_folder("Gemma2", VOCAB), hook=poison)
    good = [torch.arange(20, 50), torch.arange(100, 130)]
    with connect(service.address) as teacher:
        expected = [targets for _, targets in teacher.stream(good)]
        for bad, kind, words in (
            ([5, 6, 13, 7], TargetsCorrupt, ["row 2"]),
            ([5, 666, 7], TeacherInternalError, ["incident"]),
        ):
            pairs = teacher.stream([good[0], bad, good[1]], ahead=3)
            assert torch.equal(next(pairs)[1].counts, expected[0].counts)
            with pytest.raises(kind) as caught:
                next(pairs)
            assert all(word in str(caught.value) for word in words)
            assert "secret" not in str(caught.value)
            assert torch.equal(next(teacher.stream([good[1]]))[1].counts, expected[1].counts)
    assert "planted /secret/path" in service.output()  # the operator finds the whole story
    assert service.stop() == 0


def test_the_queue_is_bounded_and_a_full_one_is_waited_out(serve, model_folder):
    service = serve(model_folder("Gemma2", VOCAB), "--batch.max-queued-tokens", "512")
    sequences = [torch.arange(200)] * 60
    with connect(service.address) as teacher:
        assert len(list(teacher.stream(sequences, ahead=60))) == 60
        assert teacher.counters.resent > 0
    assert service.stop() == 0


def test_a_request_that_is_larger_than_the_queue_enters_it_piece_by_piece(serve, model_folder):
    import grpc

    from protos import teacher_pb2, teacher_pb2_grpc

    service = serve(model_folder("Gemma2", VOCAB), "--batch.max-queued-tokens", "512")
    request = teacher_pb2.ScoreRequest(
        token_ids=torch.arange(200, dtype=torch.int32).repeat(12).numpy().tobytes(),
        lengths=[200] * 12,
        targets=teacher_pb2.TargetSpec(top_k=teacher_pb2.TopK(k=1, bits=8)),
    )
    with grpc.insecure_channel(service.address) as channel:
        answers = list(teacher_pb2_grpc.TeacherStub(channel).Score(iter([request])))
    assert [answer.part.last for answer in answers] == [False] * 11 + [True]
    assert {answer.part.sequence for answer in answers} == set(range(12))
    assert service.stop() == 0


def test_a_reader_that_stops_reading_holds_up_nobody_else(serve, model_folder):
    service = serve(model_folder("Llama", 32003))
    release = threading.Event()

    def slow(address: str) -> None:
        import grpc

        from protos import teacher_pb2, teacher_pb2_grpc

        spec = teacher_pb2.TargetSpec(dense=teacher_pb2.Dense(bits=32))
        ids = torch.arange(100, dtype=torch.int32).numpy().tobytes()
        requests = (
            teacher_pb2.ScoreRequest(request_id=n, token_ids=ids, lengths=[100], targets=spec)
            for n in range(20)
        )
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(address, options=options) as channel:
            answers = teacher_pb2_grpc.TeacherStub(channel).Score(requests)
            next(answers)
            release.wait(60)
            answers.cancel()

    thread = threading.Thread(target=slow, args=(service.address,))
    thread.start()
    try:
        with connect(service.address) as teacher:
            assert len(list(teacher.stream([torch.arange(100)] * 20))) == 20
    finally:
        release.set()
        thread.join()
    assert service.stop() == 0


def test_sigterm_in_the_middle_of_loading_ends_the_process(model_folder):
    service = subprocess.Popen(
        [
            *(sys.executable, "-m", "teacher_server", "serve", "--port", "0"),
            *("--model", str(model_folder("Gemma2", VOCAB))),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.0)
    service.terminate()
    service.communicate(timeout=20)
    assert service.returncode in (0, 130, -signal.SIGTERM)

"""Several workers with Ray Train take the steps of one process, also after a crash."""

# ruff: noqa: F401, F811
# Fixtures are imported, and asked for by their names.
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from student_trainer import LocalTeacher, Recorded
from student_trainer.cli import main
from student_trainer.config import TrainConfig
from student_trainer.hf.checkpoints import read_step
from student_trainer.ray_train.driver import FOLDER
from student_trainer.training import checkpoints
from student_trainer.training import run as runs
from student_trainer.training.corpus import read_corpus, read_tokenizer
from student_trainer.training.results import Results
from tests.end_to_end.conftest import (
    WORDS,
    student_folder,
    teacher_folder,
    teacher_model,
    text,
    trained_service,
    write_config,
)
from tests.ray.conftest import Launched, wait_for
from tests.support import tiny
from tests.support.teams import add_team, make_certs

# tests/end_to_end/test_ranks.py has the steps of two processes without Ray, and is fast.
pytestmark = [pytest.mark.ray, pytest.mark.slow]

TARGETS = "top_k:8"
SETTINGS = {
    "sequence_length": 32,
    "batch_size": 6,
    "steps": 12,
    "learning_rate": 3e-3,
    "targets": TARGETS,
    "ce_weight": 0.3,
    "log_every": 4,
}


@pytest.fixture(scope="module")
def settings(student_folder, text, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """84 sequences, every 20th held out."""
    some = tmp_path_factory.mktemp("some") / "text.txt"
    some.write_text(" ".join(text.read_text().split()[: 84 * 32]))
    return {**SETTINGS, "student": str(student_folder), "data": [str(some)]}


@pytest.fixture(scope="module")
def with_dropout(settings, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same for a student that drops units: every worker has random numbers of its own."""
    folder = tmp_path_factory.mktemp("dropout")
    tiny.make_student(dropout=0.2).config.save_pretrained(folder)
    tiny.make_tokenizer(WORDS).save_pretrained(folder)
    more = {"steps": 60, "checkpoint_every": 5, "targets": "sampled:16"}
    return {**settings, **more, "student": str(folder)}


@pytest.fixture(scope="module")
def record(settings, teacher_model, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("record"))
    record_into(folder, settings, teacher_model, ("train", "held_out"))
    return folder


def record_into(folder: str, settings: dict, teacher_model, parts: tuple[str, ...]) -> None:
    """Records the targets of parts of the data."""
    config = TrainConfig(**settings, record=folder, output=Path(folder))
    corpus = read_corpus(config, read_tokenizer(config.student))
    with Recorded(folder, LocalTeacher(teacher_model, corpus.tokenizer)) as recorded:
        rows = [row["input_ids"] for part in parts for row in getattr(corpus, part)]
        for _ in recorded.stream(rows, targets=TARGETS):
            pass


@dataclass
class Training:
    """`student-trainer train` with workers."""

    process: subprocess.Popen[str]
    output: Path
    log: Path

    def end(self, seconds: float = 240) -> str:
        """Its log, once it has ended well."""
        code = self.process.wait(seconds)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def saved(self) -> int:
        """The step of the newest checkpoint; 0 for none."""
        found = checkpoints.find_all(self.output / "checkpoints")
        return read_step(found[-1]) if found else 0

    def wait_saved(self, step: int) -> None:
        wait_for(lambda: self.saved() >= step or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.log.read_text()


@contextmanager
def training(
    settings: dict,
    output: Path,
    *flags: str,
    on: Launched | None = None,
    workers: int = 2,
    more: Mapping[str, str] | None = None,
) -> Iterator[Training]:
    """Trains on the Ray of `on`, or on one of its own; what still runs in the end is killed.

    more: variables of its environment, which that of the workers of `on` does not have.
    """
    output.mkdir(exist_ok=True)
    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1"}
    if on is not None:
        environment |= {**on.environment, "RAY_AUTH_MODE": "token"}
        flags = ("--ray-address", on.ray_address, *flags)
    config = write_config(output / "train.toml", output=str(output), workers=workers, **settings)
    log = output / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "student_trainer", "train", config, *flags],
            stdout=file,
            stderr=file,
            text=True,
            env={**os.environ, **environment, **(more or {})},
            start_new_session=True,
        )
    try:
        yield Training(process, output, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def alone(settings: dict, output: Path, *flags: str) -> None:
    """The same in this process."""
    output.mkdir()
    config = write_config(output / "train.toml", output=str(output), **settings)
    assert main(["train", config, *flags]) == 0


def trained(output: Path) -> Tensor:
    weights = load_file(output / "student" / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def distance(one: Path, other: Path) -> float:
    return float((trained(one) - trained(other)).abs().max())


def test_two_workers_with_a_record_take_the_steps_of_one_process(
    service: Launched, settings, record, tmp_path: Path, capsys
):
    settings = {**settings, "record": record}
    with training(settings, tmp_path / "two", on=service) as two:
        alone(settings, tmp_path / "one")
        log = two.end()
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-6
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "student")
    assert start.config.hidden_size == 32
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    for name in ("distilled_loss", "teacher_loss", "distilled_top1_agreement"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-5)
    for name in ("trained_tokens", "steps", "teacher_fingerprint"):
        assert reports[1][name] == reports[0][name]
    assert reports[1]["bytes_per_token"] > 8
    assert "step 12 of 12" in log
    assert not (tmp_path / "two" / FOLDER).exists()


def worker_pids(launched: Launched) -> list[int]:
    title = "ray::RayTrainWorker"
    return sorted(pid for pid, name in launched.processes().items() if name.startswith(title))


@pytest.fixture(scope="module")
def uninterrupted(
    service: Launched,
    with_dropout,
    trained_service,
    tmp_path_factory,
) -> Path:
    """Two workers with streams of their own from a served teacher, and nothing goes wrong."""
    output = tmp_path_factory.mktemp("uninterrupted")
    flags = ("--teacher", trained_service.address)
    with training(with_dropout, output, *flags, on=service) as whole:
        whole.end()
    return output


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same_bits(
    service: Launched,
    with_dropout,
    trained_service,
    uninterrupted: Path,
    tmp_path: Path,
):
    flags = ("--teacher", trained_service.address)
    with training(with_dropout, tmp_path / "killed", *flags, on=service) as killed:
        killed.wait_saved(10)
        os.kill(worker_pids(service)[-1], signal.SIGKILL)
        log = killed.end()
    assert "resuming from" in log
    assert torch.equal(trained(tmp_path / "killed"), trained(uninterrupted))


def test_a_stopped_run_goes_on_with_the_same_bits(
    service: Launched,
    with_dropout,
    trained_service,
    uninterrupted: Path,
    tmp_path: Path,
):
    """Ctrl-C, then SIGKILL of the command."""
    flags = ("--teacher", trained_service.address)
    output = tmp_path / "stopped"
    with training(with_dropout, output, *flags, on=service) as first:
        first.wait_saved(5)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(120) == 130, first.log.read_text()
        last = first.log.read_text().splitlines()[-1]
        where = output / "checkpoints"
        kept = f"checkpoint of step {first.saved()} kept in {where}: run the same command"
        assert last == f"student-trainer: interrupted; {kept} to resume"
    with training(with_dropout, output, *flags, on=service) as second:
        second.wait_saved(first.saved() + 5)
    wait_for(lambda: not worker_pids(service), 60)
    assert 0 < second.saved() < with_dropout["steps"]
    with training(with_dropout, output, *flags, on=service) as third:
        assert "resuming from" in third.end()
    assert torch.equal(trained(output), trained(uninterrupted))
    with training(with_dropout, output, *flags, on=service) as finished:
        finished.end()  # nothing is left to do, and the report is written once more
    assert torch.equal(trained(output), trained(uninterrupted))


def test_another_number_of_workers_goes_on_with_the_same_steps(
    service: Launched,
    settings,
    trained_service,
    tmp_path: Path,
    capsys,
):
    settings = {**settings, "steps": 40, "checkpoint_every": 4}
    flags = ("--teacher", trained_service.address)
    output = tmp_path / "workers"
    with training(settings, output, *flags, on=service, workers=2) as first:
        first.wait_saved(8)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(120) == 130
    assert first.saved() < 40
    with training(settings, output, *flags, on=service, workers=3) as second:
        assert "resuming from" in second.end()
    alone(settings, tmp_path / "alone", *flags)
    assert distance(output, tmp_path / "alone") < 1e-6


def test_a_ray_of_its_own_is_on_loopback_and_leaves_nothing_behind(
    settings, record, tmp_path: Path
):
    from tests.ray.test_service import listening

    output = tmp_path / "own"
    settings = {**settings, "record": record, "steps": 40, "tensorboard": True}
    settings |= {"control": True, "shuffled_control": True}
    with training({**settings, "checkpoint_every": 4}, output) as run:
        launched = Launched(run.process, output, {})  # type: ignore[arg-type]
        run.wait_saved(4)
        processes = launched.processes()
        assert len(worker_pids(launched)) == 2
        loopback = {"0100007F", "0" * 16 + "FFFF0000" + "0100007F"}
        assert listening(set(processes)) <= loopback
        run.end()
        wait_for(lambda: not launched.processes(), 90)  # agents of Ray may linger
    report = json.loads((output / "report.json").read_text())
    assert report["gain"] == pytest.approx(report["control_loss"] - report["distilled_loss"])
    assert report["shuffled_loss"] > report["distilled_loss"]
    results = Results.load(output)
    for student in results.students.values():
        assert [one["step"] for one in student.measurements][-1] == 40
        assert student.measurements[-1]["held_out_loss"] == pytest.approx(student.scores.loss)
        assert "held_out_top1_agreement" in student.measurements[0]
    left = Path("/tmp").glob("student-*/session_*")
    assert not [path for path in left if path.name.endswith(f"_{run.process.pid}")]
    for name in ("distilled", "control", "shuffled"):
        assert (output / "tensorboard" / name).is_dir()


def test_what_would_fail_again_is_not_tried_again(
    service: Launched, settings, teacher_model, tmp_path: Path
):
    """A record without most of the text: the held-out part is there, so that it is a worker that
    finds out."""
    folder = str(tmp_path / "record")
    record_into(folder, settings, teacher_model, ("held_out",))
    with training({**settings, "record": folder}, tmp_path / "run", on=service) as run:
        assert run.process.wait(240) == 1
    log = run.log.read_text()
    assert 1 <= log.count("Error in training function") <= 2
    last = log.strip().splitlines()[-1]
    assert last.startswith("student-trainer: ")
    assert "record" in last


def test_workers_have_the_token_from_their_environment_and_nowhere_else(
    service: Launched, settings, teacher_folder, serve, tmp_path: Path
):
    """Those of a Ray of our own inherit it; on a cluster its absence is said."""
    certificates = make_certs(tmp_path)
    token = add_team(tmp_path / "teams.toml", "search")
    served = serve(teacher_folder, "--teams", str(tmp_path / "teams.toml"), *certificates)
    (tmp_path / "team.toml").write_text(
        f'address = "{served.address}"\nca = "ca.pem"\ntoken_env = "SEARCH_TOKEN"\n'
    )
    # Relative paths: workers have working directories of their own.
    flags = ("--teacher", os.path.relpath(tmp_path / "team.toml"))
    more = {"SEARCH_TOKEN": token}
    own, there = tmp_path / "own", tmp_path / "there"
    with training(settings, own, *flags, more=more) as run:
        launched = Launched(run.process, own, {})  # type: ignore[arg-type]
        wait_for(lambda: worker_pids(launched) or run.process.poll() is not None, 300)
        assert not [one for one in launched.processes().values() if token in one]
        sessions = Path("/tmp").glob(f"student-*/session_*_{run.process.pid}")
        (logs,) = sessions
        wait_for(lambda: "step 4 of 12" in run.log.read_text() or run.process.poll(), 300)
        assert token.encode() not in contents(logs)
        run.end()
    assert token.encode() not in contents(own)
    with training(settings, there, *flags, on=service, more=more) as run:
        assert run.process.wait(240) == 1
    last = run.log.read_text().strip().splitlines()[-1]
    for words in ("student-trainer: ", "no token in its environment", "TEACHER_TOKEN", "ray start"):
        assert words in last
    assert token.encode() not in contents(there)


def contents(folder: Path) -> bytes:
    """Of all files below."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(path.read_bytes() for path in files)

"""A client in Node.js, written from teacher.proto and FORMAT.md, gets what a Python one gets."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import (
    DenseSpec,
    DenseTargets,
    IdTable,
    SampledSpec,
    SampledTargets,
    Targets,
    TargetSpec,
    TopKSpec,
    TopKTargets,
    decode,
    fit_id_table,
)
from student_trainer import LocalTeacher, connect
from student_trainer.teachers.request import row_mask
from tests.conftest import Serve, Served
from tests.support import tiny

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
VOCAB = 5003
SEQUENCES = [[1, 2, 5002], list(range(7, 190)), [9, 9, 9, 9], [0, 5002]]
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")

QUESTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"targets": {"top_k": {"k": 16, "bits": 7}}},
    "top_k of 16 bits": {"targets": {"top_k": {"k": 64, "bits": 16}, "entropy": True}},
    "top_k above p": {"targets": {"top_k": {"k": 200, "bits": 5, "min_p": 0.001}}},
    "one entry of one row": {
        "sequences": [[0, 5002]],
        "targets": {"top_k": {"k": 1, "bits": 8}, "omit_log_z": True},
    },
    "with the teacher's table": {"targets": {"top_k": {"k": 16, "bits": 7}, "id_table": True}},
    "some rows": {"targets": {"top_k": {"k": 4, "bits": 6}}, "rows": [[1], [0, 7, 181], [2], [0]]},
    "sampled": {"targets": {"sampled": {"n": 64}}, "seed": 5, "epoch": 3},
    "sampled often": {"targets": {"sampled": {"n": 4000}, "entropy": True}, "temperature": 2.5},
    "sampled, with the table": {"targets": {"sampled": {"n": 64}, "id_table": True}},
    "dense": {"targets": {"dense": {"bits": 32}}, "temperature": 0.5},
    "dense of 16 bits": {"targets": {"dense": {"bits": 16}, "omit_realized_logprob": True}},
    "refused": {"targets": {"top_k": {"k": 4, "bits": 7}}, "temperature": 1e6},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and the packages that it needs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "client.mjs", "container.mjs"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode and any(word in done.stderr for word in NO_NETWORK):
        pytest.skip(f"npm cannot reach its registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with an id table of its own."""
    folder = tiny.save_model(tmp_path_factory.mktemp("teacher"), "Gemma2", VOCAB)
    table: IdTable = fit_id_table(torch.arange(VOCAB).flip(0) % 997, VOCAB)
    (folder / "id_table.bin").write_bytes(table.to_bytes())
    return folder


@pytest.fixture(scope="module")
def served(serve: Serve, teacher_folder: Path) -> Iterator[Served]:
    served = serve(teacher_folder)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def said(packages: Path, served: Served) -> dict[str, Any]:
    """What the client in Node.js prints."""
    questions = []
    for name, question in QUESTIONS.items():
        asked = {"name": name, "sequences": SEQUENCES, **question}
        if rows := asked.pop("rows", None):
            wanted = [
                row in wanted_rows
                for wanted_rows, ids in zip(rows, SEQUENCES, strict=True)
                for row in range(len(ids) - 1)
            ]
            mask = row_mask(torch.tensor(wanted).nonzero()[:, 0], len(wanted))
            assert mask is not None
            asked["row_mask"] = list(mask)
        questions.append(asked)
    done = subprocess.run(
        ["node", "client.mjs", served.address, str(HERE.parents[1])],
        cwd=packages,
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def local(teacher_folder: Path) -> LocalTeacher:
    return LocalTeacher(transformers.AutoModelForCausalLM.from_pretrained(teacher_folder))


def spec_of(targets: dict[str, Any]) -> TargetSpec:
    """What `stream` is given for the same targets."""
    kept = {
        "realized": not targets.get("omit_realized_logprob", False),
        "entropy": targets.get("entropy", False),
        "log_z": not targets.get("omit_log_z", False),
    }
    if "top_k" in targets:
        return TopKSpec(**targets["top_k"], **kept)
    if "sampled" in targets:
        return SampledSpec(**targets["sampled"], **kept)
    return DenseSpec(**targets["dense"], **kept)


def same(part: dict[str, Any], targets: Targets) -> None:
    """Fails unless what Node.js decoded has the bits of these targets."""

    def is_equal(name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            assert name not in part
            return
        raw = torch.frombuffer(bytearray(base64.b64decode(part[name])), dtype=torch.int32)
        wanted = tensor.reshape(-1)
        wanted = wanted.to(torch.int32) if wanted.dtype == torch.int64 else wanted.float()
        assert torch.equal(raw, wanted.view(torch.int32)), name

    assert part["kind"] == targets.kind
    assert part["temperature"] == targets.temperature
    is_equal("realized", targets.realized_logprob)
    is_equal("entropy", targets.entropy)
    is_equal("logZ", targets.log_z)
    if isinstance(targets, DenseTargets):
        is_equal("logprobs", targets.logprobs)
        return
    assert isinstance(targets, TopKTargets | SampledTargets)
    assert part["row_lengths"] == targets.row_splits.diff().tolist()
    is_equal("ids", targets.token_ids)
    if isinstance(targets, TopKTargets):
        is_equal("logprobs", targets.logprobs)
        is_equal("tail", targets.tail_logprob)
    else:
        is_equal("counts", targets.counts)


def parts_of(said: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """In the order of sequences and rows."""
    answer = said["answers"][name]
    assert answer["done"]
    return sorted(answer["parts"], key=lambda part: (part["sequence"], part["first_row"]))


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != "refused"])
def test_node_decodes_what_python_decodes(
    said: dict[str, Any], local: LocalTeacher, teacher_folder: Path, name: str
):
    table = IdTable.from_bytes((teacher_folder / "id_table.bin").read_bytes())
    parts = parts_of(said, name)
    read = []
    for part in parts:
        payload = base64.b64decode(part["payload"])
        read.append(decode(payload, id_tables=[table]))
        same(part, read[-1])
    question = QUESTIONS[name]
    # And it is what a teacher without any wire between gives.
    options = {key: question[key] for key in ("temperature", "seed", "epoch") if key in question}
    sequences = [torch.tensor(ids) for ids in question.get("sequences", SEQUENCES)]
    rows = question.get("rows")
    pairs = local.stream(sequences, targets=spec_of(question["targets"]), **options)
    for number, (_, wanted) in enumerate(pairs):
        own = [t for p, t in zip(parts, read, strict=True) if p["sequence"] == number]
        whole = Targets.cat(own)
        if rows is not None:
            wanted = Targets.cat([wanted[row : row + 1] for row in rows[number]])
        assert whole.num_rows == wanted.num_rows
        for field in wanted.row_fields:
            got, expected = getattr(whole, field), getattr(wanted, field)
            assert (got is None) == (expected is None), field
            assert got is None or torch.equal(got, expected), field
        for field in ("token_ids", "logprobs", "counts", "row_splits"):
            if hasattr(wanted, field):
                assert torch.equal(getattr(whole, field), getattr(wanted, field)), field


def test_the_questions_have_every_coding_and_more_parts_than_one(said: dict[str, Any]):
    answers = [parts_of(said, name) for name in QUESTIONS if name != "refused"]
    assert {part["id_coding"] for parts in answers for part in parts} == {0, 1, 2}
    assert any(part["first_row"] > 0 for parts in answers for part in parts)
    assert len(said["tables"]) == 1


def test_node_verifies_an_error_and_goes_on(said: dict[str, Any]):
    error = said["answers"]["refused"]["error"]
    assert error == {"code": 3, "reason": "TEMPERATURE_OUT_OF_RANGE", "field": "temperature"}


def test_node_reads_the_same_description(said: dict[str, Any], served: Served):
    with connect(served.address) as teacher:
        info = teacher.info
    assert said["info"] == {
        "teacher_fingerprint": info.teacher_fingerprint,
        "vocab_size": VOCAB,
        "format_versions": list(info.format_versions),
        "max_part_bytes": info.limits.max_part_bytes,
    }

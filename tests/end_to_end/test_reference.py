"""`student-trainer check --reference` against distributions that plain transformers computes."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from logit_codec import select
from student_trainer.cli import main
from student_trainer.commands import reference
from tests.conftest import Serve, Served
from tests.support import tiny
from tests.support.teams import add_team, command

SEQUENCE = 256
"""The context of the teacher."""


@pytest.fixture(scope="module")
def rounded_service(serve: Serve, teacher_folder: Path) -> Served:
    """The teacher in bfloat16."""
    return serve(teacher_folder, "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def short_text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text(" ".join(text.read_text().split()[:700]))
    return path


@pytest.fixture(scope="module")
def expected(teacher_folder: Path, short_text: Path) -> tuple[Tensor, Tensor]:
    """(N, V) logprobs in float64 of the reference and of what is served."""

    def logprobs(dtype: torch.dtype) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            teacher_folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        ids = torch.tensor(
            transformers.AutoTokenizer.from_pretrained(teacher_folder)(short_text.read_text())[
                "input_ids"
            ]
        )
        return torch.cat(
            [tiny.dense_logits(model, piece).log_softmax(-1) for piece in ids.split(SEQUENCE)]
        )

    return logprobs(torch.float32), logprobs(torch.bfloat16)


def describe(address: str) -> dict[str, Any]:
    return json.loads(command("describe", address, "--json"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["check", *map(str, arguments), "--log-level", "warning", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_whole_distributions_give_the_exact_divergence(
    rounded_service: Served, teacher_folder: Path, short_text: Path, expected, capsys
):
    found = run(
        capsys,
        *(rounded_service.address, "--reference", teacher_folder, "--text", short_text),
    )
    assert (found["dtype"], found["quantization"]) == ("bfloat16", "none")
    assert describe(rounded_service.address)["quantization"] == "none"
    compared = found["reference"]
    assert (compared["targets"], compared["bound"]) == ("dense", "exact")
    assert (compared["dtype"], compared["text"]) == ("float32", str(short_text))
    logp, logq = expected
    assert compared["rows"] == len(logp) == 700 - 3
    for name, one, other in (("kl", logp, logq), ("reverse_kl", logq, logp)):
        wanted = (one.exp() * (one - other)).sum(-1)
        assert wanted.mean() > 1e-6
        assert compared[name]["mean"] == pytest.approx(float(wanted.mean()), abs=1e-4, rel=0.2)
        assert compared[name]["max"] == pytest.approx(float(wanted.max()), abs=1e-3)
    same = (logp.argmax(-1) == logq.argmax(-1)).double().mean()
    assert compared["top1_agreement"] == pytest.approx(float(same), abs=0.01)


def test_a_team_without_the_scope_learns_a_lower_bound(
    serve: Serve, teacher_folder: Path, short_text: Path, expected, tmp_path: Path, capsys
):
    teams, token = tmp_path / "teams.toml", tmp_path / "token"
    token.write_text(add_team(teams, "plain"))
    flags = ("--dtype", "bfloat16", "--teams", str(teams), "--targets.max-top-k", "8")
    service = serve(teacher_folder, *flags)
    options = ("--reference", teacher_folder, "--text", short_text, "--token-file", token)
    compared = run(capsys, service.address, *options)["reference"]
    assert (compared["targets"], compared["bound"]) == ("top_k:8,bits=16", "lower bound")
    logp, logq = expected
    top = logq.topk(8).indices

    def join(logprobs: Tensor) -> Tensor:
        kept = logprobs.gather(1, top)
        rest = logprobs.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([kept, rest], 1)

    p, q = join(logp), join(logq)
    joined = (p.exp() * (p - q)).sum(1)
    whole = (logp.exp() * (logp - logq)).sum(1)
    assert compared["kl"]["mean"] == pytest.approx(float(joined.mean()), abs=1e-4)
    assert 0 < compared["kl"]["mean"] < float(whole.mean()) + 2e-5
    assert main(["check", service.address, *map(str, options)]) == 0
    out = capsys.readouterr().out
    assert "KL(reference || served): mean " in out
    assert "nats, lower bound" in out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "module"), [("torchao-int8", "torchao"), ("bitsandbytes-4bit", "bitsandbytes")]
)
def test_a_quantised_teacher_says_so_and_is_told_from_the_reference(
    method: str, module: str, serve: Serve, teacher_folder: Path, short_text: Path, capsys
):
    pytest.importorskip(module)
    service = serve(teacher_folder, "--quantization", method)
    options = ("--reference", teacher_folder, "--text", short_text)
    found = run(capsys, service.address, *options)
    assert found["quantization"] == f"{method} {importlib.metadata.version(module)}"
    assert found["exactness"] == "bytes"
    assert found["reference"]["quantization"] == "none"
    assert 1e-6 < found["reference"]["kl"]["mean"] < 0.2
    assert describe(service.address)["quantization"] == found["quantization"]
    options = (teacher_folder, teacher_folder, "--text", short_text, "--quantization-b", method)
    compared = json.loads(command("compare", *options, "--json", "--sequence-tokens", SEQUENCE))
    for name in ("kl", "reverse_kl"):
        for number in ("mean", "p50", "p99"):
            expected = compared[name][number]
            assert found["reference"][name][number] == pytest.approx(expected, abs=1e-5, rel=1e-3)


def test_without_a_text_the_reference_writes_one(
    trained_service: Served, teacher_folder: Path, capsys
):
    compared = run(capsys, trained_service.address, "--reference", teacher_folder)["reference"]
    assert compared["text"] == "written by the reference"
    assert compared["rows"] == reference.WRITTEN * (reference.WRITTEN_TOKENS - 1)
    assert compared["kl"]["max"] < 1e-5, "it is the same model in the same dtype"
    assert compared["top1_agreement"] > 0.99
    assert compared["logprob_error"] < 1e-4 + 1 / 4096


@pytest.mark.parametrize("targets", ["dense", "top_k:64,bits=16", "top_k:5,bits=16"])
def test_rows_are_measured_as_in_float64(targets: str):
    torch.manual_seed(0)
    logits_p, logits_q = 3 * torch.randn(9, 64), 3 * torch.randn(9, 64)
    next_ids = torch.randint(64, (9,))
    served = select(logits_q, targets, realized_ids=next_ids)
    found = reference.measure_rows(logits_p, served, next_ids)
    logp, logq = logits_p.double().log_softmax(-1), logits_q.double().log_softmax(-1)
    rows = torch.arange(9)
    error = (logp[rows, next_ids] - logq[rows, next_ids]).abs()
    torch.testing.assert_close(found.logprob_error.double(), error, rtol=0, atol=1e-3)
    error = (logits_p.logsumexp(1) - logits_q.logsumexp(1)).abs()
    torch.testing.assert_close(found.log_z_error, error, rtol=0, atol=1e-4)
    assert found.is_same_top.tolist() == (logp.argmax(1) == logq.argmax(1)).tolist()
    if targets == "top_k:5,bits=16":
        top = logq.topk(5).indices
        logp, logq = (
            torch.cat(
                [one.gather(1, top), one.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)], 1
            )
            for one in (logp, logq)
        )
    forward, reverse = (logp.exp() * (logp - logq)).sum(1), (logq.exp() * (logq - logp)).sum(1)
    torch.testing.assert_close(found.kl.double(), forward, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.reverse_kl.double(), reverse, rtol=1e-4, atol=1e-4)


def test_a_reference_of_another_vocabulary_or_none_is_refused(
    trained_service: Served, tmp_path: Path, short_text: Path, capsys
):
    other = tiny.save_model(tmp_path / "other", "Llama", 32)
    assert main(["check", trained_service.address, "--reference", str(other)]) == 1
    assert "other has 32 ids, the teacher" in capsys.readouterr().err
    assert main(["check", trained_service.address, "--reference", str(tmp_path / "none")]) == 1
    assert "--reference: there is no folder" in capsys.readouterr().err
    assert main(["check", trained_service.address, "--text", str(short_text)]) == 2
    assert "--text is what --reference is compared on" in capsys.readouterr().err
    bare = tiny.save_model(tmp_path / "bare", "Llama", 64)
    options = ("--reference", str(bare), "--text", str(short_text))
    assert main(["check", trained_service.address, *options]) == 1
    assert "bare has no tokenizer to read --text with" in capsys.readouterr().err

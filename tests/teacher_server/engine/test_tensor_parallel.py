"""Two ranks find what one process finds; what cannot be divided is refused by name."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from teacher_server.config import ServeConfig
from teacher_server.engine.engine import Engine
from teacher_server.engine.loading import load
from teacher_server.engine.tensor_parallel import check_divisible
from teacher_server.errors import ModelError
from tests.conftest import FORKSERVER
from tests.support import tiny
from tests.support.divided import RULES, SPECS, Found, find, find_divided

TEACHERS = {"Llama": 1000, "Gemma2": 1001, "Qwen3": 1003, "Mixtral": 1002}
"""Gemma 2 has one matrix for embeddings and head; odd vocabularies are divided unequally."""


@pytest.fixture(scope="module")
def divided(
    model_folder: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """What two ranks find, by teacher."""
    out = tmp_path_factory.mktemp("divided")
    folders = [model_folder(name, size) for name, size in TEACHERS.items()]
    process = FORKSERVER.Process(target=find_divided, args=(folders, [*TEACHERS.values()], out))
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    return {name: torch.load(out / f"{number}.pt") for number, name in enumerate(TEACHERS)}


@pytest.mark.parametrize("name", TEACHERS)
def test_two_ranks_find_what_one_process_finds(name, divided, model_folder):
    vocab_size = TEACHERS[name]
    alone = find(Engine(load(str(model_folder(name, vocab_size)), device="cpu")), vocab_size)
    assert divided[name].keys() == alone.keys() == {*SPECS, *map(str, RULES)}
    for asked, sequences in alone.items():
        for expected, found in zip(sequences, divided[name][asked], strict=True):
            assert found.keys() == expected.keys()
            is_kept = expected["ids"] >= 0 if "ids" in expected else torch.tensor(True)
            for column, values in expected.items():
                if not values.dtype.is_floating_point:
                    assert torch.equal(found[column], values), (asked, column)
                    continue
                mine, theirs = found[column].float(), values.float()
                if column == "logprobs":  # of ids that fill a row up nothing is promised
                    mine, theirs = mine.where(is_kept, 0.0), theirs.where(is_kept, 0.0)
                states = "hidden" in asked or "features" in asked
                tolerance = 1e-2 if states and column in ("values", "hidden") else 1e-5
                torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_an_architecture_without_a_plan_is_refused_with_those_that_have_one(model_folder):
    config = transformers.AutoConfig.from_pretrained(model_folder("GPT2", 1001))
    with pytest.raises(ModelError) as refused:
        check_divisible(config, 2)
    message = str(refused.value)
    assert "GPT2LMHeadModel cannot be divided" in message
    assert "--tensor-parallel-size 1" in message
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"):
        assert name in message
    assert "GPT2LMHeadModel," not in message.partition("It has plans for")[2]


def test_heads_that_cannot_be_divided_are_refused_with_what_can():
    config = tiny.make_model("Llama", 101).config
    with pytest.raises(ModelError, match=r"2 key value heads.* among 4 devices.* 1 or 2"):
        check_divisible(config, 4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"device": "cuda:1", "standalone": True}, "not --device cuda:1"),
        ({"attention": "sdpa"}, "--attention does not go with"),
        ({"gpus_per_replica": 0.5}, "takes as many GPUs"),
        ({"tensor_parallel_size": 9}, "less than or equal to 8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        ServeConfig(model="m", **{"tensor_parallel_size": 2, **options})


def test_serve_refuses_a_teacher_that_cannot_be_divided_in_one_line(model_folder):
    command = [sys.executable, "-m", "teacher_server", "serve", str(model_folder("GPT2", 1001))]
    flags = ["--standalone", "--port", "0", "--device", "cpu", "--tensor-parallel-size", "2"]
    done = subprocess.run(
        [*command, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("teacher-server: GPT2LMHeadModel cannot be divided")
    assert "Traceback" not in done.stderr

"""Texts of a service, compared with those of the same model in this process."""

import pytest
import torch
import transformers

from logitstream.connection import Connection
from student_trainer import connect
from student_trainer.teachers.local import LocalTeacher
from teacher_server.commands import status
from tests.conftest import one_torch_thread
from tests.support.oracle import digest

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


@pytest.mark.parametrize("targets", ["sampled:16", "top_k:8", "dense", "hidden:bf16", None])
def test_a_service_writes_what_a_local_teacher_writes(
    trained_service, teacher_model, student_folder, targets, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOGITSTREAM_CACHE", str(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(student_folder)
    prompts = [torch.arange(2, 2 + length) for length in (1, 7, 40)]
    with connect(trained_service.address, tokenizer=tokenizer) as teacher:
        local = LocalTeacher(teacher_model, tokenizer)
        for arguments in ({}, {"temperature": 0, "stop_strings": ["w7"]}, {"top_p": 0.9}):
            found, wanted = (
                list(
                    one.generate(
                        prompts, targets=targets, max_new_tokens=20, num_samples=2, **arguments
                    )
                )
                for one in (teacher, local)
            )
            for mine, theirs in zip(found, wanted, strict=True):
                assert (mine.index, mine.sample) == (theirs.index, theirs.sample)
                assert mine.token_ids.tolist() == theirs.token_ids.tolist()
                assert mine.finish == theirs.finish
                if targets is None:
                    assert mine.targets is theirs.targets is None
                else:
                    assert digest(mine.targets) == digest(theirs.targets)


def test_status_shows_the_texts_that_are_written(trained_service):
    connection = Connection.to(trained_service.address)
    with connect(trained_service.address) as teacher:
        texts = teacher.generate(
            [torch.arange(2, 9)] * 3, targets=None, max_new_tokens=60, ignore_teacher_stop_ids=True
        )
        next(texts)
        list(texts)
    (replica,) = status.look(connection).replicas
    assert replica.numbers is not None
    assert replica.numbers.written_tokens_per_second >= 180 / 60
    assert (replica.numbers.texts_running, replica.numbers.texts_waiting) == (0, 0)
    assert "written/s" in status.table(status.look(connection))

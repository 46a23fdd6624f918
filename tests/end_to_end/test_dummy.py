"""A service with random weights, from a config.json alone, as a client sees it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from student_trainer import connect
from teacher_server.engine.dummy import REVISION
from tests.conftest import Serve

VOCAB = 1003


def test_a_client_is_told_and_gets_targets_all_the_same(
    serve: Serve, model_folder: Callable[[str, int], Path], tmp_path: Path
) -> None:
    shutil.copy(model_folder("Llama", VOCAB) / "config.json", tmp_path)
    service = serve(tmp_path, "--load-format", "dummy", "--threads", "1")
    assert f"the weights of {tmp_path} are random" in service.output()
    with connect(service.address) as teacher:
        assert teacher.info.revision == REVISION
        assert teacher.info.vocab_size == VOCAB
        ((_, targets),) = teacher.stream([torch.arange(30)], targets="dense")
        assert targets.logprobs.shape == (29, VOCAB)
        assert targets.logprobs.isfinite().all()
    assert service.stop() == 0

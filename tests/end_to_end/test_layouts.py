"""Packs and padded lengths, level bytes and tolerance: what a service says, and that all agree."""

import pytest
import torch

from student_trainer import connect
from tests.support import tiny

VOCAB = 1001
SEQUENCES = tiny.random_sequences(12, VOCAB, seed=3)


def logprobs(served) -> list[torch.Tensor]:
    with connect(served.address) as teacher:
        pairs = teacher.stream(SEQUENCES, targets="dense", ahead=12)
        return [targets.logprobs for _, targets in pairs]


def test_a_service_says_how_it_computes_and_all_ways_agree(serve, model_folder) -> None:
    folder = model_folder("Gemma2", VOCAB)
    ways = {
        "default": (),
        "tolerance": ("--exactness", "tolerance"),
        "padded": ("--attention", "eager"),
    }
    answers, infos = {}, {}
    for name, flags in ways.items():
        served = serve(folder, *flags)
        with connect(served.address) as teacher:
            infos[name] = teacher.info
        answers[name] = logprobs(served)
        assert "warmed up" in served.output()
        assert served.stop() == 0
    assert {name: (info.layout, info.exactness) for name, info in infos.items()} == {
        "default": ("packed", "bytes"),
        "tolerance": ("packed", "tolerance"),
        "padded": ("padded", "bytes"),
    }
    assert infos["default"].attention != infos["padded"].attention == "eager"
    assert len({info.teacher_fingerprint for info in infos.values()}) == len(ways)
    for name in ways:
        for one, other in zip(answers[name], answers["default"], strict=True):
            assert (one - other).abs().max() < 1e-4
    model = tiny.make_model("Gemma2", VOCAB)
    for sequence, ours in zip(SEQUENCES, answers["default"], strict=True):
        oracle = torch.log_softmax(tiny.dense_logits(model, sequence), 1)
        assert (ours - oracle[: len(ours)]).abs().max() < 1e-4


def test_a_warm_up_that_takes_too_long_is_one_clear_line(serve, model_folder) -> None:
    served = serve(model_folder("Gemma2", VOCAB), "--warm-up-s", "0.0001", ready=False)
    served.process.join(120)
    assert served.process.exitcode == 1
    assert "--warm-up-s" in served.output()
    assert "Traceback" not in served.output()


@pytest.mark.parametrize("flags", [("--exactness", "roughly"), ("--warm-up-s", "0")])
def test_values_that_are_not_allowed_are_refused(serve, model_folder, flags) -> None:
    served = serve(model_folder("Gemma2", VOCAB), *flags, ready=False)
    served.process.join(60)
    assert served.process.exitcode == 2
    assert flags[0] in served.output()

"""What is logged of the rows, against plain arithmetic on whole distributions."""

import pytest
import torch

from logit_codec import select
from student_trainer.hf.meter import CHUNK_ROWS, Meter, cross_entropies, means

VOCAB = 50


def logits_of(num_rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def targets_of(logits: torch.Tensor, spec: str, labels: torch.Tensor):
    uniforms = torch.rand(
        len(logits), dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    return select(logits, spec, uniforms=uniforms, realized_ids=labels)


@pytest.mark.parametrize("with_kd", [False, True])
@pytest.mark.parametrize("spec", ["top_k:5", "sampled:500", "dense:f32", "top_k:3,realized=0"])
def test_means_are_those_of_all_rows_since_the_last_time(spec, with_kd):
    meter = Meter(torch.device("cpu"))
    for seeds in ((1, 2), (3,)):  # taken twice: nothing of the first is left in the second
        agreement, ce, teacher_ce, tail = [], [], [], []
        for seed in seeds:
            num_rows = CHUNK_ROWS + 100 * seed
            student, teacher = logits_of(num_rows, seed), logits_of(num_rows, 10 + seed)
            labels = torch.arange(num_rows) % VOCAB
            targets = targets_of(teacher, spec, labels)
            rows = torch.arange(num_rows)
            ce.append(-student.log_softmax(1)[rows, labels])
            teacher_ce.append(-teacher.log_softmax(1)[rows, labels])
            agreement.append(student.argmax(1) == teacher.argmax(1))
            k = int(spec[6]) if spec.startswith("top_k") else VOCAB
            tail.append(1 - teacher.softmax(1).topk(k, 1).values.sum(1))
            meter.add(
                targets,
                kd_sum=torch.tensor(2.0 * num_rows) if with_kd else None,
                ce_sum=cross_entropies(student, labels).sum(),
                best_R=student.argmax(1),
            )
        found = means(meter.take())
        assert found.get("kd_loss") == (pytest.approx(2.0) if with_kd else None)
        assert found["ce_loss"] == pytest.approx(float(torch.cat(ce).mean()), rel=1e-5)
        close = 0.02 if spec.startswith("sampled") else 1e-9  # equal draws of two likely ids
        expected = float(torch.cat(agreement).double().mean())
        assert found["top1_agreement"] == pytest.approx(expected, abs=close)
        assert ("teacher_ce" in found) == ("realized=0" not in spec)
        if "teacher_ce" in found:
            assert found["teacher_ce"] == pytest.approx(
                float(torch.cat(teacher_ce).mean()), rel=1e-5
            )
        assert ("tail_mass" in found) == spec.startswith("top_k")
        if "tail_mass" in found:
            assert found["tail_mass"] == pytest.approx(float(torch.cat(tail).mean()), rel=1e-4)
    assert means(meter.take()) == {}


def test_of_equally_likely_ids_the_lowest_counts():
    logits = torch.zeros(2, VOCAB)
    logits[1, 7:9] = 5.0
    for spec in ("top_k:4", "dense:f32"):
        targets = targets_of(logits, spec, torch.zeros(2, dtype=torch.int64))
        assert targets.most_likely().tolist() == [0, 7]

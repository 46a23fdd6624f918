"""Students that look at later tokens are refused before anything is trained; all others are left alone."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from student_trainer.config import TrainConfig
from student_trainer.hf_trainer import DistillationTrainer
from student_trainer.losses.causal import check_causal
from student_trainer.training.students import make_student
from tests.conftest import one_torch_thread
from tests.support import tiny

one_thread = pytest.fixture(autouse=True)(one_torch_thread)

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_bert(**more) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(vocab_size=64, intermediate_size=64, **SMALL, **more)
    model = transformers.BertLMHeadModel(config)
    with torch.no_grad():  # livelier than a fresh one, as those of tiny.py
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def make_t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def make_trainer(folder: Path, student: nn.Module) -> DistillationTrainer:
    return DistillationTrainer(
        student,
        transformers.TrainingArguments(str(folder), use_cpu=True, report_to="none"),
        train_dataset=[],  # type: ignore[arg-type]
        teacher=tiny.make_student(),
    )


@pytest.mark.filterwarnings("ignore:.*is_decoder.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bidirectional_student_is_refused_when_the_trainer_is_made(tmp_path: Path, dtype):
    with pytest.raises(ValueError, match=r"BertLMHeadModel looks ahead.*causal LM"):
        make_trainer(tmp_path, make_bert().to(dtype))


def test_an_encoder_decoder_is_refused_when_the_trainer_is_made(tmp_path: Path):
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        make_trainer(tmp_path, make_t5())


@pytest.mark.parametrize("make", [make_bert, make_t5])
def test_their_folders_are_refused_as_students(tmp_path: Path, make):
    make().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"looks ahead|is an encoder-decoder"):
        make_student(TrainConfig(student=tmp_path, data=["*"], output=tmp_path, record="targets"))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_causal_students_pass_as_they_were(name):
    for dtype in (torch.float32, torch.bfloat16):
        student = tiny.make_model(name, 64).to(dtype).train()
        frozen = student.get_input_embeddings().eval()
        state = torch.get_rng_state()
        check_causal(student)
        assert torch.equal(torch.get_rng_state(), state)
        assert student.training
        assert not frozen.training
    check_causal(make_bert(is_decoder=True))


def test_students_that_cannot_be_tried_pass(caplog):
    class NeedsMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(8, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings

        def forward(self, input_ids, pixels):
            raise AssertionError

    with caplog.at_level("INFO"):
        check_causal(NeedsMore())
    assert "was not checked for looking ahead" in caplog.text
    with torch.device("meta"):
        check_causal(tiny.make_student())

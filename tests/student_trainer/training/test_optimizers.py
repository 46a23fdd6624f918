"""Muon and AdamW as one optimizer: the steps of the two, and what others expect of an optimizer."""

import io

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from student_trainer.training.optimizers import make_muon
from tests.conftest import one_torch_thread
from tests.support import tiny

RATE, STEPS = 1e-2, 6

# PEFT still uses transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
one_thread = pytest.fixture(autouse=True)(one_torch_thread)


def make_two(student: nn.Module) -> list[torch.optim.Optimizer]:
    """The oracle: two optimizers of torch, the parameters told apart by their names."""
    matrices, rest = [], []
    for name, parameter in student.named_parameters():
        outside = "embed" in name or "lm_head" in name
        (rest if parameter.ndim != 2 or outside else matrices).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=RATE, momentum=0.85, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def make_schedule(optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)


def take_step(student: nn.Module, optimizers, step: int) -> None:
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
    student(input_ids=ids, labels=ids).loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    for one in optimizers:
        one.step()
        one.zero_grad()


def weights(student: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def train_as_one(student: nn.Module, saved: bytes | None, steps: range) -> bytes:
    """Goes on from a checkpoint, as Trainers do, and returns one of the end."""
    inner = make_muon(student, learning_rate=RATE)
    schedule = make_schedule(inner)
    optimizer = accelerate.Accelerator(cpu=True).prepare(inner)
    parts = {"student": student, "optimizer": optimizer, "schedule": schedule}
    if saved is not None:
        for name, state in torch.load(io.BytesIO(saved), weights_only=True).items():
            parts[name].load_state_dict(state)
    for step in steps:
        take_step(student, [optimizer], step)
        schedule.step()
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    return file.getvalue()


@pytest.mark.parametrize("architecture", ["Gemma2", "Llama"])  # of which one ties its head
def test_the_steps_are_those_of_two_optimizers_and_go_on_from_a_checkpoint(architecture):
    two = tiny.make_model(architecture, 64)
    start = weights(two).clone()
    optimizers = make_two(two)
    schedules = [make_schedule(one) for one in optimizers]
    for step in range(STEPS):
        take_step(two, optimizers, step)
        for schedule in schedules:
            schedule.step()

    half = train_as_one(tiny.make_model(architecture, 64), None, range(3))
    one = tiny.make_model(architecture, 64, seed=1)
    train_as_one(one, half, range(3, STEPS))
    assert not torch.equal(weights(one), start)
    assert torch.equal(weights(one), weights(two))


def names_in(student: nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in student.named_parameters() if id(parameter) in ids}


def test_embeddings_are_not_for_muon_whatever_they_are_called():
    student = tiny.make_student()  # GPT-2: transformer.wte, which is also its head, and wpe
    muon, adamw = make_muon(student, learning_rate=RATE, weight_decay=0.1).param_groups
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < names_in(student, adamw)
    assert names_in(student, muon) == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert (muon["weight_decay"], adamw["weight_decay"]) == (0.1, 0.0)


def test_the_matrices_of_lora_are_for_muon_in_the_layers_and_for_adamw_at_both_ends():
    student = tiny.make_model("Llama", 64)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    student = peft.get_peft_model(student, config)
    muon, adamw = make_muon(student, learning_rate=RATE).param_groups
    assert all("q_proj.lora_" in name for name in names_in(student, muon))
    assert len(muon["params"]) == 4
    assert len(adamw["params"]) == 4
    assert all(parameter.requires_grad for parameter in [*muon["params"], *adamw["params"]])

    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    (muon,) = make_muon(
        peft.get_peft_model(tiny.make_model("Llama", 64), config), learning_rate=RATE
    ).param_groups
    assert len(muon["params"]) == 4

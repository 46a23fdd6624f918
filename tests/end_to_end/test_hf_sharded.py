"""Students whose parameters lie in parts on two ranks (gloo, CPU): FSDP2 in both layouts of its root,
DeepSpeed's ZeRO-2 and ZeRO-3. Each trains as one process does, or does not start."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from student_trainer.hf_trainer import DistillationArguments, DistillationTrainer
from tests.conftest import one_torch_thread
from tests.support import tiny
from tests.support.hf import make_trainer, shard_on_cpu
from tests.support.ranks import run_ranks

one_thread = pytest.fixture(autouse=True)(one_torch_thread)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

GLOBAL_BATCH = 4


def zero(stage: int) -> dict[str, object]:
    """Of parameters without a size that is too small to be cut."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",  # or it is 1, whatever the Trainer's is
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


class Sharded(DistillationTrainer):
    """Under FSDP2."""

    create_accelerator_and_postprocess = shard_on_cpu


class Reshards(transformers.TrainerCallback):
    """Every unit is freed after its forward pass, as accelerate up to 1.13 leaves the root too."""

    def on_train_begin(self, args, state, control, **kwargs):
        kwargs["model"].set_reshard_after_forward(True, recurse=True)


def whole(model: torch.nn.Module) -> torch.Tensor:
    """All weights, gathered."""
    found = []
    for parameter in model.parameters():
        if hasattr(parameter, "ds_status"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found.append(parameter.detach().clone().flatten())
        elif hasattr(parameter, "full_tensor"):
            found.append(parameter.full_tensor().detach().flatten())
        else:
            found.append(parameter.detach().flatten())
    return torch.cat(found)


def train_and_keep(folder: Path, rows: list, num_ranks: int, layout: str) -> None:
    """Two steps of two batches; the weights go to a file of this rank."""
    rank = int(os.environ.get("RANK", "0"))
    if layout.startswith("zero"):  # DeepSpeed uses what torch has deprecated
        warnings.simplefilter("default")
    parallel = {"deepspeed": zero(int(layout[-1]))} if layout.startswith("zero") else {}
    trainer = make_trainer(
        folder,
        rows,
        tiny.make_model("Gemma2", 64),
        kind=Sharded if layout.startswith("fsdp2") else DistillationTrainer,
        student=tiny.make_model("Llama", 64),
        distillation=DistillationArguments(
            targets="top_k:8", ce_weight=0.3, check_first_batch=False
        ),
        per_device_train_batch_size=GLOBAL_BATCH // num_ranks,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        **parallel,
    )
    if layout == "fsdp2, all reshards":
        trainer.add_callback(Reshards())
    trainer.train()
    assert hasattr(trainer.model.lm_head.weight, "full_tensor") == layout.startswith("fsdp2")
    assert (trainer._batch_loss.head is None) == (layout == "zero3")
    torch.save(whole(trainer.model), folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_and_keep(folder, rows, 1, "")
    return torch.load(folder / "rank-0.pt")


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp2",
        "fsdp2, all reshards",
        pytest.param("zero2", marks=needs_deepspeed),
        pytest.param("zero3", marks=needs_deepspeed),
    ],
)
def test_a_student_in_parts_takes_the_steps_of_one_process(rows, alone, tmp_path: Path, layout):
    codes = run_ranks(train_and_keep, tmp_path, rows, 2, layout)
    assert codes == [0, 0]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        assert (found - alone).abs().max() < 1e-5
    start = torch.cat([p.detach().flatten() for p in tiny.make_model("Llama", 64).parameters()])
    assert (alone - start).abs().max() > 1e-3

"""Makes students, identifies them by a digest, and saves them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from logitstream.files import whole_folder
from student_trainer import disk
from student_trainer.config import TrainConfig
from student_trainer.losses.causal import check_causal, refuse_encoder_decoder


def has_weights(folder: Path) -> bool:
    """Whether a student of this Hugging Face folder starts from the weights in it."""
    return any(folder.glob("*.safetensors"))


def student_digest(folder: Path) -> str:
    """A short name of what a student starts from: its config, and the sizes of weights if it has any.

    What the tokenizer is shows in the ids of the text.
    """
    found = xxhash.xxh3_128((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
    return found.hexdigest()


def outline(folder: Path) -> Any:
    """The student in a Hugging Face folder without any weights: shapes alone."""
    import transformers

    config = _read_config(folder)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _read_config(folder: Path) -> Any:
    """Raises ValueError for one that is nested too deep and for one of an encoder-decoder."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except RecursionError:
        raise ValueError(f"the config of the student in {folder} is nested too deep") from None
    refuse_encoder_decoder(config, f"the student in {folder}")
    return config


def make_student(folder: Path, *, seed: int, device: str) -> nn.Module:
    """The student in a Hugging Face folder; with random weights of `seed` if it has none.

    Raises ValueError for one that looks at later tokens.
    """
    import transformers
    from safetensors import SafetensorError

    torch.manual_seed(seed)
    config = _read_config(folder)
    try:
        if has_weights(folder):
            student: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True
            )
        else:
            student = transformers.AutoModelForCausalLM.from_config(config)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the weights in {folder} cannot be loaded: {reason}") from error
    student = student.float().to(device)
    check_causal(student)
    return student


def find_device(config: TrainConfig) -> str:
    """The device of torch. Raises ValueError for one that there is not."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(config.device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be auto, cpu, cuda or one such as cuda:1, got {config.device!r}"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch {torch.__version__} finds no GPU here")
    return config.device


def save_student(
    student: Any, tokenizer: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a Hugging Face folder, whole or not at all. Raises NotWritten.

    state_dict: the weights, where they have been gathered from several processes.
    """
    options: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    disk.give_room(folder.parent)
    with disk.writing(folder), whole_folder(folder) as partial:
        student.save_pretrained(partial, **options)
        tokenizer.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # which safetensors writes for the owner only
            shutil.copymode(partial / "config.json", weights)

"""Makes students, with adapters if they are asked for, identifies them by a digest, and saves them."""

import importlib.util
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from logitstream.extras import check_installed
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
    """Raises ValueError for one that is nested too deep, and for what is no student on its own."""
    import transformers

    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"the student in {folder} is an adapter of another model. Give a folder of both: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
            ".save_pretrained(FOLDER), and its tokenizer"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except RecursionError:
        raise ValueError(f"the config of the student in {folder} is nested too deep") from None
    refuse_encoder_decoder(config, f"the student in {folder}")
    return config


def check_student_options(config: TrainConfig) -> None:
    """Raises ValueError for a device, a package or a GPU that there is not."""
    device = find_device(config)
    if config.lora_r:
        check_installed("train", "peft")
    for name in ("load_in_8bit", "load_in_4bit"):
        if not getattr(config, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if device == "cpu":
            raise ValueError(
                f"{flag} needs a GPU, and this run is on the CPU. Leave it out: --dtype bfloat16 "
                "takes half of the memory of float32"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"{flag} needs bitsandbytes, which is not installed: "
                f"{sys.executable} -m pip install bitsandbytes"
            )


def make_student(config: TrainConfig) -> nn.Module:
    """Makes the student of a run: with the weights in its folder, or random ones of the run's seed.

    With LoRA, a PeftModel of which only the adapters are trained. Raises ValueError for a student
    that looks at later tokens, and for weights, layers or an attention that there are not.
    """
    import transformers
    from safetensors import SafetensorError

    check_student_options(config)
    torch.manual_seed(config.seed)
    folder, settings = config.student, _loading_settings(config)
    described = _read_config(folder)
    if config.lora_r and not has_weights(folder):
        raise ValueError(
            f"--lora-r {config.lora_r}: the student in {folder} has no weights (*.safetensors), and "
            "adapters are of no use without the weights that they were trained with"
        )
    try:
        if has_weights(folder):
            student: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, **settings
            )
        else:
            if config.dtype == "auto":
                del settings["dtype"]
            student = transformers.AutoModelForCausalLM.from_config(described, **settings)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be loaded: {_first_line(error)}"
        ) from error
    except ImportError as error:  # of an attention
        raise ValueError(f"the student in {folder} cannot be made: {_first_line(error)}") from error
    check_causal(student)
    return _add_adapters(student, config) if config.lora_r else student


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _loading_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns what transformers is told about how to load the student."""
    settings: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit or config.load_in_8bit:
        import transformers
        from accelerate import PartialState

        settings["device_map"] = {"": PartialState().device}  # quantized weights are never moved
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=config.load_in_8bit,
            load_in_4bit=config.load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if config.dtype == "auto" else config.dtype,
        )
    return settings


def _add_adapters(student: Any, config: TrainConfig) -> nn.Module:
    """Freezes a student's weights and wraps it in LoRA adapters, which begin as zeros."""
    import peft

    names = config.lora_target_modules
    adapters = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=names[0] if len(names) == 1 else names,
    )
    with warnings.catch_warnings():
        # PEFT says what it does about GPT-2's matrices, and calls transformers by old names.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return peft.get_peft_model(student, adapters)
        except ValueError as error:
            raise ValueError(f"--lora-target-modules: {error}") from None


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
    """Writes a Hugging Face folder, or that of an adapter, whole or not at all. Raises NotWritten.

    state_dict: the weights, where they have been gathered from several processes.
    """
    options: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    for adapter in getattr(student, "peft_config", {}).values():
        name, adapter.revision = name_on_hub(Path(adapter.base_model_name_or_path))
        adapter.base_model_name_or_path = name
        options["save_embedding_layers"] = False  # otherwise PEFT looks for the name on the hub
    disk.give_room(folder.parent)
    with disk.writing(folder), whole_folder(folder) as partial:
        student.save_pretrained(partial, **options)
        tokenizer.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # which safetensors writes for the owner only
            shutil.copymode(next(partial.glob("*config.json")), weights)


def name_on_hub(folder: Path) -> tuple[str, str | None]:
    """Returns ORG/NAME and the commit of a folder in the hub's cache; the path of any other."""
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix())
    if found is None:
        return str(folder.absolute()), None
    return found[1].replace("--", "/", 1), found[2]

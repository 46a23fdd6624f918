"""Finds the student that a command line names: a folder, or a model of the Hugging Face hub."""

import re
from pathlib import Path

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "*.txt", "README.md"]
"""What a student is made of on the hub, without its weights in other formats."""


def find_student(student: Path) -> Path:
    """Returns the folder of a student; of ORG/NAME without such a folder, that in the hub's cache.

    Raises ValueError if the hub, or its cache while offline, has no such model.
    """
    name = str(student)
    if student.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return student
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise ValueError(
            f"there is no folder {name}, where the student should be, and no model of that name "
            f"could be fetched from the hub ({type(error).__name__}). Give the path of a Hugging "
            f"Face folder, or download it where there is a network (hf download {name})."
        ) from error

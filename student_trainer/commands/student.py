"""Fetches the student that a command line names from the Hugging Face hub, and uploads a trained one."""

import re
from pathlib import Path

from student_trainer.config import StudentOptions

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "*.txt", "README.md"]
"""What a student is made of on the hub, without its weights in other formats."""


def find_student(student: Path, revision: str | None = None) -> Path:
    """Returns the folder of a student; of ORG/NAME without such a folder, that in the hub's cache.

    Raises ValueError if the hub, or its cache while offline, has no such model.
    """
    name = str(student)
    if student.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if revision is not None:
            raise ValueError(
                f"--revision {revision} is for a student of the hub, and {student} is a path: leave "
                "it out, or give ORG/NAME"
            )
        return student
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FILES)
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        at = "" if revision is None else f" at revision {revision}"
        raise ValueError(
            f"there is no folder {name}, where the student should be, and no model of that name{at} "
            f"could be fetched from the hub ({type(error).__name__}). Give the path of a Hugging "
            f"Face folder, or download it where there is a network (hf download {name})."
        ) from error


def make_hub_repo(options: StudentOptions, output: Path) -> str:
    """Makes the repository that a student will be uploaded to, unless it exists; returns its name.

    Raises ConnectionError if the hub cannot be reached or refuses: better before training than
    after it.
    """
    import huggingface_hub

    name = options.hub_model_id or output.absolute().name
    try:
        url = huggingface_hub.create_repo(
            name, private=options.hub_private_repo, exist_ok=True, repo_type="model"
        )
    except Exception as error:  # as above
        raise ConnectionError(
            f"--push-to-hub: cannot make or find {name} on the hub: {_first_line(error)}. It needs a "
            "network and a token that may write there (hf auth login, or HF_TOKEN). Without "
            "--push-to-hub the student is only saved; hf upload pushes it later."
        ) from error
    return url.repo_id


def push_student(options: StudentOptions, output: Path) -> str:
    """Uploads the student that is saved in the output folder; returns the address of its page.

    Raises ConnectionError, which says where the student is saved and how to try again.
    """
    import huggingface_hub

    folder, name = output / "student", options.hub_model_id or output.absolute().name
    try:
        name = make_hub_repo(options, output)
        commit = huggingface_hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload the distilled student"
        )
    except Exception as error:  # as above
        raise ConnectionError(
            f"the student is saved in {folder}, but could not be uploaded to {name}: "
            f"{_first_line(error)}. To try again: hf upload {name} {folder}"
        ) from error
    return str(commit.repo_url)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

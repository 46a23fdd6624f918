"""Reads the text of a run with the student's tokenizer."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer import data
from student_trainer.config import CorpusConfig

TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model"}
"""Beside those that the class of a tokenizer names."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The text of a run, as the student reads it."""

    tokenizer: Any
    sequences: Tensor
    """(N, L) int64: what is trained on."""
    held_out: Tensor
    """(M, L) int64: what is measured on."""

    @property
    def train(self) -> Any:
        return [{"input_ids": ids} for ids in self.sequences]

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([row["input_ids"] for row in rows])}

    @property
    def digest(self) -> str:
        return data.digest(self.sequences)

    @property
    def held_out_digest(self) -> str:
        return data.digest(self.held_out)


def read_tokenizer(student: Path) -> Any:
    """Of a student's folder. Raises ValueError if it has none."""
    import transformers

    check_folder(student)
    no_tokenizer = (
        f"the student in {student} has no tokenizer (no tokenizer.json or the like): put the "
        "teacher's into it, AutoTokenizer.from_pretrained(TEACHER).save_pretrained(STUDENT)"
    )
    names = {one.name for one in student.iterdir()}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    except RecursionError:
        raise ValueError(f"a file of the tokenizer in {student} is nested too deep") from None
    except (OSError, ValueError):
        if names & {*TOKENIZER_FILES, "vocab.json", "vocab.txt"}:
            raise  # there is one, and something is wrong with it
        raise ValueError(no_tokenizer) from None
    # Without any file of it some classes make an empty one, which knows no word.
    files = set(type(tokenizer).vocab_files_names.values())
    if files and not names & (files | TOKENIZER_FILES):
        raise ValueError(no_tokenizer)
    return tokenizer


def find_texts(config: CorpusConfig) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those to measure on, if they are given. Raises FileNotFoundError."""
    return data.find_files(config.data), data.find_files(config.held_out)


def read_corpus(config: CorpusConfig, tokenizer: Any) -> Corpus:
    """Reads and packs the text. Raises ValueError, FileNotFoundError."""
    length = config.sequence_length
    of_data, of_held_out = find_texts(config)
    data.look_through(of_data, label="data")
    if of_held_out:
        data.look_through(of_held_out, label="held-out data")
    sequences = data.pack(of_data, tokenizer, length, label="data")
    if of_held_out:
        held_out = data.pack(of_held_out, tokenizer, length, label="held-out data")
    else:
        is_held_out = torch.arange(len(sequences)) % 20 == 19
        held_out, sequences = sequences[is_held_out], sequences[~is_held_out]
        if len(held_out) == 0:
            raise ValueError(
                f"data is too short to hold some out: it has {len(sequences)} sequences of {length} "
                "tokens, and every 20th is held out. Give more, or --held-out files."
            )
    return Corpus(tokenizer, sequences, held_out[: config.held_out_sequences])


def check_ids(corpus: Corpus, num_ids: int) -> None:
    """Raises ValueError for a token that student and teacher do not share."""
    for name, sequences in (("data", corpus.sequences), ("the held-out text", corpus.held_out)):
        largest = int(sequences.max()) if len(sequences) else 0
        if largest >= num_ids:
            token = corpus.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{name} has token {token!r}, id {largest:,}; student and teacher share ids 0 to "
                f"{num_ids - 1:,}. Leave it out of the text."
            )


def check_folder(student: Path) -> None:
    """Raises ValueError for what is no folder of a student: the hub would be asked for it."""
    if (student / "config.json").is_file():
        return
    if student.exists():
        raise ValueError(f"{student} is not a student folder: it has no config.json")
    name = str(student)
    advice = "Give the path of a Hugging Face folder."
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        folder = name.rpartition("/")[2]
        advice = (
            "If it is a model of the Hugging Face hub, download it first (hf download "
            f"{name} --local-dir {folder}) and give --student {folder}."
        )
    raise ValueError(f"there is no folder {name}, where the student should be. {advice}")

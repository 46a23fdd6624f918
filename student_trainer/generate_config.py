"""Declares the options of `student-trainer generate`."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from logitstream.connection import check_address
from logitstream.options import Json, ServiceOptions
from student_trainer.aliases import GENERATE_ALIASES


class GenerateConfig(ServiceOptions):
    """Let a served teacher write texts after prompts, and store them with its distributions."""

    aliases: ClassVar = GENERATE_ALIASES

    teacher: str = Field(min_length=1)
    """HOST:PORT of the service, or a connection file (*.toml) of it."""
    student: Path
    """Hugging Face folder or hub id of the student to be trained: its tokenizer reads the prompts."""
    revision: str | None = None
    """Branch, tag or commit of a student of the hub; by default its main branch."""
    prompts: list[str] = Field(min_length=1)
    """What to continue: .txt, .jsonl or .parquet files (paths, folders, glob patterns, URLs), data sets
    of the hub (ORG/NAME or ORG/NAME:CONFIG), or a folder that `generate` wrote, of which the prompts
    are taken."""
    output: str = Field(min_length=1)
    """Folder, or URL such as s3://bucket/texts, to write to. Texts that it already has are not written
    again."""
    split: str = "train"
    """Split to read, of a data set of the hub or a folder of Parquet files."""
    streaming: bool = False
    """Read data sets while the teacher writes, instead of before: it starts at once, and how many
    texts there will be is not known."""
    prompt_column: str = ""
    """Column of .jsonl, Parquet and data sets that holds text, messages or token ids. By default it
    is found: prompt, messages, text or input_ids. Of messages, the assistant's last ones are left
    out."""
    chat_template: str = ""
    """File of a chat template (Jinja), instead of the tokenizer's own."""
    prompt_tokens: int = Field(default=0, ge=0)
    """Longer texts are cut to so many tokens; 0 leaves what the teacher takes. Chats are not cut:
    those that are too long for the teacher are left out."""
    prompt_every: int = Field(default=0, ge=0)
    """Of a long text, begin another prompt of --prompt-tokens at every so many tokens; 0: only its
    beginning is one."""
    split_lines: bool = False
    """Read each line of a .txt file as a text of its own."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Take only the first so many prompts; by default all."""

    targets: str = "sampled"
    """Targets to store of each token that is written, such as sampled, top_k:64 or hidden:int8; none
    stores the texts alone."""
    target_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the targets; give `train` the same as --temperature."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens to write after a prompt, unless the text ends before."""
    num_samples: int = Field(default=1, ge=1)
    """Texts to write after each prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the draws: 0 always takes the most likely token."""
    top_k: int = Field(default=0, ge=0)
    """Draw only from so many of the most likely tokens; 0 draws from all. Targets are of all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw only from the most likely tokens that have this probability together. Targets are of
    all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws: the same seed, prompt and settings give the same text."""
    stop_strings: list[str] = Field(default=[])
    """Strings that end a text. The teacher's own end tokens always do."""
    ahead: int = Field(default=64, ge=1)
    """Prompts that the teacher is asked to continue at a time."""
    as_json: Json = False
    """Print JSON."""

    @field_validator("teacher")
    @classmethod
    def _check_teacher(cls, teacher: str) -> str:
        return check_address(teacher)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.prompt_every and not self.prompt_tokens:
            raise ValueError("--prompt-every needs --prompt-tokens N: give both")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"--num-samples {self.num_samples} would be the same text at --temperature 0: leave "
                "one of them out"
            )
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"--temperature must be 0 or 0.001 to 1000, got {self.temperature:g}")
        return self

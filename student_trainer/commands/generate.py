"""`student-trainer generate`: lets a teacher write texts, and stores them with its distributions."""

import copy
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from logit_codec import TargetSpec, parse_targets
from student_trainer.client.remote import connect
from student_trainer.commands.show import show
from student_trainer.commands.student import find_student
from student_trainer.data.prompts import PromptReader, PromptSettings
from student_trainer.data.sources import Shard, find_shards
from student_trainer.errors import RecordError, TeacherError
from student_trainer.generate_config import GenerateConfig
from student_trainer.record.generated import GeneratedSet
from student_trainer.record.provenance import NO_TARGETS
from student_trainer.record.written import summarize
from student_trainer.teachers.generation import GenerateOptions
from student_trainer.teachers.teacher import Teacher

logger = logging.getLogger(__name__)


def run_generate(config: GenerateConfig) -> int:
    """Lets the teacher write the texts that the folder lacks; prints what the folder has."""
    options, shards = make_options(config), find_prompts(config)
    tokenizer = read_tokenizer(config)
    with connect(config.teacher, tokenizer=tokenizer, **config.credentials()) as teacher:
        check_teacher(config, options, teacher)
        try:
            numbers = generate(config, options, shards, teacher, tokenizer)
        except Stopped as stopped:
            print(
                f"student-trainer: interrupted; {stopped} are written in {config.output}: run the "
                "same command to resume",
                file=sys.stderr,
            )
            return 130
    show(numbers, as_json=config.as_json)
    return 0


class Stopped(KeyboardInterrupt):
    """Ctrl-C; the message says how many texts there are."""


def make_options(config: GenerateConfig) -> GenerateOptions:
    """Returns how each prompt is continued. Raises ValueError for targets that cannot be stored."""
    spec: TargetSpec | None = None
    if config.targets != NO_TARGETS:
        try:
            spec = parse_targets(config.targets)
        except ValueError as error:
            raise ValueError(f"--targets: {error}") from None
        if spec.needs_given_ids:
            raise ValueError(
                f"--targets {config.targets} needs ids for each token, which nobody can name before it "
                "is written: use --targets top_k, whose ids the teacher chooses"
            )
    return GenerateOptions(
        spec=spec,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        target_temperature=config.target_temperature,
        seed=config.seed,
        stop_strings=tuple(config.stop_strings),
        num_samples=config.num_samples,
    )


def find_prompts(config: GenerateConfig) -> list[Shard]:
    """Finds what the prompts are in, before any of it is read."""
    return find_shards(config.prompts, split=config.split, streaming=config.streaming)


def read_tokenizer(config: GenerateConfig) -> Any:
    """Reads the student's tokenizer, with the chat template that it is to use."""
    from student_trainer.training import corpus

    tokenizer = corpus.read_tokenizer(find_student(config.student, config.revision))
    if config.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = corpus.read_template(config.chat_template)
    return tokenizer


def generate(
    config: GenerateConfig,
    options: GenerateOptions,
    shards: list[Shard],
    teacher: Teacher,
    tokenizer: Any,
) -> dict[str, Any]:
    """Lets a teacher write what the folder lacks; returns what to tell of it.

    Raises Stopped after Ctrl-C, RecordError, ValueError for damaged data, and what a teacher can
    raise. What was written before is intact then.
    """
    longest = find_longest(config, teacher)
    texts = GeneratedSet(
        config.output, teacher.info, options, id_tables=teacher.id_tables, tokenizer=tokenizer
    )
    num_before = len(texts)
    reader = PromptReader(
        tokenizer,
        PromptSettings(
            longest=longest,
            column=config.prompt_column,
            num_tokens=config.prompt_tokens,
            every=config.prompt_every,
            split_lines=config.split_lines,
        ),
    )
    try:
        prompts: Iterable[np.ndarray] = itertools.islice(reader.read(shards), config.max_prompts)
        total = None
        if not config.streaming:  # so that what is damaged shows up before anything is written
            prompts = _read_all(prompts)
            total = len(prompts) * config.num_samples
            _tell_notes(reader, longest)
        written = _write(config, options, teacher, texts, prompts, total)
    except KeyboardInterrupt:
        texts.close()
        raise Stopped(f"{len(texts):,} texts") from None
    except TeacherError as error:
        texts.close()
        if texts.num_added and not isinstance(error, RecordError):  # which says so itself
            logger.warning(
                "%s texts are written in %s: run the same command to resume",
                f"{len(texts):,}",
                config.output,
            )
        raise
    finally:
        texts.close()
    if config.streaming:
        _tell_notes(reader, longest)
    return {
        "output": config.output,
        "texts": len(texts),
        "written": texts.num_added,
        "already_there": written.num_known,
        "prompts": reader.counts.prompts,
        "new_tokens": texts.num_tokens,
        "tokens_per_s": texts.num_tokens / written.seconds if texts.num_tokens else None,
        "seconds": written.seconds,
        "bytes_per_token": _divide(texts.num_payload_bytes, texts.num_tokens),
        **_summarize(config, num_before + texts.num_added),
        "targets": config.targets,
        "teacher": teacher.info.model,
        "teacher_fingerprint": teacher.info.teacher_fingerprint,
    }


def find_longest(config: GenerateConfig, teacher: Teacher) -> int:
    """Returns how many tokens a prompt may have. Raises ValueError if that is none."""
    info = teacher.info
    most = info.max_generation_tokens
    if not most:
        raise ValueError(
            f"the teacher at {config.teacher} ({info.model}) writes no texts, it only scores: its "
            "operator may have turned that off, or its architecture does not allow it "
            "(teacher-server describe)"
        )
    longest = min(most, info.max_sequence_tokens) - config.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"--max-new-tokens must be at most {min(most, info.max_sequence_tokens) - 1} for the "
            f"teacher at {config.teacher}, so that a prompt fits in front; got {config.max_new_tokens}"
        )
    if config.prompt_tokens > longest:
        raise ValueError(
            f"--prompt-tokens must be at most {longest}: the teacher at {config.teacher} takes "
            f"{min(most, info.max_sequence_tokens)} tokens, --max-new-tokens {config.max_new_tokens} "
            f"of which it writes; got {config.prompt_tokens}"
        )
    return longest


def check_teacher(config: GenerateConfig, options: GenerateOptions, teacher: Teacher) -> None:
    """Lets the teacher write one token, before anything long begins.

    Raises ValueError and what `Teacher.generate` does: the teacher may not allow the caller to let it
    write, or not know these targets.
    """
    find_longest(config, teacher)
    list(teacher.generate([[0]], targets=options.spec, max_new_tokens=1))


@dataclass(slots=True)
class _Written:
    """Counts what the teacher was not asked for, and how long the rest took."""

    num_known: int = 0
    seconds: float = 0.0
    waiting: dict[int, set[int]] = field(default_factory=dict)
    """By the number of a prompt that the teacher continues: samples that are not there yet."""


def _read_all(prompts: Iterable[np.ndarray]) -> list[np.ndarray]:
    with tqdm(prompts, desc="reading prompts", unit=" prompts", leave=False) as progress:
        found = list(progress)
    if not found:
        raise ValueError("there is no prompt in --prompts: nothing was read, or all was left out")
    return found


def _write(
    config: GenerateConfig,
    options: GenerateOptions,
    teacher: Teacher,
    texts: GeneratedSet,
    prompts: Iterable[np.ndarray],
    total: int | None,
) -> _Written:
    """Lets the teacher continue the prompts of which a text is missing, in their order."""
    written = _Written()
    with tqdm(total=total, desc="writing", unit=" texts", smoothing=0) as progress:
        began_s = time.monotonic()
        generations = teacher.generate(
            _find_missing(prompts, config.num_samples, texts, written, progress),
            targets=options.spec,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            target_temperature=options.target_temperature,
            seed=options.seed,
            stop_strings=options.stop_strings,
            num_samples=options.num_samples,
            ahead=config.ahead,
        )
        for generation in generations:
            missing = written.waiting[generation.index]
            if generation.sample in missing:
                missing.remove(generation.sample)
                texts.add(generation)
                progress.update()
            if not missing:
                del written.waiting[generation.index]
            rate = texts.num_tokens / (time.monotonic() - began_s)
            progress.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        written.seconds = time.monotonic() - began_s
    return written


def _find_missing(
    prompts: Iterable[np.ndarray],
    num_samples: int,
    texts: GeneratedSet,
    written: _Written,
    progress: "tqdm[Any]",
) -> Iterator[Tensor]:
    """Yields the prompts of which a text is missing; counts, and shows those that are there."""
    number = 0
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))
        missing = {sample for sample in range(num_samples) if not texts.has(ids, sample)}
        if num_samples - len(missing):
            count = num_samples - len(missing)
            written.num_known += count
            progress.n, progress.initial = progress.n + count, progress.initial + count
        if missing:
            if not number:
                texts.begin()
            written.waiting[number] = missing
            number += 1
            yield ids


def _tell_notes(reader: PromptReader, longest: int) -> None:
    for note in reader.counts.describe(longest):
        logger.warning(note)


def _summarize(config: GenerateConfig, num_texts: int) -> dict[str, Any]:
    """Returns what all texts in the folder are like, those of earlier runs too."""
    if not num_texts:
        return {}
    found = summarize(config.output)
    names = ("tokens", "mean_tokens", "repetition", "entropy", "nats")
    return {
        **{name: getattr(found, name) for name in names},
        **{f"finish_{how}": count for how, count in found.finish.items()},
        "set_tokens_per_s": found.tokens_per_s,
        "set_bytes_per_token": found.bytes_per_token,
    }


def _divide(part: float, whole: float) -> float | None:
    return part / whole if whole else None

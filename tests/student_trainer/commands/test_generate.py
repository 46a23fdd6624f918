"""`student-trainer generate` with a teacher in this process: what is written, resumed and refused."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from logit_codec import parse_targets
from logitstream.files import write_atomically
from student_trainer import LocalTeacher, Recorded
from student_trainer.commands import generate as command
from student_trainer.errors import (
    IncompatibleTeacher,
    InvalidRequest,
    RecordError,
    TeacherUnavailable,
)
from student_trainer.generate_config import GenerateConfig
from student_trainer.record.generated import measure_repetition
from student_trainer.record.written import is_written, summarize
from student_trainer.teachers.generation import Generation
from student_trainer.teachers.teacher import Teacher
from tests.support import tiny

WORDS = [f"w{number}" for number in range(62)]


class Writer(LocalTeacher):
    """A teacher whose user presses Ctrl-C after some texts, or that fails then."""

    stop_after: int | None = None
    stop_with: type[BaseException] = KeyboardInterrupt

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.asked = set[int]()

    def generate(self, prompts: Any, **options: Any) -> Generator[Generation, None, None]:
        for generation in super().generate(prompts, **options):
            if self.stop_after is not None and generation.index >= self.stop_after:
                raise self.stop_with("away")
            self.asked.add(generation.index)
            yield generation


def write(
    model: Any, teacher: Teacher, prompts: Any, *, targets: Any, **options: Any
) -> Iterator[Generation]:
    """Writes with transformers' generate; the teacher scores what was written."""
    for index, prompt in enumerate(prompts):
        for sample in range(options["num_samples"]):
            torch.manual_seed(options["seed"] + 7 * sample + int(prompt.sum()))
            drawn = {"do_sample": False}
            if options["temperature"]:
                drawn = {"do_sample": True, "temperature": options["temperature"], "top_k": 0}
            whole = model.generate(
                prompt[None],
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=options["max_new_tokens"],
                **drawn,
            )[0]
            written = whole[len(prompt) :]
            found = None
            if targets is not None:
                ((_, found),) = teacher.stream(
                    [whole], targets=targets, temperature=options["target_temperature"]
                )
                found = found[len(prompt) - 1 :]
            is_ended = int(written[-1]) == model.config.eos_token_id
            yield Generation(
                prompt, written, found, "stop" if is_ended else "length", index, sample
            )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer(WORDS)


@pytest.fixture
def teacher(tokenizer: Any) -> Writer:
    return Writer(tiny.make_model("Llama", len(tokenizer)), tokenizer)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(WORDS[number : number + 3 + number % 4])} for number in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(teacher: Any, prompts: Path, output: Path | str, **settings: Any) -> dict[str, Any]:
    config = GenerateConfig(
        teacher="127.0.0.1:1",
        student=Path("student"),
        prompts=[str(prompts)],
        output=str(output),
        **{"max_new_tokens": 8, "targets": "sampled:16", **settings},
    )
    options, shards = command.make_options(config), command.find_prompts(config)
    return command.generate(config, options, shards, teacher, teacher.tokenizer)


def read(folder: Path) -> list[dict[str, Any]]:
    found: Any = datasets.load_dataset(
        "parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), split="train"
    )
    return list(found)


def test_rows_hold_prompt_text_ids_and_how_they_came_about(teacher, prompts, tmp_path, tokenizer):
    said = run(teacher, prompts, tmp_path / "set", num_samples=2, seed=5)
    assert (said["texts"], said["written"], said["already_there"]) == (24, 24, 0)
    rows = read(tmp_path / "set")
    assert len(rows) == 24
    lines = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [line for line in lines for _ in range(2)]
    assert [row["sample"] for row in rows] == [0, 1] * 12
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        assert row["prompt_tokens"] == len(prompt)
        assert row["input_ids"] == prompt + row["token_ids"]
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert len(row["token_ids"]) == 8 or row["finish"] == "stop"
        assert row["spec"] == "sampled:16"
        assert json.loads(row["settings"]) == {
            **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 8, "seed": 5},
            **{"epoch": 0, "stop_ids": [], "stop_strings": [], "ignore_teacher_stop_ids": False},
        }
    assert said["new_tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert said["teacher_fingerprint"] == rows[0]["teacher"]


@pytest.mark.parametrize(
    "targets", ["sampled", "top_k:8", "dense:f32", "hidden:int8", "realized", "features:layers=1"]
)
def test_the_set_is_a_record_of_exactly_the_tokens_that_were_written(
    teacher, prompts, tmp_path, targets
):
    run(teacher, prompts, tmp_path / "set", targets=targets)
    rows = read(tmp_path / "set")
    prompts_ids = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    again = [*teacher.generate(prompts_ids, targets=targets, max_new_tokens=8)]
    with Recorded(tmp_path / "set", tokenizer=teacher.tokenizer) as record:
        assert len(record) == 12
        assert record.default_targets == str(parse_targets(targets))
        for row, written in zip(rows, again, strict=True):
            assert row["token_ids"] == written.token_ids.tolist()
            ids = torch.tensor(row["input_ids"])
            labels = torch.where(torch.arange(len(ids)) < row["prompt_tokens"], -100, ids)
            batch = {"input_ids": ids[None], "labels": labels[None]}
            if targets.startswith("hidden"):  # whose head is not on this disk
                assert record.has(ids, rows=torch.arange(row["prompt_tokens"] - 1, len(ids) - 1))
                continue
            ((_, found),) = record.stream_batches([batch])
            ((_, scored),) = teacher.stream([ids], targets=targets)
            scored = scored[row["prompt_tokens"] - 1 :]
            assert found.num_rows == len(row["token_ids"])
            for name in ("realized_logprob", "logprobs", "token_ids", "hidden", "tail_logprob"):
                stored = getattr(found, name, None)
                if stored is not None:  # nothing was rounded once more
                    assert torch.equal(stored, getattr(written.targets, name))
            if found.realized_logprob is not None:
                expected = scored.realized_logprob
                torch.testing.assert_close(found.realized_logprob, expected, atol=1e-5, rtol=0)


def test_a_set_that_was_interrupted_goes_on_and_is_the_same_in_the_end(teacher, prompts, tmp_path):
    run(teacher, prompts, tmp_path / "whole", num_samples=2)
    teacher.stop_after = 5
    with pytest.raises(command.Stopped, match="10 texts"):
        run(teacher, prompts, tmp_path / "stopped", num_samples=2)
    assert len(read(tmp_path / "stopped")) == 10
    teacher.stop_after, teacher.asked = None, set()
    said = run(teacher, prompts, tmp_path / "stopped", num_samples=2)
    assert (said["texts"], said["written"], said["already_there"]) == (24, 14, 10)
    assert len(teacher.asked) == 7
    assert read(tmp_path / "stopped") == read(tmp_path / "whole")
    teacher.asked.clear()
    again = run(teacher, prompts, tmp_path / "stopped", num_samples=2)
    assert (again["texts"], again["written"], again["already_there"]) == (24, 0, 24)
    assert not teacher.asked
    # Other settings are other texts, in the same folder.
    more = run(teacher, prompts, tmp_path / "stopped", num_samples=3, seed=1)
    assert (more["texts"], more["written"]) == (60, 36)


def test_a_teacher_that_is_lost_leaves_what_it_wrote(teacher, prompts, tmp_path, caplog):
    teacher.stop_after, teacher.stop_with = 3, TeacherUnavailable
    with pytest.raises(TeacherUnavailable, match="away"):
        run(teacher, prompts, tmp_path / "set")
    assert f"3 texts are written in {tmp_path / 'set'}: run the same command" in caplog.text
    teacher.stop_after = None
    assert run(teacher, prompts, tmp_path / "set")["already_there"] == 3


def test_only_the_samples_that_are_missing_are_added(teacher, prompts, tmp_path):
    run(teacher, prompts, tmp_path / "set", num_samples=1)
    said = run(teacher, prompts, tmp_path / "set", num_samples=3)
    assert (said["written"], said["already_there"]) == (24, 12)
    rows = read(tmp_path / "set")
    assert {(row["prompt"], row["sample"]) for row in rows} == {
        (row["prompt"], sample) for row in rows for sample in range(3)
    }
    assert len(rows) == 36


def test_a_shard_that_was_damaged_is_written_again(teacher, prompts, tmp_path):
    run(teacher, prompts, tmp_path / "set")
    before = read(tmp_path / "set")
    (shard,) = (tmp_path / "set").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = run(teacher, prompts, tmp_path / "set")
    assert said["written"] == 12
    assert read(tmp_path / "set") == before
    assert [*(tmp_path / "set" / "__record__" / "quarantine").iterdir()]


def test_texts_without_targets_are_data_and_no_record(teacher, prompts, tmp_path):
    said = run(teacher, prompts, tmp_path / "set", targets="none")
    assert said["bytes_per_token"] == 0
    assert said["nats"] is None
    rows = read(tmp_path / "set")
    assert all(row["targets"] == [] and row["spec"] == "none" for row in rows)
    with pytest.raises(RecordError, match="--targets none"):
        Recorded(tmp_path / "set")


def test_other_targets_teachers_and_records_are_refused(teacher, prompts, tmp_path, tokenizer):
    run(teacher, prompts, tmp_path / "set")
    with pytest.raises(
        InvalidRequest, match=r"holds sampled:16 at temperature 1\.0, asked for top_k"
    ):
        run(teacher, prompts, tmp_path / "set", targets="top_k:4")
    with pytest.raises(InvalidRequest, match=r"asked for sampled:16 at temperature 2\.0"):
        run(teacher, prompts, tmp_path / "set", target_temperature=2.0)
    other = Writer(tiny.make_model("Llama", len(tokenizer), seed=1), tokenizer)
    with pytest.raises(IncompatibleTeacher, match="another folder"):
        run(other, prompts, tmp_path / "set")
    with Recorded(tmp_path / "record", teacher) as record:
        list(record.stream([torch.arange(9)], targets="sampled:16"))
    with pytest.raises(RecordError, match="is a record of other texts"):
        run(teacher, prompts, tmp_path / "record")
    with pytest.raises(ValueError, match="--targets top_k"):
        run(teacher, prompts, tmp_path / "new", targets="given_ids")
    with pytest.raises(ValueError, match="--max-new-tokens must be at most 255 for the teacher"):
        run(teacher, prompts, tmp_path / "new", max_new_tokens=256)
    with pytest.raises(ValueError, match="--prompt-tokens must be at most 248"):
        run(teacher, prompts, tmp_path / "new", prompt_tokens=249)
    teacher.info.max_generation_tokens = 0
    with pytest.raises(ValueError, match="writes no texts, it only scores"):
        run(teacher, prompts, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_record_of_a_set_asks_for_other_texts_and_does_not_add_them(teacher, prompts, tmp_path):
    run(teacher, prompts, tmp_path / "set")
    before = read(tmp_path / "set")
    with Recorded(tmp_path / "set", teacher) as record:
        list(record.stream([torch.arange(9)]))
        assert record.counters.asked == 1
    assert read(tmp_path / "set") == before


def test_the_summary_says_what_the_texts_are_like(teacher, prompts, tmp_path):
    run(teacher, prompts, tmp_path / "set", targets="sampled:16,entropy=1", num_samples=2)
    rows = read(tmp_path / "set")
    found = summarize(str(tmp_path / "set"))
    lengths = np.array([len(row["token_ids"]) for row in rows])
    assert (found.texts, found.prompts, found.tokens) == (24, 12, lengths.sum())
    assert found.mean_tokens == pytest.approx(lengths.mean())
    assert found.longest == max(len(row["input_ids"]) for row in rows)
    assert sum(found.finish.values()) == 24
    assert found.finish["length"] == sum(row["finish"] == "length" for row in rows)
    assert found.bytes_per_token > 16
    assert found.tokens_per_s is not None
    assert found.tokens_per_s > 0
    logprobs, entropies = [], []
    for row in rows:
        ((_, dense),) = teacher.stream([row["input_ids"]], targets="dense:f32")
        dense = dense[row["prompt_tokens"] - 1 :]
        logprobs += dense.realized_logprob.tolist()
        entropies += (-(dense.logprobs.exp() * dense.logprobs).sum(1)).tolist()
    assert found.nats == pytest.approx(-np.mean(logprobs), rel=1e-3)
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-2)


def test_a_set_at_a_url_is_written_resumed_and_described(teacher, prompts, tmp_path):
    url = f"file://{tmp_path}/set"
    run(teacher, prompts, url, max_prompts=5)
    assert run(teacher, prompts, url)["already_there"] == 5
    assert is_written(url)
    assert summarize(url).texts == 12
    assert not is_written(f"file://{tmp_path}/nowhere")
    assert not is_written(str(tmp_path))


def test_repetition_is_the_share_of_runs_that_were_there_before():
    assert measure_repetition(np.arange(20)) == 0
    assert measure_repetition(np.array([1, 2, 3])) == 0
    assert measure_repetition(np.ones(8, dtype=np.int64)) == pytest.approx(4 / 5)
    assert measure_repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)


@pytest.mark.parametrize("place", ["__record__", "shard-"])
def test_a_full_disk_is_told_and_what_was_sealed_stays(
    teacher, prompts, tmp_path, monkeypatch, place
):
    run(teacher, prompts, tmp_path / "set", max_prompts=4)
    teacher.asked.clear()

    def fill(path: Path, content: Any) -> None:
        if place in str(path):
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("student_trainer.record.folder.write_atomically", fill)
        with pytest.raises(RecordError, match=r"No space left on device\. What was sealed before"):
            run(teacher, prompts, tmp_path / "set")
    assert bool(teacher.asked) == (place == "shard-"), "it is told before the teacher writes"
    assert len(read(tmp_path / "set")) == 4
    assert run(teacher, prompts, tmp_path / "set")["written"] == 8


def test_the_command_tells_all_options_and_refuses_what_makes_no_sense(tmp_path):
    given = {
        "teacher": "x:1",
        "student": "student",
        "prompts": ["p.txt"],
        "output": "set",
    }
    for more, words in (
        ({"num_samples": 2, "temperature": 0}, "would be the same text"),
        ({"prompt_every": 5}, "needs --prompt-tokens"),
        ({"temperature": 1e-5}, r"must be 0 or 0\.001 to 1000"),
    ):
        with pytest.raises(ValueError, match=words):
            GenerateConfig.model_validate({**given, **more})

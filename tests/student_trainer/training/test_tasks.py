"""Tasks of lm-eval on students and teachers: a served teacher scores as lm-eval's own model does."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from logitstream import extras
from student_trainer import LocalTeacher, connect
from student_trainer.training.tasks import Tasks
from student_trainer.training.teacher_lm import TeacherLM
from tests.support import tiny

WORDS = [f"w{number}" for number in range(62)]
ROUNDING = 1 / 4096
"""Of the logprob of a token that a teacher sends: half a step of its 16-bit code."""
PAIRS = [
    ("w1 w2 w3", " w4"),
    ("w1 w2 w3", " w5 w6 w7"),
    ("w1 w2 w3 ", "w4"),
    ("", "w8 w9"),
    ("", "<eos> w9"),
    ("<eos> w1", " w2"),
    (" ".join(WORDS * 5), " w1 w2"),
]
"""With a space at the end, without a context, with the prefix token, and longer than a sequence."""


def text(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer(WORDS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("Llama", 64)


@pytest.fixture(scope="module")
def teacher(model) -> LocalTeacher:
    return LocalTeacher(model)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> Path:
    """A task and its data, as a person would write them."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    path.write_text(yaml.safe_dump({**task, **config}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": text(6, seed),
            "choices": [text(2, 100 + seed), text(3, 200 + seed), text(1, 300 + seed)],
            "answer": seed % 3,
        }
        for seed in range(12)
    ]
    write_task(
        folder,
        "choose",
        questions,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="answer",
        doc_to_choice="choices",
        fewshot_split="test",
        num_fewshot=1,
        metric_list=[
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    )
    write_task(
        folder,
        "read",
        [{"text": text(40 * (seed + 1), seed)} for seed in range(8)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "word_perplexity"}],
    )
    write_task(
        folder,
        "recall",
        [{"context": text(5, seed), "last": text(1, seed + 50)} for seed in range(8)],
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target=" {{last}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )
    group = {"group": "both", "task": ["choose", "recall"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path, tokenizer) -> Tasks:
    return Tasks.load([str(folder)], tokenizer)


def requests(kind: Any, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_a_teacher_scores_as_lm_evals_own_model_of_the_same_weights(model, teacher, tokenizer):
    ours = TeacherLM(teacher, tokenizer)
    own = HFLM(model, tokenizer=tokenizer, batch_size=4, max_length=tiny.CONTEXT - 1)
    asked = requests("loglikelihood", PAIRS)
    # The continuation that the model itself would write, so that one of them is greedy.
    with torch.no_grad():
        best = model(torch.tensor([tokenizer.encode("w1 w2 w3")])).logits[0, -1].argmax()
    asked += requests("loglikelihood", [("w1 w2 w3", f" {tokenizer.decode(best)}")])
    found, expected = ours.loglikelihood(asked), own.loglikelihood(asked, disable_tqdm=True)
    for one, (logprob, is_greedy), (right, is_right_greedy) in zip(
        asked, found, expected, strict=True
    ):
        num_tokens = len(tokenizer.encode(one.args[1]))
        assert logprob == pytest.approx(right, abs=num_tokens * ROUNDING + 1e-5)
        assert is_greedy == is_right_greedy
    assert found[-1][1]
    lengths = (1, 255, 600)
    texts = requests("loglikelihood_rolling", [(text(length, length),) for length in lengths])
    for length, logprob, right in zip(
        *(lengths, ours.loglikelihood_rolling(texts), own.loglikelihood_rolling(texts)), strict=True
    ):
        assert logprob == pytest.approx(right, abs=length * ROUNDING + 1e-3)


def test_students_and_teacher_are_measured_on_the_tasks_of_a_folder(
    tasks, model, teacher, tokenizer, caplog, capfd
):
    state = random.getstate()
    caplog.set_level(logging.INFO)
    model.train()
    student = tasks.measure(model, "student distilled", batch_size=4)
    served = tasks.measure_teacher(teacher)
    assert model.training
    model.eval()
    assert random.getstate() == state
    assert tokenizer.pad_token == "<pad>"
    assert capfd.readouterr() == ("", "")
    assert len(caplog.messages) == 8
    assert caplog.messages[0].startswith("student distilled on the task choose: acc 0.")
    assert {name: {*scores} for name, scores in served.items()} == {
        "choose": {"acc", "acc_norm"},
        "read": {"word_perplexity"},
        "recall": {"perplexity", "acc"},
        "both": {"acc"},
    }
    for name, scores in student.items():
        for metric, score in scores.items():
            assert served[name][metric].value == pytest.approx(score.value, rel=1e-2)
            assert served[name][metric].higher_is_better == (not metric.endswith("perplexity"))
    acc = served["choose"]["acc"]
    assert acc.stderr == pytest.approx((acc.value * (1 - acc.value) / 11) ** 0.5)
    right = 12 * acc.value + 8 * served["recall"]["acc"].value
    assert served["both"]["acc"].value == pytest.approx(right / 20)
    assert served["read"]["word_perplexity"].stderr is None
    assert served["recall"]["perplexity"].stderr > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "talk": (
        {"output_type": "generate_until"},
        r"task talk lets a model generate text \(output_type generate_until\).*multiple_choice",
    ),
    "no_data": (
        {"dataset_path": "nobody/nothing", "dataset_kwargs": {}},
        r"task .*no_data.yaml cannot be loaded: \w+: .*nobody/nothing.*HF_HOME",
    ),
    "no_column": ({"doc_to_text": "{{missing}}"}, r"cannot be loaded: UndefinedError: .*missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_before_a_training(
    name: str, tmp_path: Path, folder, tokenizer, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, message = REFUSED[name]
    config = {"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "text"}
    path = write_task(tmp_path, name, [{"text": "w1 w2"}] * 2, **{**config, **changes})
    with pytest.raises(ValueError, match=message):
        Tasks.load([str(folder), str(path)], tokenizer)


def test_a_task_that_loads_but_cannot_be_measured_fails_in_the_rehearsal(
    tmp_path: Path, folder, teacher, tokenizer, tasks
):
    tasks.rehearse(teacher)
    # Without a space the target becomes a part of the context's last word.
    config = {"output_type": "loglikelihood", "doc_to_text": "w1", "doc_to_target": "text"}
    path = write_task(tmp_path, "glued", [{"text": "w2"}] * 2, **config)
    with pytest.raises(ValueError, match=r"first documents failed.*continuation has 0 tokens"):
        Tasks.load([str(folder), str(path)], tokenizer).rehearse(teacher)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helaswag", "no task 'helaswag' .similar: hellaswag"),
        ("./nothing.yaml", "nothing.yaml is neither a file nor a folder"),
    ],
)
def test_a_task_that_does_not_exist_is_named_with_what_is_near(
    name: str, message: str, folder, tokenizer
):
    with pytest.raises(ValueError, match=f"--eval-tasks: .*{message}"):
        Tasks.load([str(folder), name], tokenizer)


def test_without_tasks_nothing_is_measured_and_lm_eval_is_not_needed(
    model, teacher, tokenizer, monkeypatch
):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extras, "_extras_with", lambda module: ["eval"])
    none = Tasks.load([], tokenizer)
    none.rehearse(teacher)
    assert none.measure(model, "student", batch_size=1) == none.measure_teacher(teacher) == {}
    with pytest.raises(ValueError, match=r"lm_eval is not installed; .*\[eval\]"):
        Tasks.load(["sciq"], tokenizer)


def test_a_teacher_of_which_there_is_only_a_record_is_not_measured(tasks):
    assert tasks.measure_teacher(None) == {}


def test_a_teacher_does_not_generate(teacher, tokenizer):
    with pytest.raises(ValueError, match="scores texts and does not generate"):
        TeacherLM(teacher, tokenizer).generate_until([])


def test_a_served_teacher_is_asked_for_the_rows_of_continuations_alone(
    gemma_service, model_folder, tokenizer
):
    own = transformers.AutoModelForCausalLM.from_pretrained(model_folder("Gemma2", 1001)).eval()
    hflm = HFLM(own, tokenizer=tokenizer, batch_size=8, max_length=tiny.CONTEXT - 1)
    asked = requests("loglikelihood", [(text(30, n), " " + text(1 + n % 3, -n)) for n in range(40)])
    with connect(gemma_service.address) as teacher:
        found = TeacherLM(teacher, tokenizer).loglikelihood(asked)
        assert teacher.counters.rows == sum(1 + n % 3 for n in range(40))
    expected = hflm.loglikelihood(asked, disable_tqdm=True)
    for (logprob, is_greedy), (right, is_right_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(right, abs=3 * ROUNDING + 1e-5)
        assert is_greedy == is_right_greedy

"""The settings of a run: other names of them, the table [training], and what goes together."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from logit_codec import parse_targets, select
from logitstream.command_line import WrongUsage, parse
from logitstream.options import Alias
from student_trainer import distillation_loss, trainer_fields
from student_trainer.aliases import ADVICE, ALIASES
from student_trainer.cli import COMMANDS
from student_trainer.config import TrainConfig, find_deciding
from student_trainer.training.arguments import check_reporters, make_training_arguments

GIVEN = {"student": "s", "data": "d", "output": "o", "teacher": "x:1"}
VALUES = {
    **{"student": "a/b", "data": "a/c", "output": "p", "revision": "r", "dtype": "bfloat16"},
    **{"split": "s", "held_out_split": "t", "streaming": True, "text_column": "c"},
    **{"chat_template": "f", "sequence_length": 7, "steps": 7, "epochs": 1.5, "batch_size": 12},
    **{"accumulation": 3, "schedule": "cosine", "log_every": 4, "checkpoint_every": 5},
    **{"keep_checkpoints": 6, "trained_rows": "assistant", "on_policy": 0.25},
}
"""A value of each option that has another name."""
OTHERS = {
    "per_device_train_batch_size": (4, "workers", 3),
    "dataset_streaming": (True, "held_out", "h"),
    "assistant_only_loss": (True, None, None),
    "completion_only_loss": (True, None, None),
}
"""What gives that value under the names that convert it, and beside which other option."""
SAME = {"completion_only_loss": "completion"}


def write(path: Path, settings: dict[str, Any], table: dict[str, Any] | None = None) -> str:
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
    lines += ["[training]\n"] if table is not None else []
    lines += [f"{name} = {json.dumps(value)}\n" for name, value in (table or {}).items()]
    path.write_text("".join(lines))
    return f"@{path}"


def read(*arguments: str) -> TrainConfig:
    return parse("student-trainer", COMMANDS, ["train", *arguments])


def read_given(path: Path, table: dict[str, Any] | None = None, **settings: Any) -> TrainConfig:
    return read(write(path, {**GIVEN, **settings}, table))


def find_mistakes(*arguments: str) -> list[str]:
    with pytest.raises(WrongUsage) as caught:
        read(*arguments)
    return [one.removesuffix("; see student-trainer train --help") for one in caught.value.mistakes]


@pytest.mark.parametrize(("name", "alias"), ALIASES.items(), ids=ALIASES)
def test_every_alias_means_the_same_as_its_option_and_is_not_given_beside_it(
    tmp_path: Path, name: str, alias: Alias
):
    option = alias.option
    value, other, of_other = OTHERS.get(name, (VALUES[option], None, None))
    more = {other: of_other} if other else {}
    given = {one: two for one, two in GIVEN.items() if one != option}
    wanted_value = SAME.get(name, VALUES[option])
    wanted = read(write(tmp_path / "a.toml", {**given, **more, option: wanted_value}))
    file = write(tmp_path / "b.toml", {**given, **more, name: value})
    assert read(file) == wanted
    rest = write(tmp_path / "c.toml", {**given, **more})
    flag = f"--{name.replace('_', '-')}"
    arguments = [flag] if option == "streaming" else [flag, json.dumps(value).strip('"')]
    assert read(rest, *arguments) == wanted
    places = {f"{name} in {tmp_path / 'b.toml'}": (file, [])}
    if name in trainer_fields.OPTIONS:
        table = write(tmp_path / "d.toml", {**given, **more}, {name: value})
        assert read(table) == wanted
        assert read(rest, f"--training.{name.replace('_', '-')}", arguments[1]) == wanted
        places[f"training.{name} in {tmp_path / 'd.toml'}"] = (table, [])
    own = f"--{option.replace('_', '-')}"
    value_of_own = [] if option == "streaming" else [str(wanted_value)]
    for label, (where, _) in places.items():
        (mistake,) = find_mistakes(where, own, *value_of_own)
        assert mistake == f"{own} and {label} are one setting: give one of them"
    (mistake,) = find_mistakes(rest, own, *value_of_own, *arguments)
    assert mistake == f"{own} and {flag} are one setting: give one of them"


def test_an_alias_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOGITSTREAM_TRAIN_MAX_STEPS", "5")
    monkeypatch.setenv("LOGITSTREAM_TRAIN_TRAINING_WEIGHT_DECAY", "0.25")
    monkeypatch.setenv("LOGITSTREAM_TRAIN_TRAINING_MAX_GRAD_NORM", "2")
    config = read(write(tmp_path / "a.toml", GIVEN), "--training.adam-beta1", "0.8")
    assert (config.steps, config.max_grad_norm) == (5, 2)
    assert config.training == {"weight_decay": 0.25, "adam_beta1": 0.8}


def test_a_launchers_processes_share_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_given(tmp_path / "a.toml", per_device_train_batch_size=2).batch_size == 8


def test_record_takes_shared_aliases_and_ignores_the_rest(tmp_path: Path):
    settings = {**GIVEN, "record": "r", "max_length": 99, "max_steps": 3, "beta": 0.5}
    file = write(tmp_path / "a.toml", settings, {"bf16": True, "max_grad_norm": 2})
    assert parse("student-trainer", COMMANDS, ["record", file]).sequence_length == 99


def test_trls_beta_chooses_the_divergence(tmp_path: Path):
    for beta, divergence, kept in (
        (0, "forward_kl", None),
        (1, "reverse_kl", None),
        (0.3, "jsd", 0.3),
    ):
        config = read_given(tmp_path / "a.toml", beta=beta, targets="top_k:4")
        assert (config.divergence, config.beta) == (divergence, kept)
    config = read_given(tmp_path / "a.toml", beta=0.0, divergence="skew_kl")
    assert (config.divergence, config.beta) == ("skew_kl", 0)
    file = write(tmp_path / "a.toml", {**GIVEN, "divergence": "jsd", "beta": 1})
    assert find_mistakes(file)[0].startswith("--beta of jsd must be between 0 and 1, got 1")
    file = write(tmp_path / "a.toml", {**GIVEN, "divergence": "forward_kl", "beta": 0.5})
    assert find_mistakes(file) == ["--divergence forward_kl has no --beta: leave it out"]


def test_weights_may_change_over_the_steps_and_labels_count_for_top_k(tmp_path: Path):
    for settings, found in (
        ({}, (1.0, 0.0, None)),
        ({"targets": "top_k:4"}, (0.7, 0.3, None)),
        ({"targets": "top_k:4", "ce_weight": 0}, (1.0, 0.0, None)),
        ({"ce_weight": "0.50 -> 0.1"}, (1.0, "0.5->0.1", None)),
        ({"targets": "top_k:4", "beta": "0.1->0.9", "kd_weight": 1}, (1.0, 0.0, "0.1->0.9")),
    ):
        config = read_given(tmp_path / "a.toml", **settings)
        assert (config.kd_weight, config.ce_weight, config.beta) == found
        assert (config.divergence == "jsd") == (config.beta is not None)
    file = write(tmp_path / "a.toml", GIVEN)
    assert read(file, "--ce-weight", "0.5->0.1", "--kd-weight", "0.5").ce_weight == "0.5->0.1"
    assert read(file, "--kd-weight", "0.5").kd_weight == 0.5
    assert "must be at least 0" in find_mistakes(file, "--ce-weight", "0.5->-1")[0]
    assert "a number, or two such as 0.5->0.1" in find_mistakes(file, "--ce-weight", "half")[0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_that_divergence_is_the_one_of_trl(tmp_path: Path, monkeypatch, beta: float):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    config = read_given(tmp_path / "a.toml", beta=beta)
    logits = torch.randn(2, 1, 6, 11, generator=torch.Generator().manual_seed(0))
    teacher, student = logits
    rows = select(
        teacher[0], parse_targets("dense:f32"), realized_ids=torch.zeros(6, dtype=torch.int64)
    )
    options: dict[str, Any] = {} if config.beta is None else {"beta": config.beta}
    ours = distillation_loss(
        student[0], rows, divergence=config.divergence, reduction="sum", **options
    )
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_every_field_of_training_arguments_is_decided():
    fields = {one.name for one in dataclasses.fields(transformers.TrainingArguments)}
    decided = [
        *(trainer_fields.OPTIONS, trainer_fields.REFUSED, trainer_fields.FREE),
        *(trainer_fields.MEASURING, trainer_fields.DECIDING),
    ]
    assert fields <= {name for names in decided for name in names}
    assert sum(map(len, decided)) == len({name for names in decided for name in names})
    options = {*TrainConfig.model_fields}
    assert all(name in options or name in ALIASES for name in trainer_fields.OPTIONS)


def test_a_wrong_field_is_a_line_that_names_it(tmp_path: Path):
    table = {
        "weight_decay": "much",
        "weight_decya": 1,
        "bf16": [1],
        "optim": "sdg",
        "label_smoothing_factor": 0.1,
        "save_strategy": "often",
        "steps": 3,
    }
    said = find_mistakes(write(tmp_path / "a.toml", GIVEN, table))
    for name, line in zip(table, said, strict=True):
        assert line.startswith(f"[training] {name} "), line
    assert said[0].endswith("must be a valid number, got 'much'")
    assert said[1].endswith(
        "is not a field of transformers' TrainingArguments (did you mean weight_decay?)"
    )
    assert said[2].endswith("must be a valid boolean, got [1]")
    assert "adamw_torch" in said[3]
    assert "refused: it would have no effect on the loss" in said[4]
    assert said[5].endswith("must be no or steps or epoch or best, got 'often'")
    assert find_mistakes(write(tmp_path / "a.toml", {**GIVEN, "training": 3})) == [
        f"training in {tmp_path / 'a.toml'} must be a table, got 3"
    ]
    assert (
        find_mistakes("--training", "x")[0] == "--training is a table: give --training.NAME VALUE"
    )


def test_a_field_outside_of_the_table_is_told_where_it_belongs(tmp_path: Path):
    file = write(
        tmp_path / "a.toml", {**GIVEN, "weight_decay": 0.1, "do_train": True, "loss_type": "nll"}
    )
    advice = [line.partition(": ")[2] for line in find_mistakes(file)]
    assert advice[0] == "set weight_decay in the table [training], or give --training.weight-decay"
    assert advice[1] == trainer_fields.REFUSED["do_train"]
    assert advice[2] == ADVICE["loss_type"]


def test_the_table_reaches_the_trainer(tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys):
    table = {
        **{"gradient_checkpointing": True, "optim": "adafactor", "data_seed": 3, "bf16": True},
        **{"weight_decay": 0.5, "max_grad_norm": 0.25, "lr_scheduler_type": "cosine_with_min_lr"},
        **{"eval_steps": 7, "neftune_noise_alpha": 5, "dataloader_num_workers": 2, "save_steps": 9},
    }
    file = write(tmp_path / "a.toml", {**GIVEN, "device": "cpu"}, table)
    config = read(file, "--training.lr-scheduler-kwargs.min-lr", "1e-5")
    arguments = make_training_arguments(config, tmp_path)
    for name, value in table.items():
        assert getattr(arguments, name) == value, name
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert arguments.save_strategy == "steps"
    assert not [one for one in recwarn if issubclass(one.category, FutureWarning)]
    # What is printed is read again as the same.
    with pytest.raises(SystemExit):
        read(file, "--training.lr-scheduler-kwargs.min-lr", "1e-5", "--print-config")
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert read(f"@{printed}") == config


def test_what_decides_no_result_may_change_when_a_run_is_resumed(tmp_path: Path):
    def decide(table: dict[str, Any], **settings: Any) -> dict[str, Any]:
        config = read_given(tmp_path / "a.toml", table, **settings)
        return find_deciding(config.model_dump(mode="json"))

    first = decide({"weight_decay": 0.1})
    free = {"save_strategy": "epoch", "gradient_checkpointing": True, "eval_steps": 3}
    assert decide({"weight_decay": 0.1, "run_name": "x", **free}, report_to="wandb") == first
    assert decide({"weight_decay": 0.2}) != first
    # Measurements decide when they end a run.
    stopping = decide({"eval_steps": 3}, early_stopping=2)
    assert decide({"eval_steps": 4}, early_stopping=2) != stopping


def test_schedules_have_what_they_need(tmp_path: Path):
    def schedule(**settings: Any) -> list[float]:
        config = read_given(
            tmp_path / "a.toml", device="cpu", steps=20, learning_rate=1, **settings
        )
        arguments = make_training_arguments(config, tmp_path)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
        kwargs: Any = arguments.lr_scheduler_kwargs
        scheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(20),
            num_training_steps=20,
            scheduler_specific_kwargs=kwargs,
        )
        rates = []
        for _ in range(20):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    assert schedule(schedule="constant") == [1] * 20
    rates = schedule(schedule="wsd", warmup_steps=0.1)
    assert rates[0] == 0
    assert rates[2:17] == [1] * 15
    assert 1 > rates[17] > rates[18] > rates[19] > 0
    file = write(tmp_path / "a.toml", {**GIVEN, "schedule": "constant", "warmup_steps": 5})
    assert find_mistakes(file)[0].startswith(
        "--schedule constant has no warm-up: give --schedule con"
    )


def test_the_length_of_a_run_is_said_once(tmp_path: Path):
    assert read_given(tmp_path / "a.toml").steps == 1000
    config = read_given(tmp_path / "a.toml", num_train_epochs=2)
    assert (config.steps, config.epochs) == (None, 2)
    file = write(tmp_path / "a.toml", {**GIVEN, "steps": 3, "epochs": 2})
    assert find_mistakes(file) == [
        "--steps and --epochs both say how long to train: give one of them"
    ]
    streams = {"streaming": True, "held_out": "h", "epochs": 2}
    file = write(tmp_path / "a.toml", {**GIVEN, **streams})
    assert find_mistakes(file) == ["--streaming data has no epochs to be counted: give --steps"]
    file = write(tmp_path / "a.toml", {**GIVEN, "optimizer": "muon"}, {"optim": "sgd"})
    assert find_mistakes(file)[0].startswith(
        "--optimizer muon and [training] optim both choose one"
    )


def test_a_reporter_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_reporters(["tensorboard", "none"])
    with pytest.raises(
        ValueError, match="--report-to trackio needs the package trackio, which is not"
    ):
        check_reporters(["trackio"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "1+2", "--feature-layers", "1+2"], ["--features", "1+2"]),
        (["--features", "top_k:4", "--feature-layers", "1"], ["states of the teacher's layers"]),
        (["--features", "features:layers=1+2", "--feature-layers", "1"], ["must name 2", "got 1"]),
        (["--features", "features:layers=1"], ["--feature-layers", "got none"]),
        (["--feature-layers", "1"], ["give the teacher's too"]),
    ],
)
def test_layers_that_cannot_be_learned_are_refused_before_anything_is_read(options, words):
    given = [f"--{name}={value}" for name, value in GIVEN.items()]
    (mistake,) = find_mistakes(*given, *options)
    assert all(word in mistake for word in words)

"""The short examples, run against a live service and stopped in between."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import features, generate, hf_trainer, many_epochs, on_policy, plain_loop
from examples.two_teams import __main__ as two_teams
from tests.conftest import one_torch_thread

one_thread = pytest.fixture(autouse=True)(one_torch_thread)


def test_the_plain_loop_is_short_and_goes_on_where_it_stopped(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch, capsys
):
    assert len(Path(plain_loop.__file__).read_text().splitlines()) < 45
    monkeypatch.setattr(plain_loop, "SAVE_EVERY", 3)

    def run(steps: int, name: str) -> dict:
        monkeypatch.setattr(plain_loop, "STEPS", steps)
        path = tmp_path / name
        plain_loop.main(trained_service.address, str(student_folder), str(path), str(text))
        return torch.load(path, weights_only=True)

    whole = run(6, "whole")
    assert capsys.readouterr().out.count("step ") == 2
    assert run(4, "stopped")["position"] == {"handed_out": 3}
    (tmp_path / "stopped.new").write_bytes(b"killed while it was written")
    again = run(6, "stopped")
    assert again["position"] == whole["position"] == {"handed_out": 6}
    assert all(
        torch.equal(again["student"][name], whole["student"][name]) for name in whole["student"]
    )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_hf_trainer_example_trains_and_goes_on(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(hf_trainer, "STEPS", 6)
    monkeypatch.setattr(hf_trainer, "SAVE_EVERY", 3)

    def run(name: str) -> torch.Tensor:
        trainer = hf_trainer.main(
            trained_service.address, str(student_folder), str(tmp_path / name), str(text)
        )
        assert any("kd_loss" in entry for entry in trainer.state.log_history)
        assert trainer.model is not None
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = run("whole")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "stopped" / "checkpoint-3")
    assert torch.equal(run("stopped"), whole)


def test_the_features_example_learns_the_layers_and_saves_the_student_alone(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(features, "STEPS", 12)
    monkeypatch.setattr(features, "PRINT_EVERY", 6)
    output = tmp_path / "student"
    losses = features.main(trained_service.address, str(student_folder), str(output), str(text))
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    assert capsys.readouterr().out.count("step ") == 2
    names = load_file(output / "model.safetensors").keys()
    assert not [name for name in names if "projector" in name]


def test_the_generate_example_learns_from_what_the_teacher_writes(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "STEPS", 12)
    monkeypatch.setattr(generate, "PRINT_EVERY", 6)
    monkeypatch.setattr(generate, "LEARNING_RATE", 1e-2)
    output = tmp_path / "student"
    losses = generate.main(trained_service.address, str(student_folder), str(output), str(text))
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    assert capsys.readouterr().out.count("the teacher wrote: w") == 2
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize("example", [plain_loop, hf_trainer, many_epochs, features, generate])
def test_an_example_without_its_arguments_says_how_it_is_used(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example.__file__, "127.0.0.1:1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(example.__file__, run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"usage: python -m {example.__name__} HOST:PORT STUDENT_FOLDER ")


@pytest.mark.slow
def test_two_teams_share_a_teacher(tmp_path: Path, capfd):
    got = two_teams.main(tmp_path, 3.0)
    assert set(got) == {"search", "ranking"}
    assert all(tokens > 0 for tokens in got.values())
    printed = capfd.readouterr()
    assert "ranking" in printed.out
    assert "lst_" not in printed.out + printed.err, "no token is shown"
    assert "lst_" not in "".join(path.read_text() for path in tmp_path.glob("*.toml"))


def test_many_epochs_of_a_record_go_on_helping_where_labels_overfit(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch, capsys
):
    assert len(Path(many_epochs.__file__).read_text().splitlines()) < 75
    sizes = {"SEQUENCES": 8, "HELD_OUT": 16, "EPOCHS": 25, "BATCH": 4, "LEARNING_RATE": 3e-2}
    for name, value in sizes.items():
        monkeypatch.setattr(many_epochs, name, value)
    arguments = str(student_folder), str(tmp_path / "record"), str(text)
    losses = many_epochs.main(trained_service.address, *arguments)
    assert "32 in the record, 32 of them new" in capsys.readouterr().out
    assert losses["labels"][-1] > min(losses["labels"]) + 0.2
    assert losses["distilled"][-1] < min(losses["labels"]) - 0.2
    monkeypatch.setattr(many_epochs, "EPOCHS", 1)
    again = many_epochs.main(trained_service.address, *arguments)
    assert "32 in the record, 0 of them new" in capsys.readouterr().out
    assert again == {name: curve[:1] for name, curve in losses.items()}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_on_policy_example_trains_in_a_trainer_and_in_a_loop(
    trained_service, student_folder, text: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(on_policy, "STEPS", 4)
    monkeypatch.setattr(on_policy, "SAVE_EVERY", 2)
    arguments = trained_service.address, str(student_folder), str(tmp_path), str(text)
    losses = on_policy.main(*arguments)
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    assert "'on_policy_max_staleness': 1.0" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-2" / "on_policy_0.safetensors").is_file()

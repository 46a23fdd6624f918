"""Two teams with weights 1 and 3 share one teacher: `python -m examples.two_teams FOLDER`.

What a platform team does and what each team gets, in one script; README.md has the same as commands.
FOLDER then has the certificates, the teams file and the connection files. Whatever it starts, it stops.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers

from examples.demo_teacher import make_config

WEIGHTS = {"search": 1, "ranking": 3}
PYTHON = (sys.executable, "-m")


def main(folder: Path, seconds: float) -> dict[str, int]:
    """Runs it all and prints a table; returns the tokens that each team got."""
    teacher, teams, certs = folder / "teacher", folder / "teams.toml", folder / "certs"
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(make_config(hidden_size=64)).save_pretrained(teacher)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    # The platform team: an authority, two teams, a service.
    command("certs", "--out", certs, "--host", "127.0.0.1")
    tokens = {}
    for team, weight in WEIGHTS.items():
        added = command(
            *("team", "add", team, "--teams", teams, "--weight", weight, "--json"),
            *("--address", address, "--ca", certs / "ca.pem", "--out", folder),
        )
        tokens[team] = json.loads(added)["token"]
    with ExitStack() as running:
        serve = start(
            *("teacher_server", "serve", "--standalone", "--model", teacher),
            *("--port", address.rpartition(":")[2], "--teams", teams, "--batch.max-tokens", 512),
            *("--tls-cert", certs / "server.pem", "--tls-key", certs / "server-key.pem"),
        )
        running.callback(stop, serve)
        print(wait_for(serve, "ready"))

        # Each team: its connection file, and its token in the environment.
        trainers: dict[str, subprocess.Popen] = {}
        for team, token in tokens.items():
            trainers[team] = start(
                *("examples.two_teams.trainer", folder / f"{team}-connection.toml", seconds),
                TEACHER_TOKEN=token,
            )
            running.callback(stop, trainers[team])
        for trainer in trainers.values():
            wait_for(trainer, "connected")
        for trainer in trainers.values():
            print("go", file=trainer.stdin, flush=True)
        got = {
            team: int(wait_for(trainer, "tokens").split()[1]) for team, trainer in trainers.items()
        }
    print(f"{'team':10} {'weight':>6} {'tokens':>10} {'share':>6} {'entitled':>8}")
    for team, weight in WEIGHTS.items():
        share, entitled = got[team] / sum(got.values()), weight / sum(WEIGHTS.values())
        print(f"{team:10} {weight:6} {got[team]:10,} {share:6.0%} {entitled:8.0%}")
    return got


def command(*arguments: object) -> str:
    """What a command of teacher-server prints."""
    line = [*PYTHON, "teacher_server", *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PYTHON, *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, word: str) -> str:
    """The next line, which has to begin with a word."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line.startswith(word):
        raise RuntimeError(f"a process ended before it said {word!r}")
    return line


def stop(process: subprocess.Popen) -> None:
    with process:  # closes its pipes and waits
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two teams share one teacher.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long both stream")
    options = parser.parse_args()
    main(options.folder, options.seconds)

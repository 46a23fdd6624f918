"""The main job: make a teacher, serve it, train students from the stream, see whether it helped.

`make demo` runs it; DEMO_FLAGS are its flags. Three processes: this one, the service, and the
trainer, which knows only the service's address. Whatever it starts, it stops.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from examples import demo_teacher, demo_texts

STEPS = 150
LEARNING_RATE = 3e-2  # at which the control is at its best; docs/log.md has the search
TARGETS = "sampled"
REPLICAS = 2


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train, serve, distil, compare.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one comparison each")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each student")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, help="of each student"
    )
    parser.add_argument("--targets", default=TARGETS, help="what to ask the teacher for")
    parser.add_argument(
        "--shuffled-control",
        action="store_true",
        help="also train on targets in the wrong places, which must be worse",
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="serve one replica without Ray instead of two on it",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="also let the teacher write texts, and train students on them",
    )
    options = parser.parse_args()
    # SIGTERM becomes an exception, so that the service is stopped on every way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (FileExistsError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """Teacher, service, one comparison per seed; returns the exit code."""
    started = time.monotonic()
    folder = options.output / "teacher"
    facts = demo_teacher.build_teacher(folder)
    print(
        f"teacher: {folder}, {facts['parameters']:,} parameters, "
        f"{facts['held_out_loss']} nats on held-out text"
    )
    log = options.output / "service.log"
    with log.open("w") as log_file:
        command = [sys.executable, "-m", "teacher_server", "serve", "--model", str(folder)]
        mode = ["--standalone"] if options.standalone else ["--replicas", str(REPLICAS)]
        service = subprocess.Popen(
            [*command, "--port", "0", *mode],
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )
        try:
            assert service.stdout is not None
            ready = service.stdout.readline().split()
            if len(ready) != 2 or ready[0] != "ready":
                raise RuntimeError(f"the service did not start:\n{log.read_text()}")
            print(f"service: {ready[1]}, log in {log}")
            reports = [compare(options, ready[1], seed) for seed in options.seeds]
            written = demo_texts.run(options, ready[1]) if options.generate else None
        finally:
            service.terminate()
            service.wait(30)
    if None in reports or (options.generate and written is None):
        return 1
    print_table([report for report in reports if report is not None])
    if written is not None:
        demo_texts.print_table(written)
    page = options.output / "report.html"
    if len(options.seeds) > 1:
        page = options.output / "seeds.html"
        folders = [str(output_of(options, seed)) for seed in options.seeds]
        command = [sys.executable, "-m", "student_trainer", "report", *folders]
        subprocess.run([*command, "--output", str(page)], check=True)
    print(f"page: {page}   ({time.monotonic() - started:.0f} s in all)")
    return 0


def compare(options: argparse.Namespace, address: str, seed: int) -> dict | None:
    """Trains the control and the distilled student in a process of their own; None if it failed."""
    output = output_of(options, seed)
    train, held_out = demo_teacher.corpus_files()
    settings = {
        "teacher": address,
        "student": str(demo_teacher.student_folder(options.output / "teacher")),
        "data": [str(path) for path in train],
        "held_out": [str(path) for path in held_out],
        "output": str(output),
        "sequence_length": demo_teacher.SEQUENCE,
        "batch_size": demo_teacher.BATCH,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "optimizer": "muon",
        "targets": options.targets,
        "seed": seed,
        "control": True,
        "shuffled_control": options.shuffled_control,
    }
    output.mkdir(parents=True, exist_ok=True)
    config = output / "train.toml"
    # JSON's strings, numbers, booleans and lists of strings are TOML's too.
    config.write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    )
    command = [sys.executable, "-m", "student_trainer", "train", f"@{config}"]
    if subprocess.run(command, check=False).returncode != 0:
        return None
    return json.loads((output / "report.json").read_text())


def output_of(options: argparse.Namespace, seed: int) -> Path:
    """The folder of a comparison: the demo's own of the first seed, one below it of the others."""
    first = seed == options.seeds[0]
    return options.output if first else options.output / f"seed-{seed}"


def print_table(reports: list[dict]) -> None:
    """One line per seed."""
    print("\nheld-out loss, nats per token")
    print("seed  teacher  labels alone  distilled    gain  waiting  bytes/token")
    for report in reports:
        print(
            f"{report['seed']:4}  {report['teacher_loss']:7.3f}  {report['control_loss']:12.3f}  "
            f"{report['distilled_loss']:9.3f}  {report['gain']:6.3f}  "
            f"{report['waiting_fraction']:7.1%}  {report['bytes_per_token']:11.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())

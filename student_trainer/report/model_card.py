"""README.md of a trained student, as the Hugging Face hub reads it: from whom, with what, how good."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_trainer.disk import put
from student_trainer.training.results import Results

COMMIT = re.compile(r"[0-9a-f]{40}")
UNKNOWN = "unknown"


def license_of(folder: Path) -> str | None:
    """The license that the model card of a folder names; None if it has none."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        found = (metadata_load(path) or {}).get("license")
    except (
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ):  # a card that the hub would not read either
        return None
    return str(found) if found else None


def license_of_hub_model(model: str, revision: str) -> str | None:
    """The same of a model of the hub, if its card is in this machine's cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_model(model, revision):
        return None
    found = try_to_load_from_cache(model, "README.md", revision=revision)
    return license_of(Path(found).parent) if isinstance(found, str) else None


def is_hub_model(model: str, revision: str) -> bool:
    """Whether a teacher is of the hub: only those have a commit for a revision."""
    return COMMIT.fullmatch(revision) is not None and model.count("/") <= 1


def write_model_card(folder: Path, results: Results, report: Mapping[str, Any]) -> Path:
    """Writes README.md into the student's folder; report: of `make_report`, of this run alone."""
    return put(folder / "README.md", _card(folder.resolve(), results, report))


def _card(folder: Path, results: Results, report: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    teacher, settings = results.teacher, results.settings
    name = folder.parent.name or "student"
    is_of_hub = is_hub_model(teacher.model, teacher.revision)
    metrics = {
        "loss": report["distilled_loss"],
        "accuracy": report["distilled_accuracy"],
        "agreement with the teacher": report["distilled_top1_agreement"],
    }
    data = ModelCardData(
        license=_license(results),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "distillation", "logitstream"],
        base_model=teacher.model if is_of_hub else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="next token",
                dataset_type="held-out",
                dataset_name="held-out text",
                metric_type=kind,
                metric_value=value,
            )
            for kind, value in metrics.items()
            if value is not None
        ],
    )
    mixture = f"{settings['kd_weight']:g} x forward KL from the teacher"
    if settings["ce_weight"]:
        mixture += f" + {settings['ce_weight']:g} x cross-entropy on the text"
    facts = {
        "teacher": teacher.model,
        "teacher's revision": teacher.revision or "not known (a folder of the one who served it)",
        "teacher's fingerprint": f"`{teacher.teacher_fingerprint}`",
        "teacher's weights": f"`{teacher.weights_fingerprint}` (SHA-256 over safetensors)",
        "teacher's license": teacher.license or f"{UNKNOWN}: ask before you publish this student",
        "student": f"{results.student_architecture}, {results.student_parameters:,} parameters, "
        + (
            f"from weights under the license {results.student_license or UNKNOWN}"
            if results.starts_from_weights
            else "from random weights"
        ),
        "targets": f"`{settings['targets']}` at temperature {settings['temperature']:g}",
        "loss": mixture,
        "tokens": f"{report['trained_tokens']:,} trained on, in {settings['steps']:,} steps of "
        f"{settings['batch_size']} x {settings['sequence_length']}; data "
        f"`{results.data_digest}`",
        "optimizer": f"{settings['optimizer']}, learning rate {settings['learning_rate']:g}, seed "
        f"{settings['seed']}",
    }
    listed = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    said = "\n\n".join(report["sentences"])
    return f"""---
{data.to_yaml().strip()}
---

# {name}

A student of **{teacher.model}**, trained by knowledge distillation with logitstream.

| | |
|---|---|
{listed}

## Results

{said}

Measured on {report["held_out_rows"]:,} positions of held-out text (`{results.held_out_digest}`).

{_results_table(report)}

## How to make it again

```bash
student-trainer train @train.toml --teacher HOST:PORT
```

with a service of the teacher that has this fingerprint, and as train.toml:

```toml
{_toml(settings)}
```

Made with {report["versions"]}, on {results.finished}.

## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder.name}")
student = AutoModelForCausalLM.from_pretrained("{folder.name}")
```

It was measured on nothing but the loss of held-out text like that it was trained on: what the teacher
gets wrong, or says that it should not, the student may have learnt too.
"""


def _license(results: Results) -> str:
    """What the student is under, as far as that can be said; the hub knows "unknown" and "other"."""
    of = {results.teacher.license or UNKNOWN}
    if results.starts_from_weights:
        of.add(results.student_license or UNKNOWN)
    if len(of) == 1:
        return of.pop()
    return UNKNOWN if UNKNOWN in of else "other"


def _results_table(report: Mapping[str, Any]) -> str:
    columns = {"loss": "nats", "accuracy": "%", "top1_agreement": "%", "calibration_error": "%"}
    who = {
        "teacher": "teacher",
        "distilled": "**this student**",
        "control": "same student, labels alone",
        "shuffled": "same student, shuffled targets",
    }

    def shown(value: float | None, unit: str) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if unit == "nats" else f"{100 * value:.1f} %"

    lines = [
        f"| {words} | "
        + " | ".join(shown(report.get(f"{one}_{name}"), unit) for name, unit in columns.items())
        + " |"
        for one, words in who.items()
        if any(report.get(f"{one}_{name}") is not None for name in columns)
    ]
    head = (
        "| | loss, nats per token | next token right | agrees with teacher | calibration error |\n"
        "|---|---:|---:|---:|---:|\n"
    )
    return head + "\n".join(lines)


def _toml(settings: Mapping[str, Any]) -> str:
    """The settings that are not about one machine; JSON's values are TOML's too."""
    left_out = {
        *("teacher", "ca", "cert", "key", "device", "workers", "ray_address", "max_failures"),
        *("tensorboard", "start_over", "ahead", "log_every"),
    }
    return "\n".join(
        f"{name} = {json.dumps(value)}"
        for name, value in settings.items()
        if name not in left_out and value not in (None, "", [])
    )

"""Writes the model card of a student (README.md): its teacher, its settings, and how good it is.

The text is in model_card.md; the Hugging Face hub reads the metadata at its top.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.disk import put
from student_trainer.report.formats import ARROWS, format_score, format_value
from student_trainer.report.own_texts import describe_own_texts
from student_trainer.report.verdict import NO_TARGETS
from student_trainer.training.results import Results

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

COMMIT = re.compile(r"[0-9a-f]{40}")
ADAPTER = "adapter_config.json"
"""In the folder of a student that is an adapter of another model."""
UNKNOWN = "unknown"
"""What the hub calls a license that is not known."""
SCORES = {"loss": "nats", "accuracy": "%", "top1_agreement": "%", "calibration_error": "%"}
"""Columns of the table of results, and their units."""
DIVERGENCES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jsd": "Jensen-Shannon divergence",
    "skew_kl": "skew KL",
    "skew_reverse_kl": "skew reverse KL",
    "total_variation": "total variation",
}
"""As the card names them."""
STUDENTS = {
    "teacher": "teacher",
    "distilled": "**this student**",
    "control": "same student, labels alone",
    "shuffled": "same student, shuffled targets",
}
NOT_REPRODUCED = {
    *("teacher", "ca", "cert", "key", "device", "workers", "ray_address", "max_failures"),
    *("tensorboard", "start_over", "ahead", "log_every"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}
"""Settings that are about one machine."""


def license_of(folder: Path) -> str | None:
    """Returns the license that the model card of a folder names; None if it has none."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        name = (metadata_load(path) or {}).get("license")
    except (ValueError, RecursionError, yaml.YAMLError):  # the hub could not read this card either
        return None
    return str(name) if name else None


def license_of_hub_model(model: str, revision: str) -> str | None:
    """Returns the same of a model of the hub, if its card is in this machine's cache.

    Fetches nothing.
    """
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_model(model, revision):
        return None
    path = try_to_load_from_cache(model, "README.md", revision=revision)
    return license_of(Path(path).parent) if isinstance(path, str) else None


def is_hub_model(model: str, revision: str) -> bool:
    """Returns whether a teacher is of the hub: only there is a revision a commit."""
    return COMMIT.fullmatch(revision) is not None and model.count("/") <= 1


def write_model_card(folder: Path, results: Results, report: Mapping[str, Any]) -> Path:
    """Writes README.md into the student's folder; report: from `make_report`, of this run alone."""
    from huggingface_hub import ModelCard

    folder = folder.resolve()
    name = folder.parent.name or "student"
    has_targets = results.settings["targets"] != NO_TARGETS
    card = ModelCard.from_template(
        _make_metadata(folder, name, results, report),
        template_str=files("student_trainer.report")
        .joinpath("model_card.md")
        .read_text(encoding="utf-8"),
        name=name,
        teacher=results.teacher.model,
        has_targets=has_targets,
        has_texts=bool(results.written),
        facts=_list_facts(results, report),
        sentences=report["sentences"],
        held_out_rows=format_value(report["held_out_rows"]),
        held_out_digest=results.held_out_digest,
        scores=_list_scores(report),
        tasks=_list_task_scores(report),
        settings=_format_settings(results.settings),
        versions=report["versions"],
        finished=results.finished,
        folder=folder.name,
    )
    return put(folder / "README.md", str(card))


def _make_metadata(
    folder: Path, name: str, results: Results, report: Mapping[str, Any]
) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    teacher = results.teacher
    tags = ["knowledge-distillation", "distillation"]
    if results.settings["targets"] == NO_TARGETS and not results.written:
        tags = []
    base = teacher.model if is_hub_model(teacher.model, teacher.revision) else None
    is_adapter = (folder / ADAPTER).is_file()
    if is_adapter:
        adapter = json.loads((folder / ADAPTER).read_text())
        base = adapter["base_model_name_or_path"] if adapter["revision"] else None
    metrics = {
        "loss": report["distilled_loss"],
        "accuracy": report["distilled_accuracy"],
        "agreement with the teacher": report["distilled_top1_agreement"],
    }
    return ModelCardData(
        license=_combine_licenses(results),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "logitstream"],
        base_model=base,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="next token",
                dataset_type="held-out",
                dataset_name="held-out text",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
            if value is not None
        ]
        + [
            EvalResult(
                task_type="text-generation",
                dataset_type=row["task"],
                dataset_name=row["task"],
                metric_type=row["metric"],
                metric_value=row["distilled"]["value"],
            )
            for row in report["tasks"]
            if row["distilled"] is not None and row["distilled"]["value"] is not None
        ],
    )


def _show(weight: float | str) -> str:
    return weight if isinstance(weight, str) else f"{weight:g}"


def _list_facts(results: Results, report: Mapping[str, Any]) -> dict[str, str]:
    teacher, settings = results.teacher, results.settings
    divergence = settings.get("divergence", "forward_kl")
    name = DIVERGENCES.get(divergence, divergence)
    has_targets = settings["targets"] != NO_TARGETS
    loss = f"{_show(settings['kd_weight'])} x {name} from the teacher"
    if settings.get("beta") is not None:
        loss += f" (beta {_show(settings['beta'])})"
    if settings["ce_weight"]:
        loss += f" + {_show(settings['ce_weight'])} x cross-entropy on the text"
    if not has_targets:
        loss = "cross-entropy on the text"
    weights = "random weights"
    if results.starts_from_weights:
        weights = f"weights under the license {results.student_license or UNKNOWN}"
    of_teacher = {
        "teacher": teacher.model,
        "teacher's revision": teacher.revision or "not known (served from a local folder)",
        "teacher's fingerprint": f"`{teacher.teacher_fingerprint}`",
        "teacher's weights": f"`{teacher.weights_fingerprint}` (SHA-256 over safetensors)",
        **({"teacher's precision": teacher.precision} if teacher.precision else {}),
        "teacher's license": teacher.license or f"{UNKNOWN}: ask before you publish this student",
    }
    return {
        **(of_teacher if teacher.model else {}),
        **_describe_texts(results),
        "student": f"{results.student_architecture}, {results.student_parameters:,} parameters, "
        f"trained from {weights}",
        **_describe_adapters(settings),
        "targets": f"`{settings['targets']}` at temperature {settings['temperature']:g}"
        if has_targets
        else "none: the student learnt from the text alone",
        "loss": loss,
        **_describe_own_texts(settings, report),
        "tokens": f"{report['trained_tokens']:,} trained on, in {settings['steps']:,} steps of "
        f"{settings['batch_size']} x {settings['sequence_length']}; data `{results.data_digest}`",
        "optimizer": f"{settings['optimizer']}, learning rate {settings['learning_rate']:g}, "
        f"seed {settings['seed']}",
    }


def _describe_texts(results: Results) -> dict[str, str]:
    """Returns a line about each part of the data that a teacher wrote."""
    found = {}
    for number, one in enumerate(results.written, 1):
        name = "text" if len(results.written) == 1 else f"text {number}"
        ends = ", ".join(f"{count:,} {how}" for how, count in one.finish.items())
        said = [
            f"{one.texts:,} texts after {one.prompts:,} prompts, {one.tokens:,} tokens, "
            f"{one.mean_tokens:,.1f} on average; ended: {ends}",
            f"{100 * one.repetition:.1f}% repetition",
            *([] if one.entropy is None else [f"entropy {one.entropy:.3f} nats"]),
            *(
                []
                if one.nats is None
                else [f"{one.nats:.3f} nats per token for the teacher itself"]
            ),
            f"targets `{one.targets}`, {one.bytes_per_token:,.1f} bytes per token",
            *([] if one.tokens_per_s is None else [f"written at {one.tokens_per_s:,.0f} tokens/s"]),
        ]
        drawn = "; ".join(_describe_draws(settings) for settings in one.settings)
        found[name] = (
            f"written by {one.teacher} (`{one.teacher_fingerprint}`), {drawn}. " + "; ".join(said)
        )
    return found


def _describe_draws(settings: Mapping[str, Any]) -> str:
    """Returns how texts were drawn, in the words of the options; what is off is left out."""
    shown = {name: value for name, value in settings.items() if value not in ([], False, 0, None)}
    shown |= {name: settings.get(name) for name in ("temperature", "seed")}
    shown = {name: value for name, value in shown.items() if (name, value) != ("top_p", 1.0)}
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in shown.items())


def _describe_own_texts(settings: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    """Returns two lines about what the student wrote itself, if it did."""
    written = describe_own_texts(settings.get("on_policy"), report)
    if not written:
        return {}
    divergence = settings["on_policy_divergence"]
    return {
        "written by the student": written,
        "loss on that": f"{DIVERGENCES.get(divergence, divergence)} from the teacher, with targets "
        f"`{settings['on_policy_targets']}`",
    }


def _describe_adapters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns a line about LoRA, if only adapters were trained."""
    rank = settings.get("lora_r")
    if not rank:
        return {}
    alpha = settings["lora_alpha"] or 2 * rank
    where = ", ".join(settings["lora_target_modules"])
    return {"adapters": f"LoRA of rank {rank}, alpha {alpha}, on {where}; nothing else was trained"}


def _combine_licenses(results: Results) -> str:
    """Returns the license of the student, as far as it follows from those of its weights."""
    names = {results.teacher.license or UNKNOWN}
    if results.starts_from_weights:
        names.add(results.student_license or UNKNOWN)
    if len(names) == 1:
        return names.pop()
    return UNKNOWN if UNKNOWN in names else "other"


def _list_scores(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the formatted scores of every model that has any."""
    values = {
        label: [report.get(f"{student}_{name}") for name in SCORES]
        for student, label in STUDENTS.items()
    }
    return {
        label: list(map(format_value, scores, SCORES.values()))
        for label, scores in values.items()
        if any(score is not None for score in scores)
    }


def _list_task_scores(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns the rows of the table of tasks, the first one with its titles; [] without tasks."""
    rows = report["tasks"]
    models = {who: label for who, label in STUDENTS.items() if any(row[who] for row in rows)}
    found = [
        [row["task"], row["metric"] + ARROWS[row["higher_is_better"]]]
        + [format_score(row[who]) for who in models]
        for row in rows
    ]
    return [["task", "metric", *models.values()], *found] if rows else []


def _format_settings(settings: Mapping[str, Any]) -> str:
    """Returns the settings as TOML; the values of JSON are TOML's too."""
    return "\n".join(
        f"{name} = {json.dumps(value)}"
        for name, value in settings.items()
        if name not in NOT_REPRODUCED and value not in (None, "", [])
    )

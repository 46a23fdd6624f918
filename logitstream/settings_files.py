"""Reads settings from TOML and YAML files, and writes them as TOML."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_settings_file(path: Path) -> list[tuple[str, Any]]:
    """Lists the settings in a file: (name, value). Raises OSError, and ValueError for its syntax."""
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        text = path.read_text()
        return flatten(_load_yaml(text) if is_yaml else tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not {'YAML' if is_yaml else 'TOML'}: {why}") from None


def _load_yaml(text: str) -> dict[Any, Any]:
    """Reads the settings in YAML. Raises ValueError."""
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(content, dict | None):
        raise ValueError("it holds no settings, such as `steps: 100`")
    return content or {}


def flatten(content: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Lists all settings of a table; those of a table within it have dotted names."""
    settings = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            settings += flatten(value, f"{prefix}{key}.")
        else:
            settings.append((f"{prefix}{key}", value))
    return settings


def format_toml(settings: Mapping[str, Any]) -> str:
    """Writes settings as TOML: (dotted name, value); those without a value are left out."""
    sections: dict[str, list[str]] = {"": []}
    for key, value in flatten(settings):
        if value is not None and value != {}:
            section, _, name = key.rpartition(".")
            text = json.dumps(value, ensure_ascii=False)
            sections.setdefault(section, []).append(f"{name} = {text}\n")
    return "\n".join(
        (f"[{section}]\n" if section else "") + "".join(lines)
        for section, lines in sections.items()
    )

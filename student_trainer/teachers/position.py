"""Says where a stream is, so that another one can resume there."""

from collections.abc import Mapping
from typing import Any

from student_trainer.errors import InvalidRequest


def read_position(state: Mapping[str, Any]) -> int:
    """Returns how many items a state says were handed out. Raises InvalidRequest."""
    handed_out = state.get("handed_out")
    if not isinstance(handed_out, int) or handed_out < 0:
        raise InvalidRequest(f"a state is {{'handed_out': number of items}}, got {dict(state)!r}")
    return handed_out


def is_stateful(source: Any) -> bool:
    """Whether the source can report its position and be set back to it."""
    # accelerate's loaders have the methods in any case, and this attribute says if they work.
    return (
        hasattr(source, "state_dict")
        and hasattr(source, "load_state_dict")
        and getattr(source, "use_stateful_dataloader", True)
    )

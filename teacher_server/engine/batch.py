"""Defines what the engine is asked for, and how long its stages took."""

from dataclasses import asdict, dataclass

from torch import Tensor

from logit_codec import TargetSpec


@dataclass(frozen=True, slots=True, eq=False)
class RowRequest:
    """Asks the engine for the targets of some rows of one sequence."""

    token_ids: Tensor
    """(L,) int64."""
    rows: Tensor
    """(N,) int64, ascending, below L - 1: row i is the distribution of token i + 1."""
    spec: TargetSpec
    temperature: float = 1.0
    uniforms: Tensor | None = None
    """(N,) float64 in [0, 1), for a spec that draws."""
    given_ids: Tensor | None = None
    """(N, M) int64, for a spec whose ids are given; a shorter row repeats its last id."""


@dataclass(frozen=True, slots=True)
class PackTimes:
    """Seconds that one launch took in each stage.

    On a CPU, launching is computing: `launch_s` then holds what the device did, and `wait_s` is 0.
    """

    fill_s: float
    """Laying the sequences out."""
    launch_s: float
    """Handing the work to the device."""
    wait_s: float
    """Waiting for the device, after everything was launched."""
    forward_s: float
    """The device's own time in the base model."""
    head_s: float
    """The device's own time in the vocabulary head and the selection."""
    copy_s: float
    """The device's own time copying what was selected."""

    def by_stage(self) -> dict[str, float]:
        """Returns the seconds of each stage, by its name."""
        return {name.removesuffix("_s"): seconds for name, seconds in asdict(self).items()}

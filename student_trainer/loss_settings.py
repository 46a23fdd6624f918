"""Declares the options of `student-trainer train` that say what the loss is."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from logitstream.options import Settings
from student_trainer.schedules import LinearSchedule, default_weights


def _read_scheduled(value: float | str) -> float | str:
    return LinearSchedule.parse(value).setting


def _read_weight(value: float | str) -> float | str:
    schedule = LinearSchedule.parse(value)
    if min(schedule.ends) < 0:
        raise ValueError(f"must be at least 0, got {value}")
    return schedule.setting


NO_TARGETS = "none"
"""Stands for targets where a student learns from the text alone."""
Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"
]
Scheduled = Annotated[float | str, AfterValidator(_read_scheduled)]
"""A number, or two such as 0.5->0.1: in the first and in the last step."""
Weight = Annotated[float | str, AfterValidator(_read_weight)]


class LossSettings(Settings):
    """What a student learns from a teacher's targets, and how much it counts."""

    divergence: Divergence = "forward_kl"
    """Divergence from the teacher."""
    beta: Scheduled | None = None
    """Parameter of jsd, skew_kl and skew_reverse_kl; "0.1->0.9" goes from one number to the other
    over the steps. Without --divergence, as in TRL: 0 is forward_kl, 1 reverse_kl, and in between
    jsd."""
    kd_weight: Weight = 1.0
    """Weight of the divergence from the teacher; "0.5->0.9" goes from one number to the other over
    the steps. With top_k targets and no --ce-weight it is 0.7."""
    ce_weight: Weight = 0.0
    """Weight of the cross-entropy on the labels; "0.5->0.1" as above. With top_k targets and no
    --kd-weight it is 0.3: their tail says nothing."""
    entropy_routing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows of each batch, those of lowest teacher entropy, that learn from the label
    instead of the teacher, such as 0.15. Needs --targets with entropy=1."""
    adaptive_label_weight: float = Field(default=0.0, ge=0, le=1)
    """Blend the label into the teacher's distribution where the teacher did not expect it: with this
    weight times the teacher's probability of all other tokens."""
    features: str = ""
    """States of the teacher's layers to learn as well, such as features:layers=8+16. They are asked
    for separately: the teacher reads the text twice."""
    feature_layers: str = ""
    """Layers of the student that learn them, in the same order, such as 4+8."""
    feature_loss: Literal["mse", "cosine"] = "mse"
    """Difference between the states of student and teacher."""
    feature_weight: float = Field(default=1.0, gt=0)
    """Weight of that difference."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_loss(cls, given: Any) -> Any:
        """Chooses what is not given by what is."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if filled.get("kd_weight") is filled.get("ce_weight") is None:
            kind = str(filled.get("targets", "")).partition(":")[0].strip()
            weights = (0.0, 1.0) if kind == NO_TARGETS else default_weights(kind, None, None)
            filled["kd_weight"], filled["ce_weight"] = weights
        if filled.get("beta") is not None and "divergence" not in filled:
            try:
                beta = LinearSchedule.parse(filled["beta"]).setting
            except (TypeError, ValueError):
                return filled  # and is refused
            ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
            filled["divergence"] = ends.get(beta, "jsd") if isinstance(beta, float) else "jsd"
            if beta in ends:
                del filled["beta"]
        return filled

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if not self.features:
            if self.feature_layers:
                raise ValueError(
                    "--feature-layers are the student's for --features: give the teacher's too, such as "
                    "--features features:layers=8+16"
                )
            return self
        from logit_codec import FeaturesSpec, parse_targets  # loads torch, which mistakes need not

        try:
            spec = parse_targets(self.features)
        except ValueError as error:
            raise ValueError(f"--features: {error}") from None
        if not isinstance(spec, FeaturesSpec):
            raise ValueError(
                "--features are states of the teacher's layers, such as features:layers=8+16; got "
                f"{self.features}"
            )
        words = self.feature_layers.split("+") if self.feature_layers else []
        if len(words) != len(spec.layers) or not all(word.strip().isdecimal() for word in words):
            raise ValueError(
                f"--feature-layers must name {len(spec.layers)} of the student's layers, one for each of "
                f"{self.features}, such as {'+'.join(map(str, spec.layers))}; got "
                f"{self.feature_layers or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        has_beta = self.divergence in ("jsd", "skew_kl", "skew_reverse_kl")
        if self.beta is not None and not has_beta:
            raise ValueError(f"--divergence {self.divergence} has no --beta: leave it out")
        ends = () if self.beta is None else LinearSchedule.parse(self.beta).ends
        if self.divergence == "jsd" and not all(0 < end < 1 for end in ends):
            raise ValueError(
                f"--beta of jsd must be between 0 and 1, got {self.beta}. Without --divergence, "
                "--beta 0 is forward_kl and 1 is reverse_kl"
            )
        return self

"""Defines what a user may set about distillation in a Trainer, and refuses what cannot work."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import transformers

from logit_codec import FeaturesSpec, TargetSpec, parse_targets
from student_trainer.losses.checks import check_divergence
from student_trainer.losses.features import LOSSES
from student_trainer.schedules import LinearSchedule, default_weights
from student_trainer.teachers.look_ahead import parse_ahead
from student_trainer.teachers.request import ScoreOptions


@dataclass
class DistillationArguments:
    """How to learn from the teacher; `HfArgumentParser` turns the fields into flags."""

    targets: str = field(
        default="sampled", metadata={"help": "What to ask for: sampled, sampled:N, top_k:K, ..."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the divergence."}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence from the teacher, see distillation_loss."},
    )
    beta: float | str | None = field(
        default=None,
        metadata={
            "help": "Parameter of the divergences that have one; 0.1->0.9: from step to step."
        },
    )
    kd_weight: float | str | None = field(
        default=None,
        metadata={
            "help": "Weight of the divergence; 0.5->0.9: from step to step. Default: 1, with top_k 0.7."
        },
    )
    ce_weight: float | str | None = field(
        default=None,
        metadata={
            "help": "Weight of the cross-entropy on the labels; 0.5->0.1: from step to step. Default: 0, "
            "with top_k 0.3. If one of both weights is given, the other is 1 or 0."
        },
    )
    entropy_routing: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rows of each batch, those of lowest teacher entropy, that learn from "
            "the label instead of the teacher; needs targets with entropy=1."
        },
    )
    adaptive_label_weight: float = field(
        default=0.0,
        metadata={
            "help": "Blend the label into the teacher's distribution: by this, 0 to 1, times how much "
            "of the probability the teacher gives to other tokens."
        },
    )
    features: str = field(
        default="",
        metadata={"help": "States of the teacher's layers to learn as well: features:layers=8+16."},
    )
    feature_layers: str = field(
        default="",
        metadata={"help": "The student's layers that learn them, in the same order: 4+8."},
    )
    feature_loss: str = field(
        default="mse", metadata={"help": "Difference between two states: mse or cosine."}
    )
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of that difference."})
    ahead: str = field(
        default="30s",
        metadata={
            "help": "How far to request ahead: what is trained in this time, or a number of batches."
        },
    )
    check_first_batch: bool = field(
        default=True, metadata={"help": "Check that targets and tokens belong together."}
    )
    fused: bool = field(
        default=True,
        metadata={"help": "Never make the student's logits in full, where its head allows that."},
    )
    patience_s: float = field(
        default=300.0, metadata={"help": "How long to wait while the teacher does not answer."}
    )

    @property
    def look_ahead(self) -> int | str:
        """`ahead` as `stream_batches` takes it: the values of flags are strings."""
        return int(self.ahead) if str(self.ahead).isdigit() else self.ahead

    @property
    def weights(self) -> tuple[LinearSchedule, LinearSchedule]:
        """The weights of the divergence and of the labels. Raises ValueError."""
        kind = parse_targets(self.targets).kind
        weights = default_weights(kind, self.kd_weight, self.ce_weight)
        return LinearSchedule.parse(weights[0]), LinearSchedule.parse(weights[1])

    @property
    def beta_schedule(self) -> LinearSchedule | None:
        """`beta`, if it is given. Raises ValueError."""
        return None if self.beta is None else LinearSchedule.parse(self.beta)

    def make_request(self, seed: int, epoch: int) -> ScoreOptions:
        """Returns what is asked for of each sequence of an epoch. Raises InvalidRequest."""
        return ScoreOptions.of(self.targets, self.temperature, seed, epoch)

    def make_feature_request(self, seed: int, epoch: int) -> ScoreOptions:
        """Returns the same of the second request, for states. Raises InvalidRequest."""
        options = ScoreOptions.of(self.features, 1.0, seed, epoch)
        # The targets have that already; without it the teacher's vocabulary head is skipped.
        return replace(options, spec=replace(options.spec, realized=False))

    def map_layers(self) -> dict[int, int]:
        """Returns {layer of the teacher: layer of the student}. Raises ValueError."""
        spec = self.make_feature_request(seed=0, epoch=0).spec
        if not isinstance(spec, FeaturesSpec):
            raise ValueError(
                f"features are states of layers, such as 'features:layers=8+16'; got {self.features!r}"
            )
        try:
            own = [int(number) for number in self.feature_layers.split("+")]
        except ValueError:
            own = []
        if len(own) != len(spec.layers) or min(own) < 0:
            raise ValueError(
                f"feature_layers must name a layer of the student for each of the {len(spec.layers)} "
                f"layers in {self.features!r}, in the same order and joined by +, such as "
                f"{'+'.join(str(layer // 2) for layer in spec.layers)!r}; got {self.feature_layers!r}"
            )
        return dict(zip(spec.layers, own, strict=True))

    def describe_loss(self) -> dict[str, Any]:
        """Returns the settings that decide the loss, for a checkpoint."""
        names = ["targets", "temperature", "divergence", "beta"]
        names += ["entropy_routing", "adaptive_label_weight"]
        if self.features:
            names += ["features", "feature_layers", "feature_loss", "feature_weight"]
        kd_weight, ce_weight = self.weights
        return {
            **{name: getattr(self, name) for name in names},
            "kd_weight": kd_weight.setting,
            "ce_weight": ce_weight.setting,
        }


def check_arguments(arguments: DistillationArguments) -> None:
    """Raises ValueError for targets, a divergence or weights that make no loss."""
    spec = arguments.make_request(seed=0, epoch=0).spec
    parse_ahead(arguments.look_ahead)
    if isinstance(spec, FeaturesSpec):
        raise ValueError(
            f"targets={arguments.targets!r} are states of layers, from which no divergence can be "
            f"computed. Ask for them beside a distribution: features={arguments.targets!r} with "
            "feature_layers, the student's layers that learn them, and targets='sampled'."
        )
    beta = _read(arguments, "beta") or LinearSchedule(0.5, 0.5)
    for end in beta.ends:
        check_divergence(spec.kind, arguments.divergence, end)
    if spec.needs_given_ids:
        raise ValueError(
            "a Trainer names no ids for targets='given_ids': ask for 'top_k:...', or write the loop "
            "yourself with teacher.stream_batches(..., given_ids=...)"
        )
    for name in ("kd_weight", "ce_weight"):
        weight = _read(arguments, name)
        if weight is not None and min(weight.ends) < 0:
            raise ValueError(f"{name} must be at least 0, got {weight.setting}")
    _check_features(arguments)
    has_weight = any(end for weight in arguments.weights for end in weight.ends)
    if not (has_weight or arguments.features):
        raise ValueError("kd_weight and ce_weight are both 0: there is nothing to learn")
    check_label_options(spec, arguments.entropy_routing, arguments.adaptive_label_weight)


def check_label_options(spec: TargetSpec, routing: float, adaptive: float) -> None:
    """Raises ValueError for shares that are none, and for targets that do not carry what they need."""
    if not 0 <= routing < 1:
        raise ValueError(f"entropy_routing must be at least 0 and below 1, got {routing}")
    if not 0 <= adaptive <= 1:
        raise ValueError(f"adaptive_label_weight must be 0 to 1, got {adaptive}")
    for name, value, needed in (
        ("entropy_routing", routing, "entropy"),
        ("adaptive_label_weight", adaptive, "realized"),
    ):
        if value and not getattr(spec, needed):
            asked = replace(spec, **{needed: True})
            raise ValueError(
                f"{name} reads what targets={str(spec)!r} do not carry: ask for targets={str(asked)!r}"
            )


def _read(arguments: DistillationArguments, name: str) -> LinearSchedule | None:
    """Reads a number that may change over the steps. Raises ValueError, with its name."""
    value = getattr(arguments, name)
    try:
        return None if value is None else LinearSchedule.parse(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _check_features(arguments: DistillationArguments) -> None:
    """Raises ValueError for features that make no loss, and for settings of a loss on none."""
    if not arguments.features:
        for one in fields(arguments):
            if one.name.startswith("feature_") and getattr(arguments, one.name) != one.default:
                raise ValueError(
                    f"{one.name} does nothing without features, the layers of the teacher to learn "
                    "from, such as 'features:layers=8+16'"
                )
        return
    arguments.map_layers()
    if arguments.feature_loss not in LOSSES:
        raise ValueError(
            f"feature_loss must be {' or '.join(LOSSES)}, got {arguments.feature_loss!r}"
        )
    if not 0 < arguments.feature_weight < math.inf:
        raise ValueError(
            f"feature_weight must be above 0 and finite, got {arguments.feature_weight}. To learn "
            "from no features, leave features out."
        )


def refuse_other_losses(args: transformers.TrainingArguments, loss_func: Any) -> None:
    """Raises ValueError for settings of a Trainer that a loss from a teacher would ignore."""
    reason = (
        "would have no effect: with a teacher the loss is kd_weight times the divergence from it plus "
        "ce_weight times the cross-entropy on the labels"
    )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} {reason}. Leave it at 0; the "
            "teacher's distribution is already smoother than the labels."
        )
    if getattr(args, "loss_type", "nll") == "dft":
        raise ValueError(
            f"loss_type='dft' {reason}. Leave it at 'nll', or train without a teacher."
        )
    if loss_func is not None:
        raise ValueError(f"compute_loss_func {reason}. Leave it out, or train without a teacher.")

"""Turns specs into messages and back, and describes a model in a message, for both sides."""

from typing import Any, Protocol

from logit_codec import FORMAT_VERSION, TargetSpec
from logit_codec.kinds import KINDS, kind_named
from protos import teacher_pb2


class DescribedModel(Protocol):
    """The parts of a teacher's model that `describe_model` reads."""

    @property
    def name(self) -> str: ...
    @property
    def weights_fingerprint(self) -> str: ...
    @property
    def tokenizer_fingerprint(self) -> str: ...
    @property
    def teacher_fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def effective_vocab_size(self) -> int: ...
    @property
    def architecture(self) -> str: ...


def fill_targets(message: teacher_pb2.TargetSpec, spec: TargetSpec) -> None:
    """Sets a message to a spec; the id table is left as it is. Raises KeyError for another kind."""
    message.omit_realized_logprob = not spec.realized
    message.entropy = spec.entropy
    message.omit_log_z = not spec.log_z
    content = getattr(message, kind_named(spec.kind).name)
    content.SetInParent()  # a kind without options is named all the same
    spec.fill(content)


def read_targets(message: teacher_pb2.TargetSpec) -> TargetSpec:
    """Reads the spec of a message. Raises ValueError for no known kind and for bad values."""
    name = message.WhichOneof("kind")
    if name is None:
        raise ValueError(
            f"targets names no kind that this service knows; it has {', '.join(KINDS)}"
        )
    return kind_named(name).spec.read(
        getattr(message, name),
        realized=not message.omit_realized_logprob,
        entropy=message.entropy,
        log_z=not message.omit_log_z,
    )


def scope_of(message: teacher_pb2.TargetSpec) -> str:
    """Returns what a team must be allowed to do to ask for these targets."""
    name = message.WhichOneof("kind")
    return "score" if name is None else kind_named(name).scope


def describe_model(model: DescribedModel, **fields: Any) -> teacher_pb2.TeacherInfo:
    """Makes the answer to Describe from a model, this version's kinds and format, and `fields`."""
    return teacher_pb2.TeacherInfo(
        **{
            "model": model.name,
            "weights_fingerprint": model.weights_fingerprint,
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "teacher_fingerprint": model.teacher_fingerprint,
            "vocab_size": model.vocab_size,
            "effective_vocab_size": model.effective_vocab_size,
            "architecture": model.architecture,
            "kinds": KINDS,
            "format_versions": [FORMAT_VERSION],
            **fields,
        }
    )

"""Turns specs into messages and back, and describes a model in a message, for both sides."""

from typing import Any, Protocol

import numpy as np
import torch

from logit_codec import FORMAT_VERSION, GivenIds, TargetSpec, TeacherHead
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
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def client_head(self) -> TeacherHead | None: ...


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


def fill_given_ids(message: teacher_pb2.ScoreRequest, given: GivenIds) -> None:
    """Sets the ids that are given for the requested rows."""
    sizes = given.sizes
    message.given_ids = given.token_ids.numpy().astype("<i4").tobytes()
    is_same = len(sizes) > 0 and bool((sizes == sizes[0]).all())
    message.given_counts[:] = sizes[:1].tolist() if is_same else sizes.tolist()


def read_given_ids(message: teacher_pb2.ScoreRequest, num_rows: int) -> GivenIds:
    """Reads the ids that are given for `num_rows` rows.

    Raises ValueError unless each row has at least one, ascending and not negative.
    """
    counts = np.array(message.given_counts, dtype=np.int64)
    if len(counts) not in (1, num_rows):
        raise ValueError(
            "given_counts must be one number, or one for each requested row: there are "
            f"{num_rows} rows, got {len(counts)} numbers"
        )
    if not counts.all():
        raise ValueError(
            f"at least one id must be given for each row, got 0 in given_counts[{counts.argmin()}]"
        )
    counts = np.broadcast_to(counts, num_rows)
    total, nbytes = int(counts.sum()), len(message.given_ids)
    if 4 * total != nbytes:
        raise ValueError(
            f"given_counts adds up to {total} ids of 4 bytes for {num_rows} rows, given_ids has "
            f"{nbytes} bytes"
        )
    ids = np.frombuffer(message.given_ids, "<i4").astype(np.int64)
    splits = np.concatenate([[0], counts.cumsum()])
    is_wrong = ids < 0
    is_wrong[1:] |= ids[1:] <= ids[:-1]
    starts = splits[:-1]
    is_wrong[starts] = ids[starts] < 0  # the first of a row may be below the last of the row before
    if is_wrong.any():
        row = int(np.searchsorted(splits, is_wrong.argmax(), "right")) - 1
        raise ValueError(
            f"given_ids must ascend within a row, none twice and none negative; row {row} of the "
            "requested ones does not"
        )
    return GivenIds(torch.from_numpy(splits), torch.from_numpy(ids))


def scope_of(message: teacher_pb2.TargetSpec) -> str:
    """Returns what a team must be allowed to do to ask for these targets."""
    name = message.WhichOneof("kind")
    return "score" if name is None else kind_named(name).scope


def describe_precision(info: teacher_pb2.TeacherInfo) -> str:
    """Says in which dtype a teacher computes and how it is quantised; empty if it does not tell."""
    quantised = info.quantization not in ("", "none")
    return f"{info.dtype}, quantised with {info.quantization}" if quantised else info.dtype


def describe_model(model: DescribedModel, **fields: Any) -> teacher_pb2.TeacherInfo:
    """Makes the answer to Describe from a model, this version's kinds and format, and `fields`."""
    missing = {"hidden"} if model.client_head is None else set()
    if not model.num_layers:
        missing.add("features")
    kinds = [kind for kind in KINDS if kind not in missing]
    return teacher_pb2.TeacherInfo(
        **{
            "model": model.name,
            "weights_fingerprint": model.weights_fingerprint,
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "teacher_fingerprint": model.teacher_fingerprint,
            "vocab_size": model.vocab_size,
            "effective_vocab_size": model.effective_vocab_size,
            "architecture": model.architecture,
            "kinds": kinds,
            "head_fingerprint": "" if model.client_head is None else model.client_head.fingerprint,
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            "stop_ids": model.stop_ids,
            "format_versions": [FORMAT_VERSION],
            **fields,
        }
    )

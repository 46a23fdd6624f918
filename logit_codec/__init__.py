"""What is kept of a teacher's distributions, and its bytes. Imports torch, numpy and xxhash only."""

from logit_codec.errors import CodecError
from logit_codec.fingerprints import ids_digest, tokenizer_fingerprint
from logit_codec.header import FORMAT_VERSION
from logit_codec.ids import IdTable, expected_inclusions, fit_id_table
from logit_codec.sampling import uniforms
from logit_codec.selection import select
from logit_codec.spec import DenseSpec, SampledSpec, TargetSpec, TopKSpec, parse_targets
from logit_codec.targets import DenseTargets, SampledTargets, SparseTargets, Targets, TopKTargets
from logit_codec.wire import decode, encode, encode_parts

__all__ = [
    "FORMAT_VERSION",
    "CodecError",
    "DenseSpec",
    "DenseTargets",
    "IdTable",
    "SampledSpec",
    "SampledTargets",
    "SparseTargets",
    "TargetSpec",
    "Targets",
    "TopKSpec",
    "TopKTargets",
    "decode",
    "encode",
    "encode_parts",
    "expected_inclusions",
    "fit_id_table",
    "ids_digest",
    "parse_targets",
    "select",
    "tokenizer_fingerprint",
    "uniforms",
]

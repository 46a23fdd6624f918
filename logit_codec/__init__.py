"""What is kept of a teacher's distributions, and its bytes. Imports torch, numpy and xxhash only."""

from logit_codec.errors import CodecError
from logit_codec.fingerprints import tokenizer_fingerprint
from logit_codec.sampling import uniforms
from logit_codec.selection import select
from logit_codec.spec import DenseSpec, SampledSpec, TargetSpec, TopKSpec, parse_targets
from logit_codec.targets import DenseTargets, SampledTargets, Targets, TopKTargets
from logit_codec.wire import FORMAT_VERSION, decode, encode, encode_parts

__all__ = [
    "FORMAT_VERSION",
    "CodecError",
    "DenseSpec",
    "DenseTargets",
    "SampledSpec",
    "SampledTargets",
    "TargetSpec",
    "Targets",
    "TopKSpec",
    "TopKTargets",
    "decode",
    "encode",
    "encode_parts",
    "parse_targets",
    "select",
    "tokenizer_fingerprint",
    "uniforms",
]

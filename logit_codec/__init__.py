"""A compact encoding of a teacher's distributions. Imports torch, numpy and xxhash only."""

from logit_codec.errors import CodecError
from logit_codec.fingerprints import ids_digest, tokenizer_fingerprint
from logit_codec.given_ids import GivenIds
from logit_codec.header import FORMAT_VERSION
from logit_codec.id_table import IdTable, expected_inclusions, fit_id_table
from logit_codec.inputs import RowInputs
from logit_codec.kinds.dense import DenseSpec, DenseTargets
from logit_codec.kinds.features import FeaturesSpec, FeaturesTargets
from logit_codec.kinds.given_ids import GivenIdsSpec, GivenIdsTargets
from logit_codec.kinds.hidden import HiddenSpec, HiddenTargets
from logit_codec.kinds.mixed_hidden import MixedHiddenTargets
from logit_codec.kinds.realized import RealizedSpec, RealizedTargets
from logit_codec.kinds.sampled import SampledSpec, SampledTargets
from logit_codec.kinds.top_k import TopKSpec, TopKTargets
from logit_codec.parsing import parse_targets
from logit_codec.sampling import uniforms
from logit_codec.selection import Selection, select, select_rows
from logit_codec.spec import TargetSpec
from logit_codec.targets import SparseTargets, Targets
from logit_codec.teacher_head import TeacherHead
from logit_codec.wire import decode, decode_parts, encode, encode_parts

__all__ = [
    "FORMAT_VERSION",
    "CodecError",
    "DenseSpec",
    "DenseTargets",
    "FeaturesSpec",
    "FeaturesTargets",
    "GivenIds",
    "GivenIdsSpec",
    "GivenIdsTargets",
    "HiddenSpec",
    "HiddenTargets",
    "IdTable",
    "MixedHiddenTargets",
    "RealizedSpec",
    "RealizedTargets",
    "RowInputs",
    "SampledSpec",
    "SampledTargets",
    "Selection",
    "SparseTargets",
    "TargetSpec",
    "Targets",
    "TeacherHead",
    "TopKSpec",
    "TopKTargets",
    "decode",
    "decode_parts",
    "encode",
    "encode_parts",
    "expected_inclusions",
    "fit_id_table",
    "ids_digest",
    "parse_targets",
    "select",
    "select_rows",
    "tokenizer_fingerprint",
    "uniforms",
]

"""A spec survives the way through its message, and only known kinds are read."""

import pytest
from hypothesis import given, settings

from logit_codec import TargetSpec, parse_targets
from logit_codec.kinds import KINDS, kind_named, kind_numbered
from logitstream.messages import fill_targets, read_targets, scope_of
from protos import teacher_pb2
from tests.logit_codec.test_spec import SPECS


def message_of(spec: TargetSpec) -> teacher_pb2.TargetSpec:
    message = teacher_pb2.TargetSpec()
    fill_targets(message, spec)
    return message


@given(SPECS)
@settings(deadline=None, max_examples=150)
def test_a_spec_survives_the_way_through_its_message(spec):
    again = teacher_pb2.TargetSpec.FromString(message_of(spec).SerializeToString())
    assert read_targets(again) == spec


def test_the_kinds_are_those_of_the_contract():
    kinds = teacher_pb2.TargetSpec.DESCRIPTOR.oneofs_by_name["kind"].fields
    assert {field.name for field in kinds} == set(KINDS)
    assert {name: kind_named(name).number for name in KINDS} == {
        "sampled": 3,
        "top_k": 2,
        "given_ids": 4,
        "realized": 5,
        "hidden": 6,
        "features": 7,
        "dense": 1,
    }
    assert all(kind_numbered(kind_named(name).number) is kind_named(name) for name in KINDS)
    assert kind_numbered(77) is None


def test_a_message_without_a_kind_is_refused_with_the_kinds_that_there_are():
    with pytest.raises(ValueError, match=r"sampled, top_k, given_ids, .*, dense"):
        read_targets(teacher_pb2.TargetSpec())


def test_a_message_with_bad_values_is_refused_like_a_bad_spec():
    with pytest.raises(ValueError, match="between 1 and 65536 draws, got 0"):
        read_targets(teacher_pb2.TargetSpec(sampled=teacher_pb2.Sampled()))


def test_only_dense_needs_more_than_the_scope_of_all_teams():
    scopes = {
        text: scope_of(message_of(parse_targets(text)))
        for text in ("sampled", "top_k:4", "dense:f32")
    }
    assert scopes == {"sampled": "score", "top_k:4": "score", "dense:f32": "dense"}

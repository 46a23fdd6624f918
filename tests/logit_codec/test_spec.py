import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_codec import (
    DenseSpec,
    FeaturesSpec,
    GivenIdsSpec,
    HiddenSpec,
    RealizedSpec,
    SampledSpec,
    TargetSpec,
    TopKSpec,
    parse_targets,
)
from logit_codec.codes import CODE_BITS
from logit_codec.kinds import KINDS

DOCUMENTED = {
    "top_k:64": TopKSpec(64),
    "top_k:64,bits=16": TopKSpec(64, bits=16),
    "top_k:min_p=1/256,max_k=128,bits=7": TopKSpec(128, min_p=1 / 256, bits=7),
    "top_k:top_p=0.95,max_k=128": TopKSpec(128, top_p=0.95),
    "top_k:top_p=0.95,min_p=1/1024": TopKSpec(128, top_p=0.95, min_p=1 / 1024),
    "sampled": SampledSpec(64),
    "sampled:256": SampledSpec(256),
    "sampled:16,realized=0,log_z=1": SampledSpec(16, realized=False, log_z=True),
    "dense:f32": DenseSpec(32),
    "dense:bf16": DenseSpec(16),
    "top_k:64,realized=0": TopKSpec(64, realized=False),
    "top_k:64,bits=16,entropy=1": TopKSpec(64, bits=16, entropy=True),
    "top_k:min_p=1/256,max_k=128,bits=7,log_z=0": TopKSpec(128, min_p=1 / 256, log_z=False),
    "dense:f32,realized=0,entropy=1,log_z=0": DenseSpec(
        32, realized=False, entropy=True, log_z=False
    ),
    "dense:bf16,realized=1,entropy=0,log_z=1": DenseSpec(16),
    "given_ids": GivenIdsSpec(16),
    "given_ids:bits=32": GivenIdsSpec(32),
    "given_ids:ranks=1,bits=16,realized=0,entropy=1,log_z=0": GivenIdsSpec(
        16, ranks=True, realized=False, entropy=True, log_z=False
    ),
    "realized": RealizedSpec(),
    "realized:realized=1,entropy=0": RealizedSpec(),
    "hidden": HiddenSpec(8),
    "hidden:int8": HiddenSpec(8),
    "hidden:bf16,log_z=1": HiddenSpec(16, log_z=True),
    "features:layers=8+16": FeaturesSpec((8, 16)),
    "features:bf16,layers=0,realized=0": FeaturesSpec((0,), realized=False),
}


@pytest.mark.parametrize("text", DOCUMENTED)
def test_every_documented_string_parses(text):
    assert parse_targets(text) == DOCUMENTED[text]


def test_what_is_left_out_of_a_string_is_the_default_of_the_spec():
    spec = parse_targets("top_k:64")
    assert (spec.k, spec.min_p, spec.bits) == (64, 0.0, 7)
    assert (spec.realized, spec.entropy, spec.log_z) == (True, False, True)
    spec = parse_targets("sampled")
    assert (spec.n, spec.realized, spec.entropy, spec.log_z) == (64, True, False, False)


def test_spaces_and_the_order_of_options_do_not_matter():
    assert parse_targets(" top_k : 64 , bits = 16 ,entropy=1") == parse_targets(
        "top_k:64,entropy=1,bits=16"
    )
    assert parse_targets("top_k:bits=5,max_k=9,min_p=0.25") == TopKSpec(9, min_p=0.25, bits=5)


@pytest.mark.parametrize("fraction", ["0.00390625", "1/256", "2/512", "0.5/128", "3.90625e-3"])
def test_min_p_is_a_number_or_a_fraction(fraction):
    assert parse_targets(f"top_k:min_p={fraction},max_k=8").min_p == 1 / 256


def test_a_spec_is_returned_as_it_is():
    spec = TopKSpec(3)
    assert parse_targets(spec) is spec


FLAGS = {"realized": st.booleans(), "entropy": st.booleans(), "log_z": st.booleans()}
SPECS = st.one_of(
    st.builds(
        TopKSpec,
        k=st.integers(1, 2**31 - 1),
        min_p=st.just(0.0) | st.floats(0.0, 1.0),
        bits=st.sampled_from(CODE_BITS),
        top_p=st.just(0.0) | st.floats(0.0, 1.0),
        **FLAGS,
    ),
    st.builds(SampledSpec, n=st.integers(1, 65_536), **FLAGS),
    st.builds(DenseSpec, bits=st.sampled_from((16, 32)), **FLAGS),
    st.builds(GivenIdsSpec, bits=st.sampled_from((16, 32)), ranks=st.booleans(), **FLAGS),
    st.builds(RealizedSpec),
    st.builds(HiddenSpec, bits=st.sampled_from((8, 16)), **FLAGS),
    st.builds(
        FeaturesSpec,
        layers=st.sets(st.integers(0, 99), min_size=1, max_size=64).map(sorted),
        **FLAGS,
    ),
)


@given(SPECS)
@settings(deadline=None, max_examples=150)
def test_a_spec_survives_the_way_through_its_string(spec):
    assert parse_targets(str(spec)) == spec
    assert str(parse_targets(str(spec))) == str(spec)


def test_a_string_names_only_the_flags_that_differ_from_the_default():
    assert str(TopKSpec(64)) == "top_k:64,bits=7"
    assert str(TopKSpec(64, entropy=True, log_z=False)) == "top_k:64,bits=7,entropy=1,log_z=0"
    assert str(TopKSpec(9, min_p=0.25, bits=5)) == "top_k:min_p=0.25,max_k=9,bits=5"
    assert str(TopKSpec(9, top_p=0.9)) == "top_k:top_p=0.9,max_k=9,bits=7"
    assert str(DenseSpec(16, realized=False)) == "dense:bf16,realized=0"
    assert str(SampledSpec()) == "sampled:64"
    assert str(SampledSpec(16, log_z=True)) == "sampled:16,log_z=1"
    assert str(GivenIdsSpec(32, ranks=True, log_z=False)) == "given_ids:bits=32,ranks=1,log_z=0"
    assert str(RealizedSpec()) == "realized"
    assert str(HiddenSpec(16, realized=False)) == "hidden:bf16,realized=0"
    assert str(FeaturesSpec((8, 16), entropy=True)) == "features:layers=8+16,entropy=1"


BITS = "5, 6, 7, 8, 16"
TOP_K_RANGE = "top_k must be between 1 and 2**31 - 1"
OPTIONS = "realized=0|1, entropy=0|1, log_z=0|1"
NAMES = "sampled, top_k, given_ids, realized, hidden, features, dense"
LAYERS = "1 to 64 ascending numbers from 0 to 1000000"


@pytest.mark.parametrize(
    ("text", "got", "allowed"),
    [
        ("", "''", NAMES),
        ("topk:64", "'topk'", NAMES),
        ("64", "'64'", NAMES),
        ("TOP_K:64", "'TOP_K'", NAMES),
        ("sampled:x", "'x'", "whole number"),
        ("sampled:0", "got 0", "between 1 and 65536"),
        ("sampled:65537", "got 65537", "between 1 and 65536"),
        ("sampled:64,bits=7", "'bits'", OPTIONS),
        ("top_k:x", "'x'", "whole number"),
        ("top_k:6.5", "'6.5'", "whole number"),
        ("top_k:0", "got 0", TOP_K_RANGE),
        ("top_k:-1", "got -1", TOP_K_RANGE),
        ("top_k:64,bits=9", "got 9", BITS),
        ("top_k:64,bits=0", "got 0", BITS),
        ("top_k:64,bits=seven", "'seven'", "whole number"),
        ("top_k:64,bits=", "''", "whole number"),
        ("top_k:64,65", "'65'", "name=value"),
        ("top_k:bits=7,64", "'64'", "name=value"),
        ("top_k:64,bits=7,bits=16", "'bits'", "twice"),
        ("top_k:64,k=65", "'k'", f"min_p, top_p, max_k, bits, {OPTIONS}"),
        ("top_k:64,=1", "''", f"min_p, top_p, max_k, bits, {OPTIONS}"),
        ("top_k:64,realised=1", "'realised'", OPTIONS),
        ("top_k:64,realized=yes", "'yes'", "0 or 1"),
        ("top_k:64,entropy=2", "'2'", "0 or 1"),
        ("top_k:64,log_z=", "''", "0 or 1"),
        ("top_k:64,min_p=1/256", "min_p", "fixed number of entries"),
        ("top_k:64,max_k=128", "max_k", "fixed number of entries"),
        ("top_k:64,top_p=0.9", "top_p", "fixed number of entries"),
        ("top_k:top_p=0", "0.0", "greater than 0"),
        ("top_k:top_p=95", "95.0", "between 0 and 1"),
        ("top_k:min_p=0,max_k=8", "0.0", "greater than 0"),
        ("top_k:min_p=-1,max_k=8", "-1.0", "greater than 0"),
        ("top_k:min_p=1.5,max_k=8", "1.5", "between 0 and 1"),
        ("top_k:min_p=1/0,max_k=8", "'1/0'", "0.004 or 1/256"),
        ("top_k:min_p=1/2/3,max_k=8", "'1/2/3'", "0.004 or 1/256"),
        ("top_k:min_p=small,max_k=8", "'small'", "0.004 or 1/256"),
        ("top_k:min_p=nan,max_k=8", "'nan'", "finite"),
        ("top_k:min_p=inf,max_k=8", "'inf'", "finite"),
        ("top_k:min_p=1/4,max_k=many", "'many'", "whole number"),
        ("top_k:min_p=1/4,max_k=0", "got 0", TOP_K_RANGE),
        ("dense:f16", "'f16'", "f32 or bf16"),
        ("dense:32", "'32'", "f32 or bf16"),
        ("dense:f32,bf16", "'bf16'", "name=value"),
        ("dense:f32,bits=16", "'bits'", OPTIONS),
        ("dense:f32,min_p=1/256", "'min_p'", OPTIONS),
        ("given_ids:16", "'16'", "come with the request"),
        ("given_ids:bits=8", "got 8", "16 or 32"),
        ("given_ids:bits=f32", "'f32'", "whole number"),
        ("given_ids:ranks=2", "'2'", "0 or 1"),
        ("given_ids:most=9", "'most'", f"bits, ranks, {OPTIONS}"),
        ("realized:f32", "'f32'", "no options"),
        ("realized:realized=0", "realized=0", "nothing else"),
        ("realized:entropy=1", "entropy=1", "nothing else"),
        ("realized:log_z=1", "log_z=1", "nothing else"),
        ("hidden:f32", "'f32'", "int8 or bf16"),
        ("hidden:int8,hidden_size=9", "'hidden_size'", OPTIONS),
        ("features", "'features'", "features:layers=8+16"),
        ("features:8", "'features:8'", "features:layers=8+16"),
        ("features:layers=", "''", "whole number"),
        ("features:layers=8+", "''", "whole number"),
        ("features:layers=16+8", "[16, 8]", LAYERS),
        ("features:layers=8+8", "[8, 8]", LAYERS),
        ("features:layers=-1", "[-1]", LAYERS),
        ("features:layers=1000001", "[1000001]", LAYERS),
        ("features:layers=" + "+".join(map(str, range(65))), "[0, 1, 2", LAYERS),
        (None, "None", "'top_k:64'"),
        (64, "64", "'top_k:64'"),
    ],
)
def test_a_bad_string_is_refused_with_what_was_got_and_what_is_allowed(text, got, allowed):
    with pytest.raises(ValueError, match=re.escape(got)) as raised:
        parse_targets(text)
    assert allowed in str(raised.value)


@given(
    st.text(max_size=40)
    | st.lists(
        st.sampled_from(
            [
                "top_k",
                "sampled",
                "dense",
                "given_ids",
                "realized",
                "hidden",
                "features",
                "layers",
                "+",
                ":",
                ",",
                "=",
                "64",
                "f32",
                "bits",
                "7",
                "min_p",
                "1/4",
                "max_k",
            ]
        ),
        max_size=9,
    ).map("".join)
)
@settings(deadline=None, max_examples=150)
def test_any_text_is_a_spec_or_a_value_error(text):
    try:
        spec = parse_targets(text)
    except ValueError:
        return
    assert parse_targets(str(spec)) == spec


def test_a_k_that_is_too_large_is_refused_with_the_bound_it_breaks():
    with pytest.raises(ValueError, match=r"got 2147483648") as raised:
        TopKSpec(2**31)
    assert str(raised.value) == f"{TOP_K_RANGE}, got 2147483648"
    assert TopKSpec(2**31 - 1).k == 2**31 - 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSpec(0), re.escape(f"{TOP_K_RANGE}, got 0")),
        (lambda: TopKSpec(4, min_p=-0.1), "between 0 and 1, got -0.1"),
        (lambda: TopKSpec(4, min_p=1.1), "between 0 and 1, got 1.1"),
        (lambda: TopKSpec(4, min_p=float("nan")), "between 0 and 1, got nan"),
        (lambda: TopKSpec(4, bits=4), f"one of {BITS} for top_k, got 4"),
        (lambda: SampledSpec(0), "between 1 and 65536 draws, got 0"),
        (lambda: GivenIdsSpec(8), "16 or 32 for given_ids, got 8"),
        (lambda: RealizedSpec(entropy=True), "and nothing else"),
        (lambda: HiddenSpec(32), r"8 \(int8\) or 16 \(bfloat16\) for hidden, got 32"),
        (lambda: FeaturesSpec(()), r"ascending numbers from 0 to 1000000, got \[\]"),
        (lambda: DenseSpec(8), r"32 \(float32\) or 16 \(bfloat16\) for dense, got 8"),
    ],
)
def test_a_spec_made_by_hand_is_checked_as_well(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_spec_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopKSpec(4).k = 5
    assert len({TopKSpec(4), TopKSpec(4), TopKSpec(4, bits=16), DenseSpec()}) == 3


def test_the_kinds_are_those_of_the_specs():
    assert ", ".join(KINDS) == NAMES
    assert {kind.kind for kind in TargetSpec.__subclasses__()} == set(KINDS)

"""Parses the text of a spec, such as `"top_k:64"`.

`parse_targets` is the only parser of these texts; every other place takes a text or a spec.
"""

from logit_codec.kinds import KINDS, kind_named
from logit_codec.spec import COMMON_OPTIONS, OptionText, TargetSpec


def parse_targets(spec: str | TargetSpec) -> TargetSpec:
    """Returns the spec that a text such as `"top_k:64"` stands for, and a spec unchanged.

    `sampled` (64 draws), `sampled:256`, `top_k:64`, `top_k:64,bits=16`,
    `top_k:min_p=1/256,max_k=128,bits=7`, `top_k:top_p=0.95,max_k=128`, `given_ids` (16 bits),
    `given_ids:bits=32,ranks=1`, `hidden:int8`, `hidden:bf16`, `features:layers=8+16`, `dense:f32`,
    `dense:bf16`; each may be followed by `realized=0`, `entropy=1`, `log_z=0` (`log_z=1` for sampled,
    hidden and features). `realized` has no options.

    Raises ValueError, which says what was got and what is allowed.
    """
    if isinstance(spec, TargetSpec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"targets must be a string such as 'top_k:64', got {spec!r}")
    name, _, rest = spec.partition(":")
    name = name.strip()
    if name not in KINDS:
        raise ValueError(
            f"unknown kind of targets {name!r} in {spec!r}; this version has: {', '.join(KINDS)}"
        )
    kind = kind_named(name).spec
    text = _split(spec, rest)
    text.take_common()
    result = kind.parse(text)
    if text.named:
        options = ", ".join([*kind.option_names, *(f"{option}=0|1" for option in COMMON_OPTIONS)])
        raise ValueError(
            f"unknown option {next(iter(text.named))!r} in {spec!r}; {name} takes {options}"
        )
    return result


def _split(spec: str, rest: str) -> OptionText:
    """Cuts the text after the kind into options. Raises ValueError where that cannot be done."""
    words = [word.strip() for word in rest.split(",") if word.strip()]
    positional = [word for word in words if "=" not in word]
    named: dict[str, str] = {}
    for word in words:
        if "=" in word:
            name, _, value = word.partition("=")
            if name.strip() in named:
                raise ValueError(f"{name.strip()!r} is given twice in {spec!r}")
            named[name.strip()] = value.strip()
    if len(positional) > 1 or (positional and words[0] != positional[0]):
        raise ValueError(f"cannot read {positional[-1]!r} in {spec!r}: options are name=value")
    return OptionText(spec, positional[0] if positional else None, named)

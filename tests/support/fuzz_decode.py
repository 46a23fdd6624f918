"""A fuzz target for the decoder: whatever the bytes, targets or CodecError and nothing else.

    pip install atheris
    mkdir -p runs/fuzz && cp tests/golden/*.bin runs/fuzz
    python -m tests.support.fuzz_decode runs/fuzz -max_len=4096

`tests/logit_codec/test_fuzz.py` feeds the same function without atheris.
"""

import inspect
import sys

import xxhash

from logit_codec import (
    CodecError,
    IdTable,
    Targets,
    bits,
    codes,
    decode,
    encode,
    header,
    id_table,
    ids,
    planes,
    wire,
)
from logit_codec.kinds import dense, features, given_ids, hidden, realized, sampled, tail, top_k
from tests.golden import make

TABLES, GIVEN = [make.id_table()], make.given_ids()


def one_input(data: bytes) -> None:
    """Reads the bytes as a container and as an id table, as they are and under a fitting digest.

    Raises AssertionError if what was read cannot be written and read again.
    """
    body = data[:-16]
    for candidate in (data, body + xxhash.xxh3_128_digest(body)):
        try:
            targets = decode(candidate, id_tables=TABLES, given_ids=GIVEN)
        except CodecError:
            pass
        else:
            check(targets)
        try:
            table = IdTable.from_bytes(candidate)
        except CodecError:
            pass
        else:
            assert table.to_bytes() == candidate


def check(targets: Targets) -> None:
    """What was decoded is encoded and decoded again."""
    again = decode(encode(targets, bits=16), given_ids=GIVEN)
    assert (again.kind, again.num_rows) == (targets.kind, targets.num_rows)


def main() -> None:
    import atheris  # not among the project's dependencies

    # What was imported already is not covered unless its functions are instrumented one by one.
    kinds = (sampled, top_k, given_ids, tail, realized, hidden, features, dense)
    for module in (wire, header, planes, codes, *kinds, ids, id_table, bits):
        for value in vars(module).values():
            members = vars(value).values() if inspect.isclass(value) else [value]
            for member in members:
                function = getattr(member, "__func__", member)
                if getattr(function, "__module__", None) == module.__name__ and inspect.isfunction(
                    function
                ):
                    atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

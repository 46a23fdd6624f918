"""The fuzz target of tests/support/fuzz_decode.py on a corpus of golden files and edits of them."""

import random

import pytest

from tests.golden import make
from tests.support.fuzz_decode import one_input

CORPUS = sorted(make.FOLDER.glob("*.bin"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_fuzz_target_takes_the_golden_files_and_edits_of_them(path):
    data = path.read_bytes()
    one_input(data)
    draw = random.Random(path.name)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            edit = draw.random()
            at = draw.randrange(len(changed))
            if edit < 0.6:
                changed[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            elif edit < 0.8:
                del changed[at : at + draw.choice((1, 4))]
            else:
                changed[at:at] = changed[: draw.choice((1, 4, 8))]
            if not changed:
                break
        one_input(bytes(changed))


@pytest.mark.parametrize("data", [b"", b"LSTG", b"LSTI", bytes(16), bytes(72), b"LSTG\1" * 20])
def test_the_fuzz_target_takes_bytes_that_are_nothing(data):
    one_input(data)

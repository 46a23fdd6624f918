"""What a trainer of one team does here: it asks for targets for a while, and counts them.

Run by `python -m examples.two_teams`, with the team's token in TEACHER_TOKEN.
"""

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from student_trainer import connect

LENGTH = 128  # tokens of a sequence


def main(connection: str, seconds: float) -> None:
    """Streams after the word to go; prints the tokens that were answered."""
    with connect(connection) as teacher:  # the token comes from TEACHER_TOKEN
        print("connected", flush=True)
        sys.stdin.readline()
        ends = time.monotonic() + seconds

        def sequences() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(0)
            while time.monotonic() < ends:
                yield torch.randint(3, teacher.info.vocab_size, (LENGTH,), generator=generator)

        answered = 0
        for token_ids, _ in teacher.stream(sequences(), targets="top_k:16", ahead=32):
            if time.monotonic() < ends:
                answered += len(token_ids)
        print(f"tokens {answered}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

"""Sets what libraries read from the environment once, when they are loaded."""

import os

SPINS = 30_000
"""How often a thread of OpenMP looks for work before it sleeps: for half a millisecond, longer than nearly
all the gaps of a pack in which one thread alone computes. By default it looks for many milliseconds,
on a core that an encoder, a client or a trainer on the same machine could have (docs/log.md)."""


def set_environment() -> None:
    """Sets what this process needs and its operator has not set; call it before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))

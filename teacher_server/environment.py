"""Sets what libraries read from the environment once, when they are loaded."""

import os

SPINS = 1000
"""How often a thread of OpenMP looks for the others before it sleeps, about 50 us long: what a sleep
costs. Without a limit it looks for milliseconds, on a core that a thread of an encoder, a client or
a trainer on the same machine could have (docs/log.md)."""


def set_environment() -> None:
    """Sets what this process needs and its operator has not set; call it before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))

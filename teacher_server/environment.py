"""Sets what libraries read from the environment once, when they are loaded."""

import os

SPINS = 1_000
"""How often a thread of OpenMP looks for work before it sleeps: for some 15 us. By default it looks for
milliseconds, on a core that an encoder, a client or a trainer on the same machine could have; where
those compete for the cores, a pack then takes many times as long (docs/log.md)."""


def set_environment() -> None:
    """Sets what this process needs and its operator has not set; call it before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))

"""Answers that are slow to encode: computing waits for them, and nothing gets stuck or lost."""

import time
import urllib.request

import torch

from student_trainer import connect
from tests.end_to_end.test_processes import free_port
from tests.support.fleet import wait_until

ENCODE_S = 0.02
MAX_NBYTES = 1 << 20
SEQUENCE = torch.arange(60)
"""Its dense answer has 59 * 1001 * 4 bytes: four fit into the bound."""


def slow_encoding() -> None:
    """Runs in the service."""
    from teacher_server.pipeline import encoding

    encode_parts = encoding.encode_parts

    def slowly(*arguments, **options):
        time.sleep(ENCODE_S)
        return encode_parts(*arguments, **options)

    encoding.encode_parts = slowly


def test_computing_does_not_run_ahead_of_encoding_and_clients_may_leave(serve, model_folder):
    port = free_port()
    served = serve(
        model_folder("Gemma2", 1001),
        *("--metrics-port", str(port), "--targets.max-reply-mib", "1"),
        hook=slow_encoding,
    )

    def unencoded() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        (line,) = (one for one in lines if one.startswith("teacher_unencoded_bytes "))
        return float(line.split()[1])

    most = 0.0
    with connect(served.address) as teacher:
        pairs = teacher.stream([SEQUENCE] * 40, targets="dense", ahead=40)
        for number, (_, targets) in enumerate(pairs):
            assert targets.num_rows == len(SEQUENCE) - 1
            if number % 4 == 0:
                most = max(most, unencoded())
    assert 0 < most <= 2 * MAX_NBYTES
    assert unencoded() == 0
    with connect(served.address) as teacher:  # leaves while answers wait to be encoded
        pairs = teacher.stream([SEQUENCE] * 40, targets="dense", ahead=40)
        next(pairs)
    wait_until(lambda: unencoded() == 0, "what nobody wants is forgotten")
    with connect(served.address) as teacher:
        pairs = teacher.stream([SEQUENCE] * 40, targets="dense", ahead=40)
        next(pairs)
        assert served.stop() == 0
    assert "Traceback" not in served.output()

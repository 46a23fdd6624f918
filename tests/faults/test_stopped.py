"""Replicas that are stopped on purpose while trainers use them (row 3)."""

import signal
import threading
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.fleet import SMALL_BATCHES, Fleet
from tests.support.oracle import Plan, Training, assert_same

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_rolling_update_is_no_error_at_any_trainer(serve, folder, fault_free, tmp_path: Path):
    plan = Plan(ahead=4)
    with Fleet(serve, folder, flags=SMALL_BATCHES, batch_s=0.4) as fleet:
        fleet.wait_known()
        training = Training(fleet.addresses[:1], plan, tmp_path / "run")
        training.wait_steps(5)
        for index in (0, 1):
            states: list[int] = []
            watching = _watch_health(fleet.own[index], states)
            assert fleet.replicas[index].stop(signal.SIGTERM) == 0
            watching.join(10)
            assert states == [SERVING, NOT_SERVING]
            assert "Traceback" not in fleet.replicas[index].output()
            fleet.start(index)
            fleet.wait_known()
        assert training.steps < plan.steps, "the run ended before the update"
        fleet.hurry()
        left = training.wait()
        assert_same(left, fault_free(plan))
        assert all(one.counters["stalled"] == one.counters["corrupt"] == 0 for one in left)
        assert all(one.longest_wait_s < 10.0 for one in left), "O6"
        fleet.assert_nothing_left()


def _watch_health(address: str, states: list[int]) -> threading.Thread:
    """Collects what a replica says of its health until it serves no more."""
    started = threading.Event()

    def watch() -> None:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=60):
                    states.append(answer.status)
                    started.set()
                    if answer.status == NOT_SERVING:
                        return
            except grpc.RpcError:
                pass

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert started.wait(10)
    return thread

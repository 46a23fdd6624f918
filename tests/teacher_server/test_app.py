"""What app.py makes of a configuration, without a cluster; tests/ray has it run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call_builder
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from teacher_server import app
from teacher_server.app import TeacherReplica, build
from teacher_server.cluster.ray_address import check_ray_address
from teacher_server.config import ServeConfig
from teacher_server.errors import ServeError

YAML = Path(__file__).parents[2] / "deploy" / "serve.yaml"


def deployment(**fields) -> serve.Deployment:
    return build(ServeConfig(model="m", **fields))._bound_deployment


def given(application: serve.Application) -> ServeConfig:
    (config,) = application._bound_deployment.init_args
    return config


def test_the_yaml_in_deploy_is_an_application_that_serve_accepts():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text()))
    assert schema.proxy_location == "Disabled"
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert application.route_prefix is None
    made = call_builder(build, application.args)
    config = given(made)
    assert isinstance(config, ServeConfig)  # not a dict, which Ray hands over if it can
    assert (config.port, config.replicas, config.batch.max_tokens) == (50051, 2, 8192)
    assert made._bound_deployment.num_replicas == 2
    assert made._bound_deployment.ray_actor_options["num_gpus"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"modle": "m"}, "modle"),
        ({"model": "m", "port": 0}, "port"),
        ({"model": "m", "name": "x"}, "name"),
        ({"model": "m", "standalone": True}, "standalone"),
        ({"model": "m", "host": "0.0.0.0"}, "allow-public"),
    ],
)
def test_arguments_that_make_no_application_are_refused(arguments, words: str):
    with pytest.raises(ValueError, match=words):
        call_builder(build, arguments)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            {"model": "m", "prot": 1},
            ["prot in args is not an option of serve (did you mean port?)"],
        ),
        (
            {"model": "m", "batch": {"max_token": 1}},
            ["batch.max_token in args is not an option of serve (did you mean batch.max-tokens?)"],
        ),
        ({"model": "m", "port": "x"}, ["port in args must be a valid integer, got 'x'"]),
        (
            {"modle": "m"},
            ["modle in args is not an option of serve (did you mean model?)", "MODEL is missing"],
        ),
        (
            {"model": "m", "replicas": 0},
            ["replicas in args must be greater than or equal to 1, got 0"],
        ),
        (
            {"model": "m", "dtype": "int8"},
            ["dtype in args must be 'auto', 'float32', 'bfloat16' or"],
        ),
        ({"model": "m", "tls_cert": "a.pem"}, ["TLS needs both: --tls-cert and --tls-key"]),
    ],
)
def test_a_mistake_in_the_yaml_is_a_line_that_serve_shows_without_a_traceback(arguments, lines):
    with pytest.raises(RayServeException) as caught:  # of others Serve shows the traceback
        call_builder(build, arguments)
    said = str(caught.value).splitlines()
    assert len(said) == len(lines), said
    assert all(one.startswith(line) for one, line in zip(said, lines, strict=True)), said


def test_a_wrong_address_of_a_cluster_is_told_at_once():
    with pytest.raises(
        ServeError, match=r"no Ray answers at --ray-address 127\.0\.0\.1:1: .*refused"
    ):
        check_ray_address("127.0.0.1:1")
    with pytest.raises(ServeError, match="It is auto, or the HOST:PORT of the cluster's GCS"):
        check_ray_address("127.0.0.1")


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({"device": "cpu"}, 0),
        ({"device": "auto"}, 0),  # no cluster, so none with a GPU
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "gpus_per_replica": 0.5}, 0.5),
        ({"gpus_per_replica": 2}, 2),
    ],
)
def test_gpus_of_a_replica(fields, gpus: float):
    assert deployment(**fields).ray_actor_options["num_gpus"] == gpus


def test_replicas_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))

    def threads(**fields) -> int | None:
        return given(build(ServeConfig(model="m", **fields))).threads

    assert threads() == 16
    assert threads(replicas=3) == 5
    assert threads(replicas=2, max_replicas=8) == 2
    assert threads(replicas=40) == 1
    assert threads(replicas=4, threads=7) == 7


def test_serve_waits_for_the_drain_before_it_kills():
    assert deployment(drain_s=30.0)._deployment_config.graceful_shutdown_timeout_s > 60


@pytest.fixture
def scaled() -> DeploymentAutoscalingState:
    """What Serve's controller holds of an application that scales, with two replicas that run."""
    made = deployment(
        replicas=2, max_replicas=5, target_queue_s=1.0, scale_up_after_s=1, scale_down_after_s=4
    )
    # As it travels to the controller.
    config = DeploymentConfig.from_proto_bytes(made._deployment_config.to_proto_bytes())
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    state = DeploymentAutoscalingState(SERVED)
    info = SimpleNamespace(
        deployment_config=config, target_capacity=None, target_capacity_direction=None
    )
    assert state.register(info, 2) == 2
    return state


SERVED = DeploymentID(name="Teacher", app_name="teacher")


def say(state: DeploymentAutoscalingState, now: float, loads: dict[str, tuple[float, float]]):
    """Lets replicas run and report, as Serve does it."""
    ids = {name: ReplicaID(name, SERVED) for name in loads}
    state.update_running_replica_ids(list(ids.values()))
    for name, load in loads.items():
        metrics = {
            key: [TimeStampedValue(now, value)]
            for key, value in zip(("queue_s", "busy"), load, strict=True)
        }
        state.record_request_metrics_for_replica(ReplicaMetricReport(ids[name], metrics, now))


def test_serve_scales_by_what_replicas_report(scaled, monkeypatch):
    target = 2

    def decide(now: float, **loads: tuple[float, float]) -> int:
        nonlocal target
        monkeypatch.setattr("time.time", lambda: now)
        say(scaled, now, loads)
        target = scaled.get_decision_num_replicas(target)
        return target

    assert decide(0.0, a=(0.0, 0.0), b=(0.0, 0.0)) == 2
    assert decide(1.0, a=(2.0, 1.0), b=(1.4, 1.0)) == 2
    assert decide(2.1, a=(2.0, 1.0), b=(1.4, 1.0)) == 4  # 3.4 s of work: a second for each
    assert decide(3.0, a=(9.0, 1.0), b=(9.0, 1.0)) == 4  # two are loading
    busy = {name: (0.1, 0.6) for name in "abcd"}
    for second in range(4, 8):
        assert decide(float(second), **busy) == 4
    assert decide(8.5, **busy) == 3  # 2.4 of them were busy
    idle = {name: (0.0, 0.0) for name in "abc"}
    for second in range(9, 16):
        decide(float(second), **idle)
    assert target == 2  # the least


def test_the_policy_needs_nothing_that_servers_of_ray_do_not_have(tmp_path):
    scaling = deployment(max_replicas=5)._deployment_config.autoscaling_config
    (tmp_path / "policy").write_bytes(scaling.policy.get_serialized_policy_def())
    # Where this package is not installed, as on a cluster's head.
    code = (
        "import pickle, sys, types; made = pickle.load(open('policy', 'rb'))(3.0, 20.0, 240.0);"
        "run = types.SimpleNamespace(running_replicas=[], raw_metrics=None, target_num_replicas=2,"
        "capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=3, current_time=0.0,"
        "policy_state={}); assert made(run)[0] == 2; assert 'teacher_server' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, env={})


def replica(**fields) -> TeacherReplica:
    made = object.__new__(TeacherReplica)
    made._replica = SimpleNamespace(**fields) if fields else None
    made._config = ServeConfig(model="m")
    return made


@pytest.fixture(autouse=True)
def _no_destructor(monkeypatch):
    """Serve awaits it; the garbage collector would not."""
    monkeypatch.delattr(TeacherReplica, "__del__")


def run(coroutine):
    """Runs what never waits."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


def test_a_stuck_replica_is_unhealthy():
    run(replica(trouble="").check_health())
    for trouble in ("a forward is stuck", "nobody answers at 127.0.0.1:1"):
        with pytest.raises(RuntimeError, match=trouble):
            replica(trouble=trouble).check_health().send(None)


def test_a_replica_tells_serve_its_load():
    said = run(replica(load=lambda: (2.5, 0.75)).record_autoscaling_stats())
    assert said == {"queue_s": 2.5, "busy": 0.75}
    loading = run(replica().record_autoscaling_stats())
    assert loading == {"queue_s": 0.0, "busy": 0.0}


def test_metrics_of_replicas_on_one_host_take_ports_in_a_row():
    taken = {9400, 9401}

    def bind(host: str, port: int) -> int:
        if port in taken:
            raise OSError
        taken.add(port)
        return port

    made = SimpleNamespace(metrics=SimpleNamespace(serve=bind))
    assert [app._serve_metrics(made, "127.0.0.1", 9400) for _ in range(2)] == [9402, 9403]
    assert app._serve_metrics(made, "127.0.0.1", 0) == 0

"""Runs a training in several workers of Ray Train: `student-trainer train --workers N`.

Each worker does what a process of torchrun does. Ray starts them, notices when one fails, and starts
all of them again; then they resume from the newest checkpoint in the output folder, which all machines
share. Ray keeps none of its own.

Nothing of Ray is imported before something is trained here: what this module puts into the
environment for a Ray of its own is read when Ray is imported.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logitstream.connection import Connection
from logitstream.extras import install_command
from logitstream.local_ray import LocalRay, set_ray_environment
from logitstream.logs import first_line, log_to_stderr
from student_trainer.config import TrainConfig
from student_trainer.errors import (
    AccessDenied,
    FailedElsewhere,
    NotRecorded,
    NotWritten,
    ProtocolError,
    TrainingFailed,
)

logger = logging.getLogger(__name__)

FOLDER = "ray_train"
"""In the output folder, while the workers run: what Ray Train writes for itself."""
POLL_S = 0.5
"""How often the workers of a Ray of our own are looked at."""
PERMANENT = (ValueError, AccessDenied, NotRecorded, NotWritten, ProtocolError)
"""What a worker would fail with again; IncompatibleTeacher and InvalidRequest are ValueErrors."""


def run_workers(config: TrainConfig, train: Callable[[TrainConfig], str]) -> str:
    """Trains in `config.workers` processes; returns what `train` returns in the first of them.

    train: does the whole run in a process of several. Uses the Ray that this process is connected
    to, the one at `config.ray_address`, or starts one on this machine. Raises TrainingFailed, and
    what `train` raises if that would be raised again.
    """
    with _ray(config), _sigint_kept():
        import ray.train
        from ray.exceptions import RayError

        folder, here, on_gpus = config.output / FOLDER, os.getcwd(), _has_gpus(config)
        meeting = tempfile.mkdtemp(prefix="student-ranks-")
        fitting = _trainer_class()(
            lambda: _work(config, train, here),
            torch_config=_on_loopback(meeting) if _is_on_loopback() else None,
            scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=on_gpus),
            run_config=ray.train.RunConfig(
                name=secrets.token_hex(4),  # Ray's own notes of an earlier run are not read
                storage_path=str(folder.absolute()),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                callbacks=[_failure_callback(config)],
                # The first logs how it gets on.
                worker_runtime_env={"env_vars": {"TQDM_DISABLE": "1"}},
            ),
        )
        try:
            return fitting.fit().return_value
        except SystemExit:  # how Ray Train's own handler of Ctrl-C ends
            raise KeyboardInterrupt from None
        except (ray.train.TrainingFailedError, RayError) as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, PERMANENT):
                raise cause from error
            raise TrainingFailed(_reason(config, error)) from error
        finally:
            for left in (folder, meeting):
                shutil.rmtree(left, ignore_errors=True)


def _work(config: TrainConfig, train: Callable[[TrainConfig], str], here: str) -> str:
    """Runs in every worker."""
    import ray.train

    log_to_stderr(config, name="student_trainer")  # which Ray hands on
    if ray.train.get_context().get_world_rank():
        logging.getLogger("student_trainer").setLevel(logging.WARNING)
    if not os.path.isdir(here):
        raise ValueError(
            f"the machine {socket.gethostname()} has no folder {here}: start the command in one that "
            "all machines share, as they must share the output folder"
        )
    os.chdir(here)  # a worker has a folder of its own
    try:
        return train(config)
    except AccessDenied as error:
        addresses = (
            config.teacher.values() if isinstance(config.teacher, dict) else [config.teacher]
        )
        seen = [Connection.to(one, **config.credentials()) for one in addresses]
        if all(one.token is not None or one.cert is not None for one in seen):
            raise
        # It is in no setting: a worker has it from its environment.
        raise AccessDenied(
            f"the worker on {socket.gethostname()} has no token in its environment: set "
            "TEACHER_TOKEN (or what the connection file names) where `ray start` is called, on every "
            f"machine of the cluster; it is not sent to them. {error}"
        ) from error


def _reason(config: TrainConfig, error: BaseException) -> str:
    """Returns what to tell a person: the first worker's own error, rather than Ray's account."""
    said = first_line(error)
    failures = getattr(error, "worker_failures", {})
    if failures:
        rank, first = min(failures.items())
        lines = str(first).strip().splitlines() or [type(first).__name__]
        said = f"worker {rank}: {lines[-1]}"
    return (
        f"{said} (the workers failed more often than --max-failures {config.max_failures} allows; the "
        f"same command {_begins(config)})"
    )


def _begins(config: TrainConfig) -> str:
    if config.checkpoint_every:
        return "resumes from the newest checkpoint"
    return "begins again at step 0: --checkpoint-every N writes checkpoints to resume from"


def _trainer_class() -> Any:
    """Ray's TorchTrainer, without an actor that needs the dashboard, which no Ray of ours has."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            if not _is_on_loopback():
                return found
            return [one for one in found if not isinstance(one, PlacementGroupCleanerCallback)]

    return Trainer


def _failure_callback(config: TrainConfig) -> Any:
    """Ends a run at once whose workers failed with what would happen again; else says what follows."""
    from ray.train import UserCallback

    class Failure(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for rank, error in worker_exceptions.items():
                error = getattr(error, "_base_exc", error)
                if isinstance(error, FailedElsewhere):
                    (error,) = error.args
                if isinstance(error, PERMANENT):
                    raise error
                logger.warning(
                    "worker %d failed (%s): the run %s", rank, first_line(error), _begins(config)
                )

    return Failure()


@contextmanager
def _ray(config: TrainConfig) -> Iterator[None]:
    """A connection to Ray, or a Ray of our own that ends with this block."""
    address = config.ray_address
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield
            return
        if not address:
            raise ValueError(
                "Ray was imported before, and can no longer be told to stay on this machine: call "
                "ray.init() first, or give ray_address"
            )
    set_ray_environment(address, _own_ray_settings(config.workers))
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise ValueError(
            f"several workers need Ray Train: {install_command('ray-train')} ({error})"
        ) from None
    own = None
    try:
        if address:
            ray.init(address, logging_level=logging.WARNING)
        else:
            own = LocalRay.start("student-", num_cpus=config.workers)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"cannot reach Ray at {address}" if address else "no Ray"
        raise TrainingFailed(f"{where}: {first_line(error)}") from error
    try:
        yield
    finally:
        if own is None:
            ray.shutdown()
        else:
            own.stop()


def _own_ray_settings(num_workers: int) -> dict[str, str]:
    """How a Ray that is started here behaves; its processes inherit this."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    wanted = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S), "OMP_NUM_THREADS": str(threads)}
    return {
        **{name: os.environ.get(name) or value for name, value in wanted.items()},
        # One machine is not taken away with notice.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # What Ray will do anyway, and warns of until then.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _has_gpus(config: TrainConfig) -> bool:
    """Whether each worker gets a GPU. Raises ValueError if there are too few."""
    import ray

    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and not num_gpus):
        return False
    if num_gpus < config.workers:
        raise ValueError(
            f"{config.workers} workers need a GPU each, Ray has {num_gpus}: give at most --workers "
            f"{num_gpus}, or --device cpu"
        )
    return True


def _is_on_loopback() -> bool:
    """Whether this Ray is of one machine, as the one is that is started here."""
    import ray.util

    return ray.util.get_node_ip_address().startswith("127.")


def _on_loopback(folder: str) -> Any:
    """A TorchConfig whose ranks meet in a file: the store of torch would listen on all addresses."""
    from ray.train.torch import config as of_ray

    def set_environment() -> None:
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        of_ray._set_torch_distributed_env_vars()

    class Backend(of_ray._TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            worker_group.execute(set_environment)
            settings = {
                "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo",
                "init_method": f"file://{folder}/{secrets.token_hex(8)}",  # of this start alone
                "world_size": len(worker_group),
            }
            meet = of_ray._setup_torch_process_group
            ray.get(
                [
                    worker_group.execute_single_async(rank, meet, world_rank=rank, **settings)
                    for rank in range(len(worker_group))
                ]
            )

    class Config(of_ray.TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config()


@contextmanager
def _sigint_kept() -> Iterator[None]:
    """Ray Train leaves its own handler of Ctrl-C behind."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)

"""Several workers train one student: `student-trainer train --workers N`, on Ray Train.

Every worker goes through the same batches, takes its share of each (`data.share`) and has a stream of
its own, from the service or from a record. The loop is that of trainer.py; Ray starts the workers,
notices when one fails, starts all of them again and keeps the checkpoints. A position counts
whole batches, so a run may go on with another number of workers.

Nothing of Ray is imported before something is trained here: what this module puts into the
environment for a Ray of its own is read when Ray is imported.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model, save_file

from logitstream.connection import FILE_SUFFIX, PUBLIC_AUTHORITIES
from logitstream.extras import install_command
from logitstream.local_ray import LocalRay, set_ray_environment
from logitstream.logs import first_line
from student_trainer.client.remote import RemoteTeacher
from student_trainer.config import TrainConfig
from student_trainer.errors import (
    AccessDenied,
    NotRecorded,
    NotWritten,
    ProtocolError,
    TrainingFailed,
)
from student_trainer.record.recorded import Recorded
from student_trainer.training import run as runs
from student_trainer.training.corpus import Corpus
from student_trainer.training.held_out import HeldOut
from student_trainer.training.results import StudentResults
from student_trainer.training.students import make_student, save_student

if TYPE_CHECKING:
    pass
from student_trainer.ray_train.checkpoints import _mended
from student_trainer.ray_train.job import FOLDER, _Fitted, _Job
from student_trainer.ray_train.worker import _meet, _work

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""How often the workers of a Ray of our own are looked at; Ray's 2 s delay each checkpoint by 1 s."""
PERMANENT = (ValueError, AccessDenied, NotRecorded, NotWritten, ProtocolError)
"""What a worker would fail with again; IncompatibleTeacher and InvalidRequest are ValueErrors."""


def train_students(
    config: TrainConfig,
    corpus: Corpus,
    teacher: RemoteTeacher | Recorded,
    held_out: HeldOut,
) -> runs.Trained:
    """Trains the student with `config.workers` workers and saves it, and the controls if asked for.

    teacher: only says who it is; each worker opens its own. The output folder, the student, a record
    and certificates must be reachable under the same paths on all machines of a cluster. Uses the
    Ray that this process is connected to, the one at `config.ray_address`, or starts one on this
    machine. Raises TrainingFailed, ValueError, OSError.
    """
    config = _with_whole_paths(config)
    students: dict[str, StudentResults] = {}
    with _ray(config), _written(corpus, held_out, config.output / FOLDER) as texts:
        on_gpus = _has_gpus(config)

        def fit(name: str, **identity: str) -> _Fitted:
            identified = runs.identity_of(config, corpus, **identity)
            fitted = _fit(
                _Job(config, name, texts, corpus.tokenizer, identified, on_gpus, held_out.num_ids)
            )
            students[name] = fitted.results
            return fitted

        if config.control:
            fit("control")
        fingerprint = teacher.info.teacher_fingerprint
        fitted = fit("distilled", teacher_fingerprint=fingerprint)
        student = make_student(config)
        with fitted.last.as_directory() as folder:
            load_model(student, Path(folder) / "student.safetensors")
        save_student(student, corpus.tokenizer, config.output / "student")
        if config.shuffled_control:
            fit("shuffled", teacher_fingerprint=fingerprint)
    return runs.Trained(student, students, fitted.bytes_per_token)


# The driver: what runs in the process that was started.


def _fit(job: _Job) -> _Fitted:
    """Trains one student."""
    import ray.train
    from ray.exceptions import RayError

    config = job.config
    if config.start_over:
        shutil.rmtree(job.folder, ignore_errors=True)
    job = _mended(job)
    with tempfile.TemporaryDirectory(prefix="student-ranks-") as meeting, _sigint_kept():
        fitting = _trainer_class()(
            lambda: _work(job),
            torch_config=_on_loopback(meeting) if _is_on_loopback() else None,
            scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=job.on_gpus),
            run_config=ray.train.RunConfig(
                name=job.name,
                storage_path=str(job.folder.parent),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                callbacks=[_give_up_callback()],
            ),
        )
        try:
            result = fitting.fit()
        except SystemExit:  # how Ray Train's own handler of Ctrl-C ends
            raise KeyboardInterrupt from None
        except (ray.train.TrainingFailedError, RayError) as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, PERMANENT):
                raise cause from error
            raise TrainingFailed(_reason(job, error)) from error
    last = result.checkpoint
    if last is None:  # nothing was left to do, and so nothing was reported
        assert job.found is not None
        last = ray.train.Checkpoint(job.found)
    results, nbytes = result.return_value
    return _Fitted(StudentResults.model_validate(results), nbytes, last)


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Workers have working directories of their own."""
    whole: dict[str, Any] = {
        name: path.absolute()
        for name in ("student", "output", "ca", "cert", "key", "token_file")
        if (path := getattr(config, name)) is not None and str(path) != PUBLIC_AUTHORITIES
    }
    if config.record and "://" not in config.record:
        whole["record"] = str(Path(config.record).absolute())
    if config.teacher.endswith(FILE_SUFFIX):
        whole["teacher"] = str(Path(config.teacher).absolute())
    return config.model_copy(update=whole)


@contextmanager
def _written(corpus: Corpus, held_out: HeldOut, folder: Path) -> Iterator[Path]:
    """A file with the text, while the workers need it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.safetensors"
    texts = {"sequences": corpus.sequences, "held_out": corpus.held_out}
    if held_out.best_ids is not None:
        texts["best_ids"] = held_out.best_ids
    save_file({name: ids.contiguous() for name, ids in texts.items()}, path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # what Ray Train keeps is in it
            folder.rmdir()


def _reason(job: _Job, error: BaseException) -> str:
    """What to tell a person: the first worker's own error, rather than Ray's account of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    failures = getattr(error, "worker_failures", {})
    if failures:
        rank, first = min(failures.items())
        lines = str(first).strip().splitlines() or [type(first).__name__]
        lines = [f"worker {rank}: {lines[-1]}"]
    again = f"--max-failures {job.config.max_failures}"
    return (
        f"student {job.name}: {lines[0]} (the workers failed more often than {again} allows; the "
        f"same command goes on from the newest checkpoint in {job.folder})"
    )


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


def _give_up_callback() -> Any:
    """Ends a run at once whose workers failed with what would happen again."""
    from ray.train import UserCallback

    class GiveUp(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                error = getattr(error, "_base_exc", error)
                if isinstance(error, PERMANENT):
                    raise error

    return GiveUp()


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
    files = {
        name: os.environ.get(name, "") for name in ("TEACHER_CA", "TEACHER_CERT", "TEACHER_KEY")
    }
    wanted = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S), "OMP_NUM_THREADS": str(threads)}
    return {
        **{name: os.environ.get(name) or value for name, value in wanted.items()},
        **{name: os.path.abspath(value) for name, value in files.items() if os.path.isfile(value)},
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
    from ray.train.torch.config import TorchConfig, _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
            file = f"{folder}/{secrets.token_hex(8)}"  # of this start of the workers alone
            count = len(worker_group)
            ray.get(
                [
                    worker_group.execute_single_async(rank, _meet, backend, file, rank, count)
                    for rank in range(count)
                ]
            )

    class Config(TorchConfig):
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


# The workers.

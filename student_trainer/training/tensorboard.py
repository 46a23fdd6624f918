"""The curves of one run, as TensorBoard reads them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from logitstream.extras import install_command
from student_trainer.disk import writing
from student_trainer.errors import NotWritten


class Curves:
    """Scalars in a folder; points are added inside `with curves.behind(step):`.

    Without a folder nothing is written: for ranks that only help to measure.
    """

    def __init__(self, folder: Path | None) -> None:
        """Raises ValueError if tensorboard is not installed."""
        self._writer = None
        self._folder = Path() if folder is None else folder
        if folder is None:
            self._open = lambda step: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"curves need TensorBoard: {install_command('train')} ({error})"
            ) from None
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step)

    @contextmanager
    def behind(self, step: int) -> Iterator[None]:
        """A run that goes on behind `step`: what was added for later steps is not shown any more."""
        with writing(self._folder):
            self._writer = self._open(step + 1)
        try:
            yield
        except NotWritten:
            raise  # to close it would fail again, for the same reason
        except BaseException:
            self._close()
            raise
        else:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            with writing(self._folder):
                self._writer.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve, written when this returns."""
        if self._writer is None:
            return
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

"""Lets a Trainer's batches carry what only the teacher reads: which teacher it is, and what a view needs."""

from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard

from student_trainer.hf.carrying import CarryingCollator
from student_trainer.hf.trainer_base import TrainerBase
from student_trainer.teachers.layout import ROW_COLUMNS
from student_trainer.teachers.several import Teachers
from student_trainer.teachers.teacher import Teacher
from student_trainer.teachers.view import TeacherView


class ColumnHooks(TrainerBase):
    """Keeps columns of the data for the teacher; the student gets none of them."""

    teacher: Teacher | None = None
    _view: TeacherView | None = None
    _rows_of_each: dict[str, float]
    """Rows that each of several teachers had answered when they were last logged."""
    _is_carrying = False
    """Whether a loader is being made whose collator takes the columns itself."""

    def get_train_dataloader(self) -> Any:
        """Returns the Trainer's; with a teacher its batches stay on the host until they are trained."""
        collator, self._is_carrying = self.data_collator, self._carries
        try:
            if self._carries:
                self.data_collator = self._make_carrying(collator)
            loader = super().get_train_dataloader()
        finally:
            self.data_collator, self._is_carrying = collator, False
        if self.teacher is not None and isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self._is_carrying:  # the collator gets no more than without a teacher
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        if self._is_carrying:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    @property
    def _column(self) -> str | None:
        """The column of the data that names the teacher of each row."""
        return getattr(self.teacher, "column", None)

    @property
    def _carries(self) -> bool:
        """Whether the teacher reads columns that the student does not."""
        return self.teacher is not None and (self._column is not None or self._view is not None)

    @property
    def _of_teacher(self) -> tuple[str | None, ...]:
        """Keys of a batch that the student must not get."""
        return ROW_COLUMNS, self._column

    def _make_carrying(self, collator: Any) -> CarryingCollator:
        known = None
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            known = self._signature_columns
        weigh = getattr(self.teacher, "weigh", None)
        return CarryingCollator(collator, known, self._column, weigh, self._view is not None)

    def _compute_shares(self, teachers: Teachers) -> dict[str, float]:
        """Returns the share of each teacher in the rows since the last time, on all ranks."""
        total, before = teachers.rows_by_teacher, self._rows_of_each
        self._rows_of_each = total
        since = [total[name] - before[name] for name in total]
        rows = torch.tensor(since, device=self.args.device)
        if self.args.world_size > 1:
            rows = self.accelerator.gather(rows[None]).sum(0)  # type: ignore[union-attr,call-overload]
        shares = (rows / rows.sum().clamp(min=1e-9)).tolist()
        return {f"share/{name}": one for name, one in zip(total, shares, strict=True)}

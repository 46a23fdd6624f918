"""Ends a training when the held-out loss no longer falls."""

from typing import Any

import transformers


class EarlyStopping(transformers.EarlyStoppingCallback):
    """Counts on where the run that it resumes stopped counting.

    The Trainer would restore the count only together with its own state, in which a run that was
    interrupted is to stop.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        found = found[0] if isinstance(found, list) else found
        self.early_stopping_patience_counter = found.get("attributes", {}).get(
            "early_stopping_patience_counter", 0
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:  # if that shows that this step was the last, it has been logged
            control.should_log = True

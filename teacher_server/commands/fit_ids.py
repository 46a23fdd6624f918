"""`teacher-server fit-ids`: fits an id table to a corpus."""

import sys
from pathlib import Path

from teacher_server.config import FitIdsConfig
from teacher_server.errors import ModelError, TeacherServerError


def fit_ids(config: FitIdsConfig) -> int:
    """Fits an id table, writes it, and prints what it saves; returns the exit code."""
    import transformers

    from teacher_server.engine import id_table_fit as fit
    from teacher_server.engine.loading import ID_TABLE_NAME, load

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if not Path(config.model).is_dir():
            raise ModelError(f"{config.model} is not a folder; the table is written into it")
        text = config.text.read_text(encoding="utf-8", errors="replace")
        model = load(config.model, device=config.device, dtype=config.dtype)
        fitted = fit.fit_ids(model, text, max_tokens=config.max_tokens)
        path = Path(config.model) / ID_TABLE_NAME
        fit.save(fitted.table, path)
    except TeacherServerError as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"teacher-server: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(
        f"{path}: fitted on {fitted.fitted_rows} positions; {fit.SPEC} takes "
        f"{fitted.fitted_nbytes:.1f} bytes per token instead of {fitted.identity_nbytes:.1f} on "
        f"{fitted.measured_rows} others. Restart the service to use it."
    )
    return 0

"""`student-trainer report`: compares finished runs."""

import json
from pathlib import Path

from student_trainer.config import ReportConfig


def run_report(config: ReportConfig) -> int:
    """Writes the page of finished runs again and prints its findings."""
    from student_trainer.report import build as report
    from student_trainer.training.results import Results

    folders = [folder.resolve() for folder in config.runs]
    for folder in config.runs:
        if folders.count(folder.resolve()) > 1:
            raise ValueError(f"{folder} was given twice: each run counts once")
    found = report.make_report({str(folder): Results.load(folder) for folder in config.runs})
    folder = config.runs[0] if len(config.runs) == 1 else Path()
    page, beside = report.write_report(config.output or folder / "report.html", found)
    if config.as_json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(found["sentences"]))
        print(f"written: {page}, {beside}")
    return 0

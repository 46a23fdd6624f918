"""Checks that teacher and student share a format and a vocabulary."""

import logging
from typing import Any

from logit_codec import FORMAT_VERSION, tokenizer_fingerprint
from protos import teacher_pb2
from student_trainer.errors import IncompatibleTeacher

logger = logging.getLogger(__name__)


def check_compatible(info: teacher_pb2.TeacherInfo, tokenizer: Any) -> None:
    """Raises IncompatibleTeacher unless formats match and the tokenizer, if given, is the teacher's."""
    if FORMAT_VERSION not in info.format_versions:
        raise IncompatibleTeacher(
            f"the teacher writes format versions {list(info.format_versions)}, this client reads "
            f"version {FORMAT_VERSION}. Upgrade the older of the two sides."
        )
    if tokenizer is None:
        return
    ours = tokenizer_fingerprint(tokenizer)
    if not info.tokenizer_fingerprint:
        logger.warning("the teacher has no tokenizer to compare with the student's")
    elif ours != info.tokenizer_fingerprint:
        raise IncompatibleTeacher(
            "teacher and student tokenizers differ: "
            f"{info.effective_vocab_size} and {len(tokenizer.get_vocab())} entries, fingerprints "
            f"{info.tokenizer_fingerprint} and {ours}. Token-level distillation needs one "
            "vocabulary: train the student with the teacher's tokenizer."
        )

"""What the forkserver of conftest.py loads before any service is forked from it: no gRPC."""

import torch  # noqa: F401
import transformers
from transformers.models.auto import modeling_auto  # noqa: F401
from transformers.models.gemma2 import modeling_gemma2  # noqa: F401

transformers.utils.logging.disable_progress_bar()

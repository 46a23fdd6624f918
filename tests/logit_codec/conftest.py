"""One thread for the tests of this folder."""

import pytest

from tests.conftest import one_torch_thread

one_thread = pytest.fixture(scope="package", autouse=True)(one_torch_thread)

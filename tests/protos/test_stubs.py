"""The committed stubs are what `make protos` makes of the committed .proto."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path):
    recipe = (ROOT / "Makefile").read_text()
    assert re.search(
        r"grpc_tools\.protoc -I\. --python_out=\. --pyi_out=\. --grpc_python_out=\.", recipe
    )
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "protos/teacher.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    made = sorted(path.name for path in (tmp_path / "protos").iterdir())
    assert made == ["teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py"]
    for name in made:
        assert (tmp_path / "protos" / name).read_text() == (ROOT / "protos" / name).read_text()

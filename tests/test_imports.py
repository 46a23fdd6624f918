"""Who may import whom: the wings, as one table."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER, TRAINER = "teacher_server", "student_trainer"
EVERYBODY = ("protos", "logit_codec", "logitstream")

RULES: dict[str, tuple[str, ...]] = {
    "protos": (),
    "logit_codec": (),
    "logitstream": ("protos", "logit_codec"),
    "teacher_server.errors": (),
    "teacher_server.config": (),
    "teacher_server.compare_config": ("config",),
    "teacher_server.environment": (),
    "teacher_server.monitoring": (),
    "teacher_server.teams": (),
    "teacher_server.engine": (),
    "teacher_server.planning": ("engine",),
    "teacher_server.plan_config": ("planning.gpus", "config"),
    "teacher_server.scheduling": (
        *("engine.batch", "engine.continuation", "engine.key_pool", "engine.stops"),
        *("teams", "monitoring"),
    ),
    "teacher_server.admission": (
        *("engine.batch", "engine.continuation", "engine.stops"),
        *("scheduling.job", "scheduling.generation_job", "teams"),
    ),
    "teacher_server.ledger": ("teams",),
    "teacher_server.pipeline": ("scheduling", "engine", "monitoring", "ledger.accounts", "teams"),
    "teacher_server.rpc": ("pipeline", "admission", "ledger", "teams", "monitoring"),
    "teacher_server.startup": ("engine", "monitoring", "config"),
    "teacher_server.replica": (
        *("pipeline", "rpc", "admission", "scheduling", "engine", "teams", "ledger"),
        *("monitoring", "config", "startup", "ranks"),
    ),
    "teacher_server.ranks": ("engine", "config", "environment", "startup"),
    "teacher_server.cluster": ("replica", "ledger"),
    "teacher_server.app": ("cluster", "replica", "config", "environment"),
    "teacher_server.commands": ("*",),
    "teacher_server.cli": ("commands", "config", "compare_config", "plan_config"),
    "teacher_server.__main__": (),
    "student_trainer.errors": (),
    "student_trainer.aliases": (),
    "student_trainer.trainer_fields": (),
    "student_trainer.schedules": (),
    "student_trainer.loss_settings": ("schedules",),
    "student_trainer.on_policy_settings": ("loss_settings",),
    "student_trainer.config": ("aliases", "trainer_fields", "loss_settings", "on_policy_settings"),
    "student_trainer.generate_config": ("aliases",),
    "student_trainer.check_config": (),
    "student_trainer.disk": (),
    "student_trainer.transfer": (),
    "student_trainer.losses": ("transfer",),
    "student_trainer.teachers": ("transfer",),
    "student_trainer.client": ("teachers",),
    "student_trainer.record": ("teachers",),
    "student_trainer.data": ("teachers",),
    "student_trainer.on_policy": ("losses", "teachers"),
    "student_trainer.hf": ("losses", "teachers", "transfer", "schedules", "on_policy"),
    "student_trainer.hf_trainer": (
        *("hf", "losses", "teachers", "client", "transfer", "on_policy"),
    ),
    "student_trainer.training": (
        *("hf_trainer", "hf", "teachers", "losses", "data", "disk", "transfer", "on_policy"),
        *("config", "trainer_fields"),
    ),
    "student_trainer.report": ("training.results", "disk"),
    "student_trainer.ray_train": ("config",),
    "student_trainer.commands": ("*",),
    "student_trainer.cli": ("commands", "config", "generate_config", "check_config"),
    "student_trainer.__main__": (),
}
"""Of each wing, what it may import beside itself, `errors.py` of its package, and EVERYBODY."""

EXCEPTIONS: dict[str, tuple[str, ...]] = {
    # The front door, for everybody but us: public names, loaded when they are used.
    "logitstream/__init__.py": ("student_trainer", "student_trainer.hf_trainer"),
    # A teacher in the trainer's own process, loaded only when one is made.
    "student_trainer/teachers/local.py": (
        "teacher_server.engine.batch",
        "teacher_server.engine.engine",
        "teacher_server.engine.generate",
        "teacher_server.engine.loading",
        "teacher_server.engine.stops",
    ),
    "student_trainer/teachers/local_writer.py": (
        "teacher_server.engine.continuation",
        "teacher_server.engine.generate",
        "teacher_server.engine.head",
        "teacher_server.engine.key_pool",
        "teacher_server.engine.stops",
    ),
    # A reference in the checker's own process, loaded only when one is asked for.
    "student_trainer/commands/reference.py": (
        "teacher_server.engine.comparison",
        "teacher_server.engine.loading",
        "teacher_server.engine.model",
        "teacher_server.errors",
    ),
    # The modules that begin a run.
    "student_trainer/training/held_out.py": (
        "student_trainer.client.remote",
        "student_trainer.record.recorded",
    ),
    "student_trainer/training/run.py": (
        "student_trainer.client.remote",
        "student_trainer.record.recorded",
    ),
    "student_trainer/training/plan.py": (
        "student_trainer.client.remote",
        "student_trainer.record.recorded",
    ),
    # The settings say themselves in which of them two runs may differ.
    "student_trainer/report/groups.py": ("student_trainer.config",),
}
"""Of single files, what else they may import, and why."""
WITH_RAY = (
    "teacher_server/app.py",
    "teacher_server/cluster/ray_",
    "teacher_server/commands/launch",
)
LAZY_RAY = ("student_trainer/ray_train/", "logitstream/local_ray.py")

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in (*EVERYBODY, SERVER, TRAINER)
    for path in (ROOT / package).rglob("*.py")
)
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES}
OURS = {*EVERYBODY, SERVER, TRAINER, "tests", "examples", "benchmarks", "deploy"}


def imports(path: str) -> list[tuple[str, bool]]:
    """(module, whether it is loaded with the file) of every import in a file."""
    tree = ast.parse((ROOT / path).read_text())
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.append((module if module in MODULES else str(node.module), node in top))
    return found


def wing_of(module: str) -> str:
    """The entry of RULES that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] in EVERYBODY else ".".join(parts[:2])


def may_import(path: str, module: str) -> bool:
    own = wing_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    package = own.partition(".")[0]
    root = module.partition(".")[0]
    if root not in OURS or wing_of(module) == own:
        return True
    if root != package:
        return root in (RULES[own] if package in EVERYBODY else EVERYBODY)
    inside = module.partition(".")[2]
    return inside == "errors" or any(
        rule in ("*", inside) or inside.startswith(f"{rule}.") for rule in RULES[own]
    )


@pytest.mark.parametrize("path", FILES)
def test_a_wing_imports_only_what_the_table_allows(path: str):
    if path == "student_trainer/__init__.py":
        return  # the public names, loaded when they are used
    wrong = {
        module
        for module, _ in imports(path)
        if not may_import(path, module) and module not in EXCEPTIONS.get(path, ())
    }
    assert not wrong, f"{path} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES)
def test_the_front_door_is_for_others(path: str):
    assert "logitstream" not in {module for module, _ in imports(path)}, (
        f"{path} must import from the modules of logitstream, not from the front door"
    )


def test_every_wing_is_in_the_table():
    there = {wing_of(module) for module in MODULES} - {SERVER, TRAINER}
    assert there == {*RULES}


def test_no_module_reaches_itself_through_what_it_loads():
    loads = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): {
            module for module, at_top in imports(path) if at_top and module in MODULES
        }
        for path in FILES
    }
    seen: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join([*chain[chain.index(module) :], module])
        if module in seen:
            return
        for other in sorted(loads[module]):
            visit(other, (*chain, module))
        seen.add(module)

    for module in sorted(loads):
        visit(module, ())


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("logit_codec/")])
def test_the_codec_needs_torch_numpy_and_xxhash_only(path: str):
    for module, _ in imports(path):
        root = module.partition(".")[0]
        assert root in {"logit_codec", "torch", "numpy", "xxhash"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES)
def test_ray_is_imported_where_it_belongs_and_by_no_trainer_before_it_is_used(path: str):
    for module, at_top in imports(path):
        if module.partition(".")[0] == "ray":
            assert path.startswith(WITH_RAY + LAZY_RAY), f"{path} must not import {module}"
            assert path.startswith(WITH_RAY) or not at_top, f"{path} loads {module}"

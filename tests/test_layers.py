"""The layout: nine folders in one order, few files beside them, no cycles; tensor functions cost torch alone."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kd_trainer
from kd_trainer.tasks import TASKS
from kd_trainer.training.bases import UPSTREAM_ATTRIBUTES, UPSTREAM_NAMES

PACKAGE = Path(kd_trainer.__file__).parent
# A folder imports from those before it.
FOLDERS = [
    "kernels",
    "losses",
    "tasks",
    "teachers",
    "cache",
    "training",
    "diagnostics",
    "report",
    "data",
]
BELOW = {"validation", "files", "redaction"}  # beside the folders, for all of them
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
HEAVY = ("transformers", "datasets", "evaluate", "matplotlib", "accelerate", "pyarrow")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def package_imports(path: Path, parsed: ast.Module) -> set[str]:
    """The modules of the package that a file imports, dotted from the package on, inside functions too."""
    found = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.partition(".")[2] for name in names if name.partition(".")[0] == "kd_trainer"}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*path.parent.parts][: len(path.parent.parts) - node.level + 1]
                parts = [*base, *parts]
            elif parts[0] == "kd_trainer":
                parts = parts[1:]
            else:
                continue
            inside = [[*parts, alias.name] for alias in node.names]
            found |= {".".join(names if _is_module(names) else parts) for names in inside}
    return found - {""}


def _is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_the_reader_of_imports_sees_every_form():
    source = "from .reductions import x\nfrom . import tile, divergences\nimport kd_trainer.tasks.kinds\n"
    source += "from ..validation import fail\nfrom kd_trainer.report import y\nfrom kd_trainer import files\n"
    inside = "def g():\n    from ..kernels.tile_cpu import z\n    import torch\n    from os import path\n"
    assert package_imports(Path("losses/modules.py"), ast.parse(source + inside)) == {
        "losses.reductions", "losses.tile", "losses.divergences", "tasks.kinds", "validation", "report", "files",
        "kernels.tile_cpu",
    }  # fmt: skip


def test_nine_folders_and_few_files():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == set(FOLDERS)
    beside = [path for path in FILES if len(path.parts) == 1]
    assert len(beside) <= 6
    assert {path.stem for path in beside} >= BELOW
    for folder in FOLDERS:
        assert len([path for path in FILES if path.parts[0] == folder]) <= 18


def test_a_file_has_at_most_500_lines_and_a_docstring():
    for path in FILES:
        assert (PACKAGE / path).read_text(encoding="utf-8").count("\n") <= 500, path
        text = ast.get_docstring(tree(path))
        assert text, path
        assert len(text.splitlines()[0]) > 20, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_from_those_before_it(folder):
    before = {*FOLDERS[: FOLDERS.index(folder) + 1], *BELOW}
    for path in (path for path in FILES if path.parts[0] == folder):
        used = package_imports(path, tree(path))
        assert {name.partition(".")[0] for name in used} <= before, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_cycle_inside_a_folder(folder):
    graph = {}
    for path in (path for path in FILES if path.parts[0] == folder and path.stem != "__init__"):
        used = package_imports(path, tree(path))
        assert folder not in used, f"{path} imports its own folder"
        graph[f"{folder}.{path.stem}"] = {name for name in used if name.startswith(f"{folder}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError


# What varies by kind of teacher or of task is a method of the kind; what is the trainer's own, others do not touch.


@functools.cache
def code(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def names_in(node: ast.AST) -> set[str]:
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def outside(*folders: str) -> list[Path]:
    return [path for path in FILES if path.parts[0] not in folders]


def checks_the_kind_of_a_teacher(node: ast.AST) -> bool:
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
    return called in {"isinstance", "issubclass", "type"} and bool(names_in(node) & TEACHERS)


def compares_with_a_task(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    constants = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
    return bool(constants & set(TASKS))


def attributes_set(node: ast.AST) -> set[str]:
    """Of a trainer: `x.trainer.name = ...`, `trainer.name += ...`, `setattr(trainer, ...)`, `vars(trainer).update`."""
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign):
        targets = [part for target in node.targets for part in ast.walk(target)]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    elif isinstance(node, ast.Delete):
        targets = list(node.targets)
    set_here = [x for x in targets if isinstance(x, ast.Attribute) and not isinstance(x.ctx, ast.Load)]
    found = {x.attr for x in set_here if _is_trainer(x.value)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and _is_trainer(node.args[0]):
        second = node.args[1] if len(node.args) > 1 else None
        if node.func.id in {"setattr", "delattr", "unchanged_attributes"}:
            found.add(str(second.value) if isinstance(second, ast.Constant) else "?")
        elif node.func.id == "vars":
            found.add("?")
    return found


def _is_trainer(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in {"trainer", "_trainer"}


TEACHERS = {"LiveTeacher", "AdapterOffTeacher", "CachedTeacher", "Teacher"}
# Upstream's own attributes that are set for a moment and then restored.
BORROWED = {("diagnostics", "is_in_train")}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (checks_the_kind_of_a_teacher, "isinstance(self.teacher, CachedTeacher | None)"),
        (checks_the_kind_of_a_teacher, "type(x.teacher) is cache.CachedTeacher or type(LiveTeacher)"),
        (compares_with_a_task, "task.name != 'seq2seq_lm'"),
        (compares_with_a_task, "kd.kd_task in ('causal_lm', 'masked_lm')"),
        (attributes_set, "setup.trainer.teacher = x"),
        (attributes_set, "old, trainer._plan = trainer._plan, None"),
        (attributes_set, "self._trainer.count += 1"),
        (attributes_set, "setattr(trainer, name, value)"),
        (attributes_set, "del trainer.x"),
        (attributes_set, "vars(trainer).update(kept)"),
    ],
)
def test_the_reader_of_code_sees_each_form(found, line):
    assert any(found(node) for node in ast.walk(ast.parse(line)))


@pytest.mark.parametrize("line", ["isinstance(x, nn.Module)", "kept.name == 'hidden'", "trainer.x.y[:] = trainer.z"])
def test_the_reader_of_code_leaves_the_rest(line):
    nodes = list(ast.walk(ast.parse(line)))
    assert not any(f(n) for n in nodes for f in (checks_the_kind_of_a_teacher, compares_with_a_task, attributes_set))


def test_no_isinstance_on_teachers():
    for path in outside("teachers", "cache"):
        assert not [node.lineno for node in code(path) if checks_the_kind_of_a_teacher(node)], path  # type: ignore[attr-defined]


def test_no_comparison_of_a_task_by_name():
    for path in outside("tasks"):
        assert not [node.lineno for node in code(path) if compares_with_a_task(node)], path  # type: ignore[attr-defined]


def test_the_trainer_alone_sets_its_attributes():
    for path in outside("trainer.py"):
        found = {(path.parts[0], name) for node in code(path) for name in attributes_set(node)}
        assert found <= BORROWED, path


def test_of_a_trainer_only_upstreams_private_names_are_read():
    upstream = {*UPSTREAM_NAMES["transformers.Trainer"], *UPSTREAM_ATTRIBUTES}
    for path in outside("trainer.py"):
        read = [node for node in code(path) if isinstance(node, ast.Attribute) and _is_trainer(node.value)]
        assert {node.attr for node in read if node.attr.startswith("_")} <= upstream, path


def loaded_after(*statements: str) -> list[set[str]]:
    """The modules that are loaded after each of the statements, in one fresh process."""
    shown = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    text = "\n".join(["import sys", *(f"{statement}\n{shown}" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_tensor_functions_import_torch_only():
    names = "DIVERGENCES, forward_kl, SoftTargetLoss, DistillationLoss, fit_temperature, kl_gaussian, monte_carlo_kl"
    package, torch, divergence, every = loaded_after(
        "import kd_trainer; dir(kd_trainer)", "import torch", "from kd_trainer import forward_kl",
        f"from kd_trainer import {names}",
    )  # fmt: skip
    assert "kd_trainer" in package
    assert not package & {"torch", "numpy", *HEAVY}
    assert "torch" in torch
    assert divergence - torch <= sys.stdlib_module_names
    assert not every & set(HEAVY)


def test_public_names_resolve():
    assert len(set(kd_trainer.__all__)) == len(kd_trainer.__all__)
    for name in kd_trainer.__all__:
        assert getattr(kd_trainer, name) is not None
        assert name in dir(kd_trainer)
    namespace: dict = {}
    exec("from kd_trainer import *", namespace)
    assert set(kd_trainer.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kd_trainer.no_such_name


def test_no_public_name_is_a_file():
    """Importing the file would put it in the place of what has its name."""
    assert not set(kd_trainer.__all__) & set(FILES)


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(kd_trainer.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(module, name, name) for module, names in kd_trainer._HOME.items() for name in names}


def test_every_public_name_has_a_docstring():
    bare = [name for name in kd_trainer.__all__ if name != "DIVERGENCES" and not getattr(kd_trainer, name).__doc__]
    assert not bare

"""The layout: nine folders in one order, few files beside them, no cycles; tensor functions cost torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kd_trainer

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


def package_imports(path: Path, source: str) -> set[str]:
    """The modules of the package that a file imports, dotted from the package on, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
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
    source = "from .reductions import x\nfrom . import tile, divergences\nimport kd_trainer.tasks.heads\n"
    source += "from ..validation import fail\nfrom kd_trainer.report import y\nfrom kd_trainer import files\n"
    inside = "def g():\n    from ..kernels.tile_cpu import z\n    import torch\n    from os import path\n"
    assert package_imports(Path("losses/modules.py"), source + inside) == {
        "losses.reductions", "losses.tile", "losses.divergences", "tasks.heads", "validation", "report", "files",
        "kernels.tile_cpu",
    }  # fmt: skip


def test_nine_folders_and_few_files():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == set(FOLDERS)
    beside = [path for path in FILES if len(path.parts) == 1]
    assert len(beside) <= 6
    assert {path.stem for path in beside} >= BELOW
    for folder in FOLDERS:
        assert len([path for path in FILES if path.parts[0] == folder]) <= 18


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_not_too_long_and_says_what_it_is_for(path):
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert source.count("\n") <= 560
    text = ast.get_docstring(ast.parse(source))
    assert text
    assert len(text.splitlines()[0]) > 20


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_from_those_before_it(folder):
    before = {*FOLDERS[: FOLDERS.index(folder) + 1], *BELOW}
    for path in (path for path in FILES if path.parts[0] == folder):
        used = package_imports(path, (PACKAGE / path).read_text(encoding="utf-8"))
        assert {name.partition(".")[0] for name in used} <= before, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_cycle_inside_a_folder(folder):
    graph = {}
    for path in (path for path in FILES if path.parts[0] == folder and path.stem != "__init__"):
        used = package_imports(path, (PACKAGE / path).read_text(encoding="utf-8"))
        assert folder not in used, f"{path} imports its own folder"
        graph[f"{folder}.{path.stem}"] = {name for name in used if name.startswith(f"{folder}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def modules_after(statement: str) -> set[str]:
    command = [
        sys.executable,
        "-c",
        f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))",
    ]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())


def test_the_tensor_functions_need_torch_only():
    names = "DIVERGENCES, forward_kl, SoftTargetLoss, DistillationLoss, fit_temperature, kl_gaussian, monte_carlo_kl"
    loaded = modules_after(f"from kd_trainer import {names}")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_a_divergence_costs_an_import_of_torch_and_of_little_more():
    """Of other packages nothing, which holds for what any of them imports as well."""
    before, after = (modules_after(f"import torch{more}") for more in ("", "\nfrom kd_trainer import forward_kl"))
    assert {name for name in after - before if name not in sys.stdlib_module_names} == {"kd_trainer"}


def test_the_package_itself_needs_nothing():
    assert not modules_after("import kd_trainer; dir(kd_trainer)") & {"torch", "numpy", *HEAVY}


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

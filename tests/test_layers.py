"""The order of the house: a file imports only from files above it, and the tensor functions cost an import of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kd_trainer

PACKAGE = Path(kd_trainer.__file__).parent
ORDER = [
    "redaction",
    "restore",
    "checks",
    "files",
    "divergences",
    "native",
    "sparse",
    "distributions",
    "reductions",
    "model_facts",
    "losses",
    "visit_cpu",
    "visit_triton",
    "visit",
    "visit_sparse",
    "fused_arguments",
    "outputs",
    "fused_linear",
    "inputs",
    "logits",
    "packing",
    "head",
    "heads",
    "finite",
    "head_choice",
    "joint",
    "fused_forward",
    "objective",
    "router",
    "own_loss",
    "backends",
    "teacher_batch",
    "teacher_errors",
    "teacher",
    "compatibility",
    "shared_memory",
    "cache_formats",
    "training_args",
    "describe",
    "fidelity",
    "metrics",
    "data",
    "teacher_inputs",
    "loading",
    "models",
    "students",
    "interrupt",
    "runs",
    "plots",
    "report",
    "window",
    "predictions",
    "processes",
    "bases",
    "checkpoints",
    "cache_signatures",
    "cache_manifest",
    "cache_store",
    "cache",
    "cache_identity",
    "settings",
    "setup_checks",
    "first_look",
    "cache_build",
    "cache_settings",
    "offline",
    "memory",
    "findings",
    "advice",
    "batch_changes",
    "trial",
    "preflight",
    "step_loss",
    "trainer",
    "cli",
]
FILES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HEAVY = ("transformers", "datasets", "evaluate", "matplotlib", "accelerate", "pyarrow")


def house_imports(source: str) -> set[str]:
    """The files of the package that a source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] != "kd_trainer":
                continue
            inside = module if node.level else module.partition(".")[2]
            found |= {inside.partition(".")[0]} if inside else {alias.name for alias in node.names}
            found -= {"__version__"}  # a constant of the package's own
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {(p[1] if len(p) > 1 else "__init__") for p in parts if p[0] == "kd_trainer"}
    return found


def test_the_reader_of_imports_sees_every_form():
    source = "from .a import x\nfrom . import b, c\nimport kd_trainer.d\n"
    source += "from kd_trainer.e import y\nfrom kd_trainer import f\n"
    inside = "def g():\n    from .h import z\n    import torch\n    from os import path\n"
    assert house_imports(source + inside) == set("abcdefh")


def test_every_file_has_its_place():
    assert sorted(ORDER) == FILES, "a new file gets its place in ORDER"


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_files_above_it(name):
    used = house_imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    assert used <= set(ORDER[: ORDER.index(name)]), f"{name}.py stands above what it imports"


@pytest.mark.parametrize("name", ["__init__", *FILES])
def test_every_file_opens_with_what_it_is_for(name):
    text = ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
    assert text
    assert len(text.splitlines()[0]) > 20
    assert "Imports:" not in text, "what a file imports is for its code to say"


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

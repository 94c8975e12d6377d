"""What an index gets: the wheel and the sdist hold the package and nothing else, and the wheel works where the
repository is out of reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest

from tests.examples.test_examples import EXAMPLES, figures, header_of
from tests.losses.test_tile import compiler

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parent.parent
FILES = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kd_trainer").rglob("*") if p.is_file() and p.suffix != ".pyc"}
# A folder that the package does not have: whatever is moved to a new one is found there.
NEW_FILES = {f"kd_trainer/new/{name}" for name in ("__init__.py", "a.c", "a.h", "deep/__init__.py", "deep/py.typed")}
NOT_BUILT_FROM = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs")


def run(*command: object, cwd: Path) -> str:
    """What a command prints, in an environment without what makes the repository importable."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of the tree, and the wheel that is built from that sdist alone."""
    tree, folder = tmp_path_factory.mktemp("tree") / "kd", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, ignore=NOT_BUILT_FROM)
    for name in NEW_FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    run(sys.executable, "-m", "build", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment: the wheel, and from the running environment everything but kd_trainer."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (own,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).split()
    # Such a line adds a folder behind the environment's own, and reads no .pth file in it: no editable kd_trainer.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(own, "dependencies.pth").write_text("\n".join(others), encoding="utf-8")
    return python


def test_the_wheel_holds_the_package_alone(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == FILES | NEW_FILES
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [PurePosixPath(member.name) for member in archive.getmembers() if member.isfile()]
    names = {PurePosixPath(*member.parts[1:]).as_posix() for member in members}
    source = {"LICENSE", "README.md", "pyproject.toml"}
    generated = {"PKG-INFO", "setup.cfg"}
    kept = {name for name in names if ".egg-info/" not in name and not name.startswith("tests/")}
    assert kept == FILES | NEW_FILES | source | generated


def test_the_index_shows_the_readme(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    page: Message = message_from_bytes(archive.read(name))
    assert page["Requires-Python"] == ">=3.10"
    assert page["License-Expression"] == "Apache-2.0"
    assert page["Description-Content-Type"] == "text/markdown"
    assert page.get_all("Classifier")
    text = page.get_payload(decode=True).decode()
    assert text.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_example_runs_without_the_repository(python, tmp_path):
    shutil.copy(EXAMPLES / "minimal.py", tmp_path)
    code = """
import runpy, sys
runpy.run_path("minimal.py", run_name="__main__")
print(*(f"from: {module.__file__}" for name, module in sys.modules.items() if name.startswith("kd_trainer")), sep="\\n")
"""
    printed = run(python, "-c", code, cwd=tmp_path)
    pattern = r" (\d+\.\d)%"
    found = figures(printed, *(f"{name}:{pattern}" for name in ("teacher", "before", "after")))
    header = header_of("minimal.py")
    promised = figures(header, *(name + pattern for name in ("teacher", r"plain student\)", r"distilled student\)")))
    assert found == pytest.approx(promised, abs=3)  # as in tests/examples/test_examples.py
    files = [Path(line.removeprefix("from: ")) for line in printed.splitlines() if line.startswith("from: ")]
    assert len(files) > 20
    assert not [path for path in files if not path.is_relative_to(python.parent.parent)]


def test_the_command_is_installed(python, tmp_path):
    assert "report" in run(python.with_name("kd-trainer"), "--help", cwd=tmp_path)


@compiler
def test_the_c_code_compiles_from_the_wheel(python, tmp_path):
    code = """
import kd_trainer, torch
from kd_trainer.kernels.c_compiler import compiled
from kd_trainer.losses.tile import Setting, tile_loss
student, teacher = torch.randn(2, 8, 301)
given = {"student": student, "teacher": teacher, "labels": None, "weights": torch.ones(8, 2)}
setting = Setting("forward_kl", 0.5, 2.0, False)
found = [tile_loss(setting, **given, gradient=False, compiled=way).soft for way in (True, False)]
torch.testing.assert_close(*(each.float() for each in found))
print(kd_trainer.__file__, compiled.cache_info().currsize)
"""
    path, libraries = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(path).is_relative_to(python.parent.parent)
    assert libraries == "1"  # and not the computation in torch twice

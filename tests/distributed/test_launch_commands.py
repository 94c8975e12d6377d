"""The commands with a launcher in the docs, as they stand there; and what keeps processes from training apart.

Each command runs in a folder that has `examples` and `configs` beside it, on a machine without GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from kd_trainer import (
    DistillationArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)
from kd_trainer.training import arguments as training_args
from kd_trainer.training import bases
from tests.helpers import launch, tiny
from tests.helpers.script_process import run_script

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "configs" / "README.md"]
DOCS += sorted((ROOT / "examples").glob("*.py"))
MLP = "accelerate launch --config_file configs/accelerate/ddp_cpu.yaml examples/distill_mlp.py configs/distill_mlp.json"
MINIMAL = "torchrun --standalone --nproc_per_node 2 examples/minimal.py"
# One process where there is no GPU: what `python` starts too, which other tests run.
ON_GPUS = {
    "accelerate launch examples/distill_mlp.py configs/distill_mlp.json",
    "accelerate launch examples/distill_causal_lm.py configs/distill_causal_lm.json",
}
LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def commands() -> set[str]:
    """The lines of the docs that start a script of this repository with a launcher."""
    lines = [line.split("  #")[0].strip() for path in DOCS for line in path.read_text(encoding="utf-8").splitlines()]
    return {line for line in lines if re.match(r"(accelerate launch|torchrun) .*examples/\w+\.py", line)}


def test_every_command_of_the_docs_is_run():
    assert commands() == {MLP, MINIMAL, *ON_GPUS}


def started(command: str, folder: Path) -> subprocess.CompletedProcess:
    """`command` in `folder`, with the programs of this environment and without a config of the user's own."""
    folder.mkdir(exist_ok=True)
    for name in ("examples", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("ACCELERATE_USE_CPU", "RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    return subprocess.run(
        command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=280, encoding="utf-8"
    )


def lines(text: str, pattern: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


@pytest.mark.launch
def test_the_whole_job_in_two_processes_is_that_of_one(tmp_path, tmp_path_factory):
    """One process takes the batches of both; the table is printed once, each folder has one writer."""
    with launch.shared_folder(tmp_path_factory):
        two = started(MLP, tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    options = ["--per_device_train_batch_size", "64", "--distilled_epochs", "0"]
    (tmp_path / "one").mkdir()
    argv = [str(ROOT / "configs" / "distill_mlp.json"), *options]
    run_script(ROOT / "examples" / "distill_mlp.py", argv, folder=tmp_path / "one", timeout=280)
    for pattern in (r"^ Model .* Agree %", r"^== seed 42: teacher ==", r"^== seed 42: baseline ==", "beats “baseline”"):
        assert len(lines(two.stdout, pattern)) == 1, pattern
    assert len(lines(two.stdout, r"^\[kd_trainer\] loss = ")) == 2  # of two distilled students
    teachers = two.stdout.split("== seed 42: ")[1]
    assert len(lines(teachers, r"^\{'loss'")) == len(lines(teachers, r"^\{'eval_loss'")) == 20  # once an epoch
    for text in (two.stdout, two.stderr):
        assert "parallel_mode != ParallelMode.DISTRIBUTED" not in text
        assert "find_unused_parameters" not in text
    runs = {}
    for name, folder in (("two", tmp_path / "two"), ("one", tmp_path / "one")):
        out = folder / "outputs" / "distill_mlp"
        report = json.loads((out / "report" / "report.json").read_text())
        runs[name] = report["rows"]
        state = json.loads((out / "seed-42" / "teacher" / "trainer_state.json").read_text())
        assert state["global_step"] == 20 * 63  # 4,000 rows in batches of 64
    assert len(runs["two"]) == 5
    for one_row, two_row in zip(runs["one"], runs["two"][:3], strict=True):
        assert one_row["name"] == two_row["name"]
        # The last batch of an epoch, 8 of the 200 rows, is filled with repeated ones in two processes.
        found, expected = (row["mean"]["test_accuracy_percent"] for row in (two_row, one_row))
        assert found == pytest.approx(expected, abs=3), one_row["name"]


@pytest.mark.launch
def test_minimal_in_two_processes_is_that_of_one(tmp_path, tmp_path_factory):
    with launch.shared_folder(tmp_path_factory):
        two = started(MINIMAL, tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    assert "parallel_mode != ParallelMode.DISTRIBUTED" not in two.stderr
    (tmp_path / "one").mkdir()
    script = tmp_path / "one" / "twice_the_batch.py"
    text = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert text.count('"per_device_train_batch_size": 32') == 1
    script.write_text(text.replace('"per_device_train_batch_size": 32', '"per_device_train_batch_size": 64'))
    one = run_script(script, [])
    for name in ("teacher", "before", "after"):
        (found,), (expected,) = (re.findall(rf"^{name}: (\d+\.\d)%", text, re.M) for text in (two.stdout, one))
        assert float(found) == pytest.approx(float(expected), abs=2), name
    assert len(lines(two.stdout, r"^\[kd_trainer\] loss = ")) == 1


ALONE = """
import sys
from tests.helpers import tiny
from kd_trainer import DistillationTrainer
from transformers import TrainingArguments
student, teacher = tiny.models("classification")
args = TrainingArguments(sys.argv[1], report_to="none")
DistillationTrainer(model=student, args=args, teacher_model=teacher, train_dataset=tiny.rows("classification")).train()
"""


@pytest.mark.launch
def test_two_processes_that_would_train_apart_are_refused(tmp_path, tmp_path_factory):
    (tmp_path / "alone.py").write_text(ALONE)
    with launch.shared_folder(tmp_path_factory):
        run = started(f"torchrun --standalone --nproc_per_node 2 {tmp_path / 'alone.py'} {tmp_path / 'out'}", tmp_path)
    assert run.returncode != 0
    assert "`use_cpu` is False; expected true for several processes on the CPU, because WORLD_SIZE is 2" in run.stderr
    assert not (tmp_path / "out").exists()


# ---- use_cpu ----


@pytest.fixture(params=[False, True], ids=["no accelerator", "an accelerator"])
def accelerator(request, monkeypatch):
    monkeypatch.setattr(training_args, "has_accelerator", lambda: request.param)
    return request.param


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    my_option: int = 3


@dataclasses.dataclass
class OwnDistillationArguments(DistillationArguments, OwnArguments):
    pass


CLASSES = [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments, OwnDistillationArguments]


@pytest.mark.parametrize("cls", CLASSES)
def test_use_cpu_is_set_where_there_is_no_accelerator(cls, accelerator, tmp_path):
    args = cls(str(tmp_path))
    assert args.use_cpu is not accelerator
    assert cls(str(tmp_path), use_cpu=False).use_cpu is not accelerator  # without a device, it means nothing
    assert cls(str(tmp_path), use_cpu=True).use_cpu is True
    assert dataclasses.replace(args, output_dir=str(tmp_path / "other")).use_cpu is not accelerator
    config = tmp_path / "config.json"
    for given in ({}, {"use_cpu": False}):
        config.write_text(json.dumps({"output_dir": str(tmp_path), **given}))
        assert parse_args(cls, argv=[str(config)]).use_cpu is not accelerator


def test_sft_arguments_too(accelerator, tmp_path):
    trl = pytest.importorskip("trl")

    @dataclasses.dataclass
    class SFT(DistillationArguments, trl.SFTConfig):
        pass

    assert SFT(str(tmp_path), bf16=False).use_cpu is not accelerator


def test_the_distillation_settings_alone_have_no_device(accelerator):
    assert not hasattr(DistillationArguments(), "use_cpu")


@pytest.mark.parametrize("stock", [TrainingArguments, Seq2SeqTrainingArguments])
def test_upstreams_own_classes_are_left_alone(stock, accelerator, tmp_path):
    assert stock(str(tmp_path)).use_cpu is False


def test_a_device_of_another_kind_counts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    assert training_args.has_accelerator()
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    import transformers

    monkeypatch.setattr(transformers.utils, "is_torch_npu_available", lambda *a, **k: True)
    assert training_args.has_accelerator()


def build(tmp_path: Path, **arguments) -> DistillationTrainer:
    student, teacher = tiny.models("classification")
    args = TrainingArguments(str(tmp_path), report_to="none", **arguments)
    return DistillationTrainer(model=student, args=args, teacher_model=teacher)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_process_that_would_train_alone_is_refused(name, monkeypatch, tmp_path):
    for known in LAUNCHERS:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setattr(bases, "has_accelerator", lambda: False)
    args = TrainingArguments(str(tmp_path), report_to="none")  # made before: it sees one process
    student, teacher = tiny.models("classification")
    monkeypatch.setenv(name, "2")
    message = rf"`use_cpu` is False; expected true for several processes on the CPU, because {name} is 2 and the "
    with pytest.raises(ValueError, match=message + "arguments see one process.*Set use_cpu to true"):
        DistillationTrainer(model=student, args=args, teacher_model=teacher)
    monkeypatch.setattr(bases, "has_accelerator", lambda: True)
    with pytest.raises(ValueError, match=rf"`{name}` is 2; expected 1, the number .*accelerate launch or torchrun"):
        DistillationTrainer(model=student, args=args, teacher_model=teacher)
    monkeypatch.setenv(name, "1")
    DistillationTrainer(model=student, args=args, teacher_model=teacher)


def test_one_process_is_not_refused(monkeypatch, tmp_path):
    for value in ("", "1", "none"):
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", value)
        build(tmp_path)

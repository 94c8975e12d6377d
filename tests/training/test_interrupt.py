"""Ctrl-C for real: a training process gets SIGINT, leaves a checkpoint, and the resumed run ends as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kd_trainer.training.checkpoints import ResumableInterrupt
from tests.helpers import tiny

STEPS, INTERRUPTED_AT = 6, 3

# The third step waits for a line on stdin, so that nothing in the test depends on time.
SCRIPT = f"""
import sys
from tests.helpers import tiny
from transformers import TrainerCallback

class Wait(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == {INTERRUPTED_AT - 1}:
            print("waiting", flush=True)
            sys.stdin.readline()

run = tiny.trainer("plain", sys.argv[1], max_steps={STEPS}, optim="adamw_torch")
run.add_callback(Wait())
run.train()
print("unreachable", flush=True)
"""


class Training:
    """The process; reads its output line by line."""

    def __init__(self, output_dir: Path) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(output_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def wait_for(self, word: str) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if word in line:
                return
        pytest.fail(f"{word!r} never came: {''.join(self.lines)}{self.process.stderr.read()}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, line: str = "") -> tuple[str, str]:
        """(stdout, stderr) after the process has ended."""
        out, err = self.process.communicate(line, timeout=300)
        return "".join(self.lines) + out, err


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two trainings that wait in their third step: (process, folder) each. Started together: imports take long."""
    started = [(Training(folder), folder) for folder in (tmp_path_factory.mktemp("run") for _ in range(2))]
    yield started
    for training, _ in started:
        training.process.kill()


@pytest.mark.launch
def test_the_first_interrupt_leaves_a_resumable_checkpoint(processes, tmp_path, capsys):
    training, folder = processes[0]
    training.wait_for("waiting")
    training.interrupt()
    training.wait_for("stopping after this step; press Ctrl-C again to stop at once")
    out, err = training.end("\n")
    assert training.process.returncode != 0, "a run that was stopped must not look like one that has ended"
    assert "KeyboardInterrupt" in err
    assert "unreachable" not in out
    assert f"interrupted: {folder}/checkpoint-{INTERRUPTED_AT} is complete" in out
    assert "resume_from_checkpoint=True" in out
    assert [p.name for p in folder.glob("checkpoint-*")] == [f"checkpoint-{INTERRUPTED_AT}"]
    state = json.loads((folder / f"checkpoint-{INTERRUPTED_AT}" / "trainer_state.json").read_text())
    assert state["global_step"] == INTERRUPTED_AT

    resumed = tiny.trainer("plain", folder, max_steps=STEPS, optim="adamw_torch")
    resumed.train(resume_from_checkpoint=True)
    whole = tiny.trainer("plain", tmp_path, max_steps=STEPS, optim="adamw_torch")
    whole.train()
    assert resumed.state.global_step == STEPS
    assert torch.equal(tiny.weights(resumed.model), tiny.weights(whole.model))
    assert tiny.logged(resumed, "loss") == tiny.logged(whole, "loss")


@pytest.mark.launch
def test_the_second_interrupt_stops_at_once(processes):
    training, folder = processes[1]
    training.wait_for("waiting")
    training.interrupt()
    training.wait_for("stopping after this step")
    training.interrupt()
    training.process.wait(timeout=300)  # the step still waits for its line
    out, err = training.end()
    assert training.process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert "is complete" not in out
    assert not list(folder.glob("checkpoint-*"))


# ---- in this process ----


def handler():
    return signal.getsignal(signal.SIGINT)


class At:
    """Runs `action` when step `step` begins (or ends)."""

    def __new__(cls, event: str, step: int, action):
        from transformers import TrainerCallback

        def call(self, args, state, control, **kwargs):
            if state.global_step == step:
                action()

        return type("At", (TrainerCallback,), {event: call})()


def test_ctrl_c_is_given_back_after_training(tmp_path):
    before, seen = handler(), []
    run = tiny.trainer("plain", tmp_path)
    run.add_callback(At("on_step_begin", 1, lambda: seen.append(handler())))
    run.train()
    assert seen[0] != before
    assert handler() is before


def test_ctrl_c_is_given_back_after_a_training_that_failed(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    before = handler()
    run = tiny.trainer("plain", tmp_path)
    run.add_callback(At("on_step_begin", 2, fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert handler() is before


def test_a_plain_trainer_that_failed_before_does_not_chain_handlers(tmp_path):
    callback, before = ResumableInterrupt(), handler()
    args = SimpleNamespace(world_size=1, output_dir=str(tmp_path))
    state, control = SimpleNamespace(global_step=1), SimpleNamespace()
    callback.on_train_begin(args, state, control)  # this training ends with an error: on_train_end never comes
    callback.on_train_begin(args, state, control)
    callback.on_train_end(args, state, control)
    assert handler() is before


def test_with_the_stock_trainer_too(tmp_path, capsys):
    run = tiny.stock_trainer("plain", tmp_path)
    run.compute_loss = lambda model, inputs, **kwargs: model(inputs["features"]).square().mean()
    run.add_callback(ResumableInterrupt())
    run.add_callback(At("on_step_begin", 1, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert "checkpoint-2 is complete" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


def test_an_interrupt_after_the_last_step_claims_no_checkpoint(tmp_path, capsys):
    run = tiny.trainer("plain", tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    run.add_callback(At("on_evaluate", 2, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert "is complete" not in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("world_size", [2])
def test_several_processes_leave_it_to_the_launcher(world_size, tmp_path):
    before = handler()
    ResumableInterrupt().on_train_begin(SimpleNamespace(world_size=world_size), None, None)
    assert handler() is before


def test_a_thread_leaves_it_alone(tmp_path):
    before, failures = handler(), []

    def work():
        try:
            tiny.trainer("plain", tmp_path, max_steps=1).train()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert handler() is before


def test_the_trainer_adds_it_once(tmp_path):
    run = tiny.trainer("plain", tmp_path)
    assert sum(isinstance(c, ResumableInterrupt) for c in run.callback_handler.callbacks) == 1

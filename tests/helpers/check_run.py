"""Run by `accelerate launch` from test_check.py: checks in two processes; usage: check_run.py OUT ddp|fsdp2|zero3."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import backend_run, tiny


def end_of(trainer: Any) -> int:
    """What the process would end with."""
    try:
        trainer.train()
    except SystemExit as ended:
        return ended.code  # type: ignore[return-value]
    raise AssertionError("the check did not end the process")


def ddp(out: Path) -> dict[str, Any]:
    """A run without a fault, one whose second process sees a wrong label, one that trains after its check."""
    found: dict[str, Any] = {}
    wrong = tiny.rows("plain")
    wrong[4]["labels"] = 9  # with 4 rows a process the first of the second process
    plain, checked = (tiny.trainer("plain", out, per_device_train_batch_size=4) for _ in range(2))
    found["evaluated"] = checked.check()
    for trainer in (plain, checked):
        trainer.train()
    found["same_weights"] = bool((tiny.weights(plain.model) == tiny.weights(checked.model)).all())
    trainer = tiny.trainer("plain", out, data=wrong, per_device_train_batch_size=4, kd_run="check")
    found["label"] = trainer.check(evaluate=False)
    return {**found, "world_size": trainer.accelerator.num_processes, "code": end_of(trainer)}


def sharded(out: Path, backend: str) -> dict[str, Any]:
    """A language model whose student and teacher are sharded: checked before training, and by `kd_run`."""
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4}
    if backend == "fsdp2":
        backend_run.run_fsdp2_on_cpu()
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    else:
        backend_run.run_deepspeed_on_cpu()
        arguments["deepspeed"] = backend_run.zero_config(3, has_config=True)
    trainer = backend_run.build("fused", out, out / backend, **arguments)
    found: dict[str, Any] = {"early": trainer.check()}
    trainer = backend_run.build("fused", out, out / backend, kd_run="check", **arguments)
    found["code"] = end_of(trainer)
    found["wrappers"] = [c.__name__ for c in type(trainer.model_wrapped).__mro__]
    return found


def main(out: Path, backend: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = ddp(out) if backend == "ddp" else sharded(out, backend)
    (out / f"{backend}_{os.environ['RANK']}.json").write_text(json.dumps({**found, "printed": printed.getvalue()}))


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2])

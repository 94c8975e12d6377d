"""Several processes: what the main one answers for all, and a launch in which each would train alone.

For: `checkpoints.py` and `trainer.py`. Leaves sums over processes to the accelerator.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.utils import is_sagemaker_mp_enabled

from ..validation import fail
from .arguments import has_accelerator

# In which a launcher says how many processes it started, as accelerate reads them.
_LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def on_main_process(accelerator: Any, ask: Callable[[], Any]) -> Any:
    """The answer of the main process; its ValueError or RuntimeError is raised in every process."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = ask()
        except (ValueError, RuntimeError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def unwrapped(model: nn.Module, accelerator: Any) -> nn.Module:
    """A model without what processes and compilers put around it."""
    # accelerate's own search reads the metadata of installed packages first, which costs more than a small step.
    wrapped = hasattr(model, "module") or hasattr(model, "_orig_mod")
    return accelerator.unwrap_model(model) if wrapped else model


def refuse_lone_processes(args: Any) -> None:
    """Raises ValueError where a launcher started several processes and each would train the whole job alone."""
    started = {name: int(value) for name in _LAUNCHED if (value := os.environ.get(name, "")).isdigit()}
    name = max(started, key=lambda each: started[each], default="")
    if not name or started[name] < 2 or args.world_size > 1 or is_sagemaker_mp_enabled():
        return
    because = f"{name} is {started[name]} and the arguments see one process: each would train the whole job alone "
    because += "and write over the files of the others"
    if has_accelerator() and args.device.type != "mps":
        mend = f"Start the script with accelerate launch or torchrun, or unset {name}; on the CPU set use_cpu."
        fail(name, started[name], "1, the number of processes that the arguments see", mend, because=because)
    mend = "Set use_cpu to true in the arguments (those of kd_trainer have it where there is no accelerator)."
    fail("use_cpu", args.use_cpu, "true for several processes on the CPU", mend, because=because)

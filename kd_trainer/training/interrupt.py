"""Ctrl-C that loses nothing: finish the step, write a checkpoint, say how to resume.

For: any `Trainer` (`DistillationMixin` adds it by itself).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback


class ResumableInterrupt(TrainerCallback):
    """The first Ctrl-C stops after the current optimizer step with a checkpoint; the second stops at once.

    Training then ends with KeyboardInterrupt, so that the script does not go on as if it were complete. With several
    processes the interrupt is left to the launcher, which stops them at different steps: there the last regular
    checkpoint is the one to resume from.
    """

    def __init__(self) -> None:
        self._asked = False
        self._saved_at = -1
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked, self._saved_at = False, -1
        self.restore()  # an earlier training that failed has not come to its end
        if args.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self._asked:
            self.restore()
            raise KeyboardInterrupt
        self._asked = True
        print("\n[kd_trainer] stopping after this step; press Ctrl-C again to stop at once", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
        if self._asked:
            self._asked = False
            if self._saved_at == state.global_step:  # not so if it was pressed after the last step had ended
                print(
                    f"[kd_trainer] interrupted: {args.output_dir}/checkpoint-{state.global_step} is complete; go on "
                    "with trainer.train(resume_from_checkpoint=True), or --resume_from_checkpoint true where the "
                    "script has it",
                    flush=True,
                )
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Gives Ctrl-C back to whoever had it before; also for trainings that end with an error."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    @classmethod
    def restore_all(cls, callbacks: Sequence[Any]) -> None:
        """The same for those among some callbacks."""
        for callback in callbacks:
            if isinstance(callback, cls):
                callback.restore()

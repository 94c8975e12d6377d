"""NaN and inf: raised at once or noted on the device until the next log, with step, process, rows and model.

For: `trainer.py` (`kd_check_finite`). Shapes: B rows; logits are [B, C] or [B, S, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import bad_rows, is_bad
from ..tasks import Fault
from ..validation import fail


class FiniteWatch:
    """Watches the losses of a run.

    Args:
        mode: "step" checks every loss at once (on accelerators this waits for the device); "log" keeps a note on the
            device, read by `raise_noted`; "off" checks nothing.
        process: index of this process, for the message.
    """

    def __init__(self, mode: str, process: int) -> None:
        self.mode, self.process, self._of = mode, process, "logits"
        # step, then for student, teacher and batch: number of bad rows, first of them; step is -1 while all is well.
        self._note: Tensor | None = None
        self._fault: Fault | None = None  # of a batch, for the message

    def see(
        self,
        loss: Tensor,
        student: Tensor,
        teacher: Tensor | None,
        step: int,
        *,
        of: str = "logits",
        fault: Callable[[], Fault | None] = lambda: None,
    ) -> None:
        """Takes one loss with the logits behind it; in mode "step" raises RuntimeError if it is not finite.

        Args:
            of: what `student` and `teacher` are where they are no logits: "hidden states".
            fault: what the batch itself may have wrong, of one kind in every step; named before the models are.
        """
        if self.mode == "off":
            return
        self._of = of
        if self.mode == "step":
            if not math.isfinite(loss.item()):
                self._fault = fault()
                rows = [bad_rows(student), [] if teacher is None else bad_rows(teacher)]
                rows += [[] if self._fault is None else self._fault.rows.nonzero().flatten().tolist()]
                self._raise(step, rows, [len(each) for each in rows])
            return
        ok = torch.isfinite(loss.detach())
        entries = [torch.as_tensor(step, device=ok.device)]
        seen = fault()
        self._fault = seen or self._fault
        sides = [None if logits is None else is_bad(logits) for logits in (student, teacher)]
        for bad in (*sides, None if seen is None else seen.rows):
            bad = ok.new_zeros(1) if bad is None else bad
            entries += [bad.sum(), bad.int().argmax()]
        note = torch.where(ok, -1, torch.stack(entries))
        self._note = note if self._note is None else torch.where(self._note[0] >= 0, self._note, note)

    def raise_noted(self) -> None:
        """Raises RuntimeError for the first bad step noted since the start, if there was one."""
        if self._note is None:
            return
        step, *noted = self._note.tolist()
        if step >= 0:
            counts, first = noted[::2], noted[1::2]
            self._raise(step, [[row][:count] for row, count in zip(first, counts, strict=True)], counts)

    def _raise(self, step: int, rows: list[list[int]], counts: list[int]) -> None:
        named = [", ".join(map(str, known[:8])) + (", ..." if count > len(known[:8]) else "")
                 for known, count in zip(rows, counts, strict=True)]  # fmt: skip
        fault = self._fault
        if fault is not None and counts[2]:
            because = f"the loss at step {step}, process {self.process}, is not finite"
            found = f"{fault.found} in rows [{named[2]}] of the batch"
            fail(fault.argument, found, fault.expected, fault.fix, because=because, error=RuntimeError)
        sides = []
        for side, shown, count in zip(("student", "teacher"), named, counts, strict=False):
            if count:
                sides.append(f"{count} rows of the {side}'s {self._of} hold NaN or inf (rows [{shown}])")
        heads = "an output head's weights or logits are not, or " if self._of != "logits" else ""
        mass = f"all {self._of} are finite, but {heads}the teacher has mass where the student has none"
        cause = "; ".join(sides) or mass
        fail(
            "loss",
            f"not finite at step {step}, process {self.process}: {cause}",
            "finite numbers from both models",
            "Lower the learning rate or use bf16/float32; kd_check_finite sets when this is looked for.",
            error=RuntimeError,
        )

"""The table of `trainer.check()`: a row, the rows of all processes, and how they are printed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..redaction import scrub
from ..validation import Message, leave_progress_bar, warn

logger = logging.getLogger(__name__)

_WIDTH = 110  # of the table where there is no terminal
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class CheckResult(NamedTuple):
    """A row of the table.

    Args:
        status: "ok", "warning" (suspicious) or "error" (training would stop, or learn something else than meant).
        what: what was looked at.
        found: what was found.
        fix: how to fix or improve it; "" where there is nothing to do.
    """

    status: str
    what: str
    found: str
    fix: str = ""


ok, warning, error = partial(CheckResult, "ok"), partial(CheckResult, "warning"), partial(CheckResult, "error")


def refused(what: str, exception: BaseException) -> CheckResult:
    """The row of an exception: one of this package with its own fix, or any other."""
    text = exception.args[0] if exception.args else ""
    if isinstance(text, Message):
        return error(what, text.removesuffix(f" {text.fix}"), text.fix)
    clean = scrub(str(exception)) == str(exception)  # a traceback shows the text as it is
    warn(logger, "[kd_trainer] while checking %s:", what, exc_info=exception if clean else None)
    frames = traceback.extract_tb(exception.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = ": ".join([type(exception).__name__, *scrub(str(exception)).splitlines()[:1]])
    fix = "Training would stop with it too; the traceback is in the log."
    if isinstance(exception, torch.OutOfMemoryError):
        fix = "Halve per_device_train_batch_size and double gradient_accumulation_steps: the loss stays the same."
    return error(what, text + place, fix)


def print_results(results: Sequence[CheckResult], console: Console | None = None) -> None:
    """Prints the table, each fix below what was found, and the number of errors and warnings."""
    leave_progress_bar()
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("Check", "Status", "Found"):
        table.add_column(name, overflow="fold")
    for result in results:
        text = Text(result.found)
        if result.fix:
            text.append(f"\n-> {result.fix}", style="italic")
        table.add_row(result.what, Text(result.status, style=_STYLES[result.status]), text)
    console.print(table)
    counts = {status: sum(result.status == status for result in results) for status in ("error", "warning")}
    summary = ", ".join(f"{count} {status}{'' if count == 1 else 's'}" for status, count in counts.items())
    console.print(Text(f"[kd_trainer] {summary}"))


def has_errors(results: Iterable[CheckResult]) -> bool:
    """Whether any result is an error."""
    return any(result.status == "error" for result in results)


class Results:
    """The rows of this process, and what the processes have to agree on."""

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self.rows: list[CheckResult] = []
        self.memory_peak: int | None = None  # bytes, measured in the step
        self.plan: Any = None  # of the step: with full logits where the output heads do more than is known
        self._accelerator, self._device = accelerator, device

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An exception inside becomes a row, once."""
        try:
            yield
        except Exception as exception:
            row = refused(what, exception)
            if row.found not in {known.found for known in self.rows}:
                self.rows.append(row)

    def add(self, what: str, look: Callable[..., list[CheckResult]], *args: Any, **options: Any) -> None:
        """The rows that `look` returns, or the row of its exception."""
        with self.attempt(what):
            self.rows += look(*args, **options)

    def passes(self, what: str, check: Callable[[], str | None]) -> bool:
        """Whether a check raises nothing; a row holds the line that it returns."""
        passed = False
        with self.attempt(what):
            line = check()
            self.rows += [] if line is None else [ok(what, line)]
            passed = True
        return passed

    def everywhere(self, here: bool) -> bool:
        """Whether it is so on every process; one that went on alone would wait for the others for ever."""
        agreed = self._accelerator.reduce(torch.tensor(float(here), device=self._device), reduction="sum")
        return int(agreed) == self._accelerator.num_processes

    def of_all_processes(self) -> list[CheckResult]:
        """The first process's rows, and warnings and errors that only other processes have."""
        from accelerate.utils import gather_object

        first, *others = gather_object([self.rows])
        for process, rows in enumerate(others, 1):
            known = {(row.status, row.what) for row in first}
            found = (row for row in rows if row.status != "ok" and row[:2] not in known)
            first = [*first, *(row._replace(found=f"process {process}: {row.found}") for row in found)]
        return first

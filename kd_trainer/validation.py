"""Argument checks and the form of error messages.

Every message reads: `argument` is VALUE; expected WHAT[, because CONSEQUENCE]. HOW TO FIX IT.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from enum import Enum
from numbers import Real
from typing import Any, NoReturn

from .redaction import hidden, scrub


class Message(str):
    """A message in this form, and its `fix` alone."""

    fix: str = ""


def message(argument: str, shown: Any, expected: str, fix: str, *, because: str | None = None) -> Message:
    """An error message without secrets.

    Args:
        shown: the value. Text is printed as it is: a shape, a class name, `quoted(value)`; other objects by their repr.
    """
    shown, fix = hidden(shown, argument), scrub(fix)
    shown = shown if isinstance(shown, str) else repr(shown)
    reason = f", because {because}" if because else ""
    made = Message(scrub(f"`{argument}` is {shown}; expected {expected}{reason}. ") + fix)
    made.fix = fix
    return made


def quoted(value: Any) -> str:
    """The repr of a value, without its secrets."""
    return repr(hidden(value))


def fail(
    argument: str,
    shown: Any,
    expected: str,
    fix: str,
    *,
    because: str | None = None,
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raises `error` (ValueError for a value, TypeError for a type, RuntimeError for a state) with that message."""
    raise error(message(argument, shown, expected, fix, because=because))


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean `x`?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"Did you mean `{close[0]}`?" if close else ""


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`; the message lists them and names the nearest."""
    choices = choices if isinstance(choices, (dict, tuple)) else list(choices)
    if not isinstance(value, str) or value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ""
        expected = "one of " + ", ".join(map(repr, choices))
        fail(argument, quoted(value), expected, near or f"Set `{argument}` to one of these.")


def check_number(
    argument: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises unless `value` is a finite real number inside the interval (ends included unless `open_*`).

    TypeError for bool, str and other types that are no number; ValueError for NaN, infinities and values outside.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value):
        above = low is None or (value > low if open_low else value >= low)
        below = high is None or (value < high if open_high else value <= high)
        if above and below:  # first: a loss checks its temperature at every step
            return
    if low is not None and high is not None:
        expected = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    else:
        limit = "" if low is None else f" {'>' if open_low else '>='} {low:g}"
        limit = limit if high is None else f" {'<' if open_high else '<='} {high:g}"
        expected = f"a finite number{limit}"
    if isinstance(value, int) and not _is_finite(value):
        value = f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        wrong_type = f"Give `{argument}` as a number, not as {type(value).__name__}."
        fail(argument, quoted(value), expected, wrong_type, error=TypeError)
    fail(argument, value, expected, f"Set `{argument}` to a value in that range.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than every float
        return False


def check_tensor(argument: str, value: Any, expected: str = "a tensor") -> None:
    """Raises TypeError unless `value` is a torch tensor."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        shown = value if value is None else f"of type {type(value).__name__}"
        fail(argument, shown, expected, f"Pass `{argument}` as a tensor, e.g. torch.tensor(...).", error=TypeError)


def check_temperature(argument: str, value: Any) -> None:
    """Raises unless `value` is a temperature: > 0, and its square a normal number in float32."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-18 <= value <= 1e18:
        return
    check_number(argument, value, low=0, open_low=True)
    because = "its square, the factor of the soft loss, is no number of float32"
    fail(argument, f"{value:g}", "a number from 1e-18 to 1e+18", "Usual are 1 to 10.", because=because)


# ---- fields of arguments ----

_FOLDERS = ("teacher_model_name_or_path", "teacher_cache_dir")
_LIST_OR_TEXT = ("kd_feature_layers", "teacher_model_name_or_path")


def read_json_value(name: str, value: Any, example: str) -> Any:
    """The value of a field that a command line gives as text: what begins as JSON is read as JSON."""
    if not isinstance(value, str) or (name in _LIST_OR_TEXT and not value.lstrip().startswith("[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        return fail(name, quoted(value), f"a JSON value ({error})", f"Write it as '{example}'.")


def are_pairs(value: Any) -> bool:
    """Whether it is a list of pairs of whole numbers."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return len(pairs) == len(value) and all(type(layer) is int for pair in pairs for layer in pair)


def as_declared(entry: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    """The value of a field where it has the type that the field declares; raises TypeError or ValueError.

    numpy's scalars become Python's own, and a path becomes text where a folder is meant.

    Args:
        entry: the field of a dataclass; kinds: its types.
    """
    import numpy as np

    name = entry.name
    value = value.item() if isinstance(value, np.generic) else value.value if isinstance(value, Enum) else value
    if value is None and entry.default is None:
        return None
    if bool in kinds:
        if not isinstance(value, bool):
            how = "without quotes" if isinstance(value, str) else "true or false (in Python True or False)"
            fail(name, quoted(value), "true or false", f"Write {'it ' * isinstance(value, str)}{how}.", error=TypeError)
    elif float in kinds:
        if isinstance(value, Real) and not isinstance(value, (bool, int)):
            return value if isinstance(value, float) else float(value)
        if isinstance(value, bool) or not isinstance(value, int):
            check_number(name, value)
    elif int in kinds:
        if isinstance(value, bool) or not isinstance(value, int):
            fix = f"Give `{name}` as a whole number, not as {type(value).__name__}."
            fail(name, quoted(value), "a whole number, at least 1", fix, error=TypeError)
    elif name in _FOLDERS:  # other texts are choices, which `check_choice` compares
        if list in kinds:
            value = read_json_value(name, value, '["one/teacher", "another"]')
            if isinstance(value, (list, tuple)) and len(value) > 1:
                return [_as_folder(name, each) for each in value]
        return _as_folder(name, value)
    return value


def _as_folder(name: str, value: Any) -> str:
    """A path as text; raises where it is none."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    kind = "a folder" if name == "teacher_cache_dir" else "a folder or a hub name"
    if not isinstance(value, str):
        fix = f"Give `{name}` as text, not as {type(value).__name__}."
        fail(name, quoted(value), kind, fix, error=TypeError)
    if not value.strip():
        fail(name, quoted(value), kind, "Leave it out (null in JSON) for none.")
    return value


# Environment variables in which launchers write the rank of a process.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_first_process() -> bool:
    """Whether this is rank 0 of a launcher, or the only process; works before torch.distributed is set up."""
    ranks = [value for name in _RANKS if (value := os.environ.get(name, "")).isdigit()]
    return not ranks or int(ranks[0]) == 0


def leave_progress_bar() -> None:
    """Ends the line of a progress bar, so that the next output starts a new line."""
    bars = getattr(getattr(sys.modules.get("tqdm.std"), "tqdm", None), "_instances", ())
    for bar in list(bars):
        stream = getattr(bar, "fp", None)
        if stream is None or getattr(bar, "disable", True):
            continue
        if getattr(stream, "isatty", bool)():
            bar.clear()  # it is drawn again below
        else:
            stream.write("\n")
            stream.flush()


def warn(logger: logging.Logger, text: str, *values: Any, **kwargs: Any) -> None:
    """`logger.warning` in the first process only, on a new line."""
    if is_first_process():
        leave_progress_bar()
        logger.warning(text, *values, **kwargs)

"""The parser of "config.json --field value": a JSON file and a command line into argument classes."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..validation import fail, nearest, quoted
from .arguments import refuse_borrowed_names


def parse_args(*dataclass_types: Any, argv: list[str] | None = None) -> Any:
    """Reads `script.py config.json --field value ...` into dataclasses; the command line wins over the file.

    Args:
        dataclass_types: argument classes, e.g. `DistillationTrainingArguments` and a class of the script's own.
        argv: the words after the script's name; default `sys.argv[1:]`.

    Returns:
        The instance for one class; a tuple in the given order for several.

    Raises:
        FileNotFoundError: the JSON file does not exist.
        ValueError: the file is no JSON object, or a key or option belongs to none of the classes.
        TypeError: a key is `alpha` or `temperature` (see `DistillationArguments`).
    """
    for cls in dataclass_types:
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            fix = "Pass the class itself, e.g. DistillationTrainingArguments."
            fail("dataclass_types", repr(cls), "classes of arguments (dataclasses)", fix, error=TypeError)
    if argv is not None and (not isinstance(argv, (list, tuple)) or not all(isinstance(word, str) for word in argv)):
        fail("argv", quoted(argv), "a list of words", "Split the command line: shlex.split(text).", error=TypeError)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)  # a field half typed is a typing error
    known = {f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}
    from_file: dict[str, Any] = {}
    if argv and argv[0].endswith(".json"):
        from_file = _read_json(argv.pop(0))
        _check_keys(from_file, known, "key of the JSON file")
        for action in parser._actions:  # a required field that stands in the file need not be typed again
            action.required = action.required and action.dest not in from_file
    namespace, rest = parser.parse_known_args(argv, namespace=argparse.Namespace(**from_file))
    if rest:
        options = [word[2:].split("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
        _check_keys(dict.fromkeys(options, "(option)"), known, "option")
        fail("argv", quoted(rest), "options of the form --field value", "Give the JSON file first, then the options.")
    values = vars(namespace)
    parsed = [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in dataclass_types]
    return parsed[0] if len(parsed) == 1 else tuple(parsed)


def _read_json(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        fix = "Check the path; it is relative to the folder the script is started in."
        fail("config file", repr(path), "an existing JSON file", fix, error=FileNotFoundError)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        fail("config file", repr(path), f"valid JSON ({error})", "Fix the file at that line.")
    if not isinstance(content, dict):
        fail(
            "config file", repr(path), f"a JSON object, got a {type(content).__name__}", 'Write {"field": value, ...}.'
        )
    return content


def _check_keys(given: dict[str, Any], known: set[str], what: str) -> None:
    refuse_borrowed_names(given, known)
    for name, value in given.items():
        if name not in known:
            fix = nearest(name, known) or "Remove it."
            fail(name, quoted(value), f"no such {what}: none of the argument classes has that field", fix)

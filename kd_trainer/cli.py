"""The `kd-trainer` command: `kd-trainer report [NAME=]DIR...` compares the output folders of any runs.

For: the command line and its errors (one line, exit code 2). Leaves everything else to `report.py`.
Imports: the standard library; report when a command runs, so that `--help` costs no import of torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_EXAMPLE = """\
A run is the output_dir of any Trainer run. "teacher" and "baseline" have their roles; folders of one NAME are seeds of
one row, given in the same order for every name. Without NAME= the folder's own name is the name.

  kd-trainer report teacher=out/teacher baseline=out/baseline distilled=out/distilled --output out/report
  kd-trainer report out/seed*/teacher out/seed*/baseline out/seed*/distilled
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv` (default: sys.argv[1:]); returns 0, or 2 after a one-line error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        _report(arguments)
    except (OSError, ValueError, TypeError) as error:
        print(f"kd-trainer: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kd-trainer", description="Tools for distilled models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="compare teacher, distilled and baseline runs: table, report.md, report.json and plots",
        description="Compares the output folders of runs: table, report.md, report.json and plots.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]DIR", help="output folder of a run, and its name in the table"
    )
    report.add_argument("--output", default="report", metavar="DIR", help="where to write (default: %(default)s)")
    report.add_argument("--title", default="Distillation report", help="heading (default: %(default)s)")
    report.add_argument("--no-plots", action="store_true", help="write the tables only")
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from .report import build_report, load_run, print_table

    runs = [load_run(folder, name) for name, folder in map(_named, arguments.runs)]
    report = build_report(runs, arguments.output, title=arguments.title, plots=not arguments.no_plots)
    print_table(report)
    print(f"Written to {arguments.output}: {', '.join(path.name for path in report.files)}")


def _named(text: str) -> tuple[str | None, str]:
    """(name or None, folder); a folder whose own name holds a "=" is a folder."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).is_dir():
        return None, text
    if not name.strip() or not folder:
        from .checks import fail

        fail("run", text, "NAME=DIR or DIR", "Write both sides of the equals sign, for example teacher=out/teacher.")
    return name.strip(), folder


if __name__ == "__main__":
    sys.exit(main())

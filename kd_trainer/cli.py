"""The `kd-trainer` command: `report` compares the output folders of any runs, `memory` prints what a step needs.

An error is one line and exit code 2. `report/` and `diagnostics/memory.py` do the work and are imported when a command
runs: `--help` costs no import of torch.
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

_MEMORY_EXAMPLE = """\
Neither weights nor a device are needed, and nothing is trained; configs/README.md lists what is counted.

  kd-trainer memory configs/models/llama-3.2-1b.json configs/models/llama-3.1-8b.json --processes 8 \\
      --batch-size 4 --sequence-length 2048 --mixed-precision bf16 --student-dtype float32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv` (default: sys.argv[1:]); returns 0, or 2 after a one-line error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        {"report": _report, "memory": _memory}[arguments.command](arguments)
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
    memory = commands.add_parser(
        "memory",
        help="memory of a training step in each process: a table of all backends",
        description="Prints the memory of a training step of a pair in each process, in GiB, for every backend.",
        epilog=_MEMORY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = "folder, file or hub name of its config"
    memory.add_argument("student", metavar="STUDENT", help=config)
    memory.add_argument("teacher", metavar="TEACHER", help=config)
    for name, default, text in (
        ("processes", 8, "processes of ddp, fsdp2, zero2 and zero3"),
        ("batch-size", 8, "rows that a process reads at once"),
        ("sequence-length", 512, "tokens of a row"),
        ("gradient-accumulation-steps", 1, "as in the training arguments"),
        ("reduce-bucket-size", 500_000_000, "DeepSpeed's, in elements"),
    ):
        memory.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    memory.add_argument("--gradient-checkpointing", action="store_true", help="as in the training arguments")
    memory.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"), help="default: %(default)s")
    for side in ("student", "teacher"):
        text = f"of the {side}'s weights as loaded (default: as in its config)"
        memory.add_argument(f"--{side}-dtype", metavar="DTYPE", help=text)
    memory.add_argument("--teacher-bits", type=int, choices=(8, 4), help="of a teacher that bitsandbytes quantises")
    memory.add_argument(
        "--optimizer-bytes", type=float, metavar="N", help="of states for each parameter (default: AdamW's)"
    )
    memory.add_argument("--kd-loss-implementation", default="auto", choices=("auto", "fused", "full"))
    memory.add_argument("--kd-task", metavar="TASK", help="where the configs name no architecture")
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from .report import build_report, load_run, print_table

    runs = [load_run(folder, name) for name, folder in map(_named, arguments.runs)]
    report = build_report(runs, arguments.output, title=arguments.title, plots=not arguments.no_plots)
    print_table(report)
    print(f"Written to {arguments.output}: {', '.join(path.name for path in report.files)}")


def _memory(arguments: argparse.Namespace) -> None:
    from .diagnostics.memory import memory_table

    settings = {name: value for name, value in vars(arguments).items() if name != "command"}
    print(memory_table(settings.pop("student"), settings.pop("teacher"), **settings))


def _named(text: str) -> tuple[str | None, str]:
    """(name or None, folder); a folder whose own name holds a "=" is a folder."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).is_dir():
        return None, text
    if not name.strip() or not folder:
        from .validation import fail

        fix = "Write both sides of the equals sign, for example teacher=out/teacher."
        fail("run", repr(text), "NAME=DIR or DIR", fix)
    return name.strip(), folder


if __name__ == "__main__":
    sys.exit(main())

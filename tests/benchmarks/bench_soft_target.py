"""Time and memory of `SoftTargetLoss`, forward and backward, against plain log_softmax formulations:

    python tests/benchmarks/bench_soft_target.py            # the bars: forward KL on all shapes, about 5 minutes
    python tests/benchmarks/bench_soft_target.py --all      # every divergence on [2048, 32000] too

Time: both sides take turns in one process, on two threads; the figures are medians of seconds over the rounds, the
ratio 'time' is the median of the ratios of neighbours, 'best' the ratio of the fastest rounds. On a machine that others
use, read 'best': threads that wait for each other wait for the others' time slices, and the blocks wait more often.
Memory: each side runs alone in a fresh process, one forward and backward after the inputs exist; the figure is the
growth of the process's peak resident size (getrusage), so it holds everything that was allocated, whoever did it. A
warm-up on one row comes first, so that the libraries' own start is in neither. The student's gradient is in both. It
comes before time, because on Linux a new process starts with the peak of the one that started it.

Bar: forward_kl on [2048, 32000] against F.kl_div, time and memory ratios <= 1.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_trainer import DIVERGENCES, SoftTargetLoss

SHAPES = [(2048, 32_000), (256, 151_936), (32, 10)]
SIDES = ("plain", "kd_trainer")
THREADS = 2


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), batchmean: `F.kl_div` takes the second argument of the KL first."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")


def _mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    return (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()


def plain(divergence: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """What one writes by hand, without a thought for zeros."""
    log_q, log_p = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    if divergence == "forward_kl":
        return _kl(log_p, log_q)
    if divergence == "reverse_kl":
        return _kl(log_q, log_p)
    if divergence == "symmetric_kl":
        return _kl(log_p, log_q) + _kl(log_q, log_p)
    if divergence == "jsd":
        log_m = _mix(log_p, log_q, 0.5)
        return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)
    if divergence == "skew_forward_kl":
        return _kl(log_p, _mix(log_p, log_q, 0.1))
    if divergence == "skew_reverse_kl":
        return _kl(log_q, _mix(log_q, log_p, 0.1))
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum() / len(log_p)


def step(side: str, divergence: str, shape: tuple[int, int]) -> Callable[[], float]:
    """A function that runs forward and backward once and returns the loss."""
    generator = torch.Generator().manual_seed(0)
    student = torch.empty(shape).normal_(0, 3, generator=generator).requires_grad_()
    teacher = torch.empty(shape).normal_(0, 3, generator=generator)
    module = SoftTargetLoss(divergence=divergence)

    def run() -> float:
        student.grad = None
        loss = module(student, teacher) if side == "kd_trainer" else plain(divergence, student, teacher)
        loss.backward()
        return loss.item()

    return run


def is_large(shape: tuple[int, int]) -> bool:
    """Smaller ones are below what a clock shows in one step, and below what a process's size shows at all."""
    return shape[0] * shape[1] > 10**6


def measure_time(divergence: str, shape: tuple[int, int], rounds: int) -> tuple[dict[str, float], float, float]:
    runs = {side: step(side, divergence, shape) for side in SIDES}
    values = [run() for run in runs.values()]  # warm-up, and both must say the same
    assert abs(values[0] - values[1]) <= 1e-4 * abs(values[0]) + 1e-5, (divergence, shape, values)
    repeats = 1 if is_large(shape) else 500
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES if turn % 2 else reversed(SIDES):
            start = time.perf_counter()
            for _ in range(repeats):
                runs[side]()
            seconds[side].append((time.perf_counter() - start) / repeats)
    ratio = statistics.median(own / other for own, other in zip(seconds["kd_trainer"], seconds["plain"], strict=True))
    return (
        {side: statistics.median(seconds[side]) for side in SIDES},
        ratio,
        min(seconds["kd_trainer"]) / min(seconds["plain"]),
    )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory_here(side: str, divergence: str, shape: tuple[int, int]) -> int:
    step(side, divergence, (1, 5000))()
    run = step(side, divergence, shape)
    before = peak_bytes()
    run()
    return peak_bytes() - before


def measure_memory(side: str, divergence: str, shape: tuple[int, int]) -> int:
    command = [sys.executable, __file__, "--memory-of", side, divergence, str(shape[0]), str(shape[1])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--all", action="store_true", help="every divergence, not forward_kl alone")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.memory_of:
        side, divergence, rows, classes = options.memory_of
        print(measure_memory_here(side, divergence, (int(rows), int(classes))))
        return
    cases = [("forward_kl", shape) for shape in SHAPES]
    if options.all:
        cases += [(name, SHAPES[0]) for name in DIVERGENCES if name != "forward_kl"]
    memory = {case: {side: measure_memory(side, *case) for side in SIDES} for case in cases if is_large(case[1])}
    print(f"torch {torch.__version__}, {THREADS} threads, {options.rounds} rounds")
    header = f"{'divergence':16} {'shape':>15} {'plain':>11} {'kd_trainer':>11} {'time':>6} {'best':>6}"
    print(f"{header} {'plain':>9} {'kd_trainer':>10} {'memory':>6}")
    for divergence, shape in cases:
        seconds, time_ratio, best_ratio = measure_time(divergence, shape, options.rounds)
        line = f"{divergence:16} {list(shape)!s:>15}"
        line += f" {1e3 * seconds['plain']:8.3f} ms {1e3 * seconds['kd_trainer']:8.3f} ms "
        line += f"{time_ratio:6.2f} {best_ratio:6.2f}"
        if is_large(shape):
            other, own = (memory[divergence, shape][side] for side in SIDES)
            line += f" {other / 2**20:6.0f} MB {own / 2**20:7.0f} MB {own / other:6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()

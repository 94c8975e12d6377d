"""Time and memory of the fused head and loss, forward and backward, against everything else that computes it:

    python tests/benchmarks/bench_fused.py        # forward KL + hard loss, float32, [512, 576/960, 49152]
    python tests/benchmarks/bench_fused.py --shape 1024,576,960,49152 --dtype float32 bfloat16 \\
        --divergence forward_kl reverse_kl jsd --masked 0 0.6       # --no_hard: the soft loss alone

floor      the four matrix products alone (both logits, gradient of the hidden states, gradient of the weight) of all
           rows, in the dtype at hand, into buffers that exist already; 'counted rows': of those that have a label
kd_trainer `fused_linear_distillation`, compiled and eager, and its plain twin
naive      full logits, log_softmax in float32, F.kl_div, F.cross_entropy
peers      those of TRL, Liger and torchtune that can be imported; the others are named with the reason

First every path is checked: relative error of its value and of its gradients (Euclidean norm) against float64 on the
same inputs; those of kd_trainer must pass, a peer that computes something else is marked `*`. Then, once the machine
is quiet, all paths take turns in random order; 'x floor' is the ratio of the medians over the rounds and, in
brackets, of the lower quartiles, since other work on the machine only adds time. Last, each path runs alone in a fresh
process: 'extra MB' is the growth of the process's peak resident size (Linux: reset after a warm-up, which compiles) in
one forward and backward, less the gradients; on a GPU the allocator's own peak. Nothing here fails on a time.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_trainer import DIVERGENCES, fused_linear_distillation, fused_linear_distillation_plain
from kd_trainer.losses import fused_linear

T, ALPHA = 2.0, 0.7
SHAPES = {
    "cpu": ["512,576,960,49152"],
    "cuda": ["8192,896,4096,151936", "8192,2048,4096,128256"],
}
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # how the peers name them
EVERY = tuple(DIVERGENCES)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative; above it a row is marked


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    student_size: int
    teacher_size: int
    vocabulary: int
    dtype: str
    divergence: str
    hard: bool
    masked: float

    def __str__(self) -> str:
        shape = f"[{self.rows}, {self.student_size}/{self.teacher_size}, {self.vocabulary}]"
        loss = self.divergence + (" + hard loss" if self.hard else "")
        return f"{shape} {self.dtype}, {loss}, {self.masked:.0%} masked"


class Inputs(NamedTuple):
    hidden: Tensor  # [N, Hs], requires a gradient
    weight: Tensor  # [V, Hs], requires a gradient
    teacher_hidden: Tensor  # [N, Ht]
    teacher_weight: Tensor  # [V, Ht]
    labels: Tensor  # [N], -100 where masked


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(getattr(torch, case.dtype))

    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=device)
    labels[torch.randperm(case.rows, generator=generator, device=device)[: round(case.masked * case.rows)]] = -100
    return Inputs(
        normal(case.rows, case.student_size).requires_grad_(),
        normal(case.vocabulary, case.student_size, scale=0.02).requires_grad_(),
        normal(case.rows, case.teacher_size),
        normal(case.vocabulary, case.teacher_size, scale=0.02),
        labels,
    )


# ---- the paths: (case, inputs) -> the loss, a scalar: ALPHA * T² * mean soft + (1 - ALPHA) * mean hard --------------


def kd_trainer_loss(case: Case, x: Inputs, *, function: Callable = fused_linear_distillation, **options) -> Tensor:
    labels, mask = (x.labels, None) if case.hard else (None, x.labels != -100)
    return function(
        *x[:4], labels, alpha=ALPHA if case.hard else 1.0, temperature=T, divergence=case.divergence, soft_mask=mask,
        **options,
    ).total  # fmt: skip


def weigh(case: Case, soft: Tensor, hard: Callable[[], Tensor]) -> Tensor:
    return ALPHA * T**2 * soft + (1 - ALPHA) * hard() if case.hard else T**2 * soft


def student_and_teacher_logits(x: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_weight.T
    return x.hidden @ x.weight.T, teacher_logits


def naive(case: Case, x: Inputs) -> Tensor:
    logits, teacher_logits = student_and_teacher_logits(x)
    log_q = F.log_softmax(logits.float() / T, -1)
    if case.divergence == "forward_kl":
        pairs = [(log_q, F.softmax(teacher_logits.float() / T, -1))]
    else:
        log_p = F.log_softmax(teacher_logits.float() / T, -1)
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log() if case.divergence == "jsd" else log_p
        pairs = [(log_m, log_q)] if case.divergence == "reverse_kl" else [(log_m, log_p), (log_m, log_q)]
    log_target = case.divergence != "forward_kl"
    if case.masked:
        terms = [F.kl_div(a, b, reduction="none", log_target=log_target).sum(-1) for a, b in pairs]
        soft = sum(terms)[x.labels != -100].mean()
    else:
        soft = sum(F.kl_div(a, b, reduction="batchmean", log_target=log_target) for a, b in pairs)
    return weigh(case, soft / len(pairs), lambda: F.cross_entropy(logits.float(), x.labels))


def trl_full(case: Case, x: Inputs) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    logits, teacher_logits = student_and_teacher_logits(x)
    beta, rows = BETA[case.divergence], (logits[None], teacher_logits[None], x.labels[None])
    soft = GKDTrainer.generalized_jsd_loss(*rows, beta=beta, temperature=T)
    return weigh(case, soft, lambda: F.cross_entropy(logits.float(), x.labels))


def trl_chunked(case: Case, x: Inputs, *, hard: bool = True) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    counted = x.labels != -100
    hidden, teacher_hidden, labels = x.hidden, x.teacher_hidden, x.labels
    compact = hidden.device.type == "cuda"  # as its trainer does; on a CPU it projects the masked rows too
    if compact:
        hidden, teacher_hidden, labels = hidden[counted], teacher_hidden[counted], labels[counted]
    head, teacher_head = (hidden, x.weight, None), (teacher_hidden, x.teacher_weight, None)
    values, _ = ChunkedDivergenceFunction.apply(*head, *teacher_head, BETA[case.divergence], T)

    def mean(values: Tensor) -> Tensor:
        return (values if compact else values.masked_fill(~counted, 0.0)).sum() / counted.sum()

    def hard_loss() -> Tensor:
        return -mean(ChunkedLogProbFunction.apply(*head, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())[0])

    return weigh(case if hard else dataclasses.replace(case, hard=False), mean(values), hard_loss)


def liger_chunked(case: Case, x: Inputs, *, compiled: bool, rows: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA if case.hard else 0.0, weight_soft_loss=T**2 * (ALPHA if case.hard else 1.0),
        beta=BETA[case.divergence], temperature=T, compiled=compiled, chunk_size=rows,
    )  # fmt: skip
    return loss(*x)


def liger_triton(case: Case, x: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    return T**2 * LigerFusedLinearJSDFunction.apply(*x, BETA[case.divergence], -100, T)


def liger_triton_kl(case: Case, x: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

    p = F.softmax(x.teacher_hidden @ x.teacher_weight.T / T, -1)
    return T**2 * LigerFusedLinearKLDivFunction.apply(x.hidden, x.weight, p, x.labels, "batchmean", -100, T)


def torchtune_chunked(case: Case, x: Inputs) -> Tensor:
    from torchtune.modules import loss

    chunks = [hidden @ x.weight.T for hidden in x.hidden[None].chunk(8, dim=1)]
    with torch.no_grad():
        teacher_chunks = [hidden @ x.teacher_weight.T / T for hidden in x.teacher_hidden[None].chunk(8, dim=1)]
    forward = case.divergence == "forward_kl"
    soft = loss.ForwardKLWithChunkedOutputLoss() if forward else loss.ReverseKLWithChunkedOutputLoss()
    labels = x.labels[None]
    soft_loss = soft([logits / T for logits in chunks], teacher_chunks, labels)
    return weigh(case, soft_loss, lambda: loss.CEWithChunkedOutputLoss()(chunks, labels))


@dataclasses.dataclass(frozen=True)
class Candidate:
    loss: Callable[[Case, Inputs], Tensor]
    package: str = ""  # what has to be importable
    note: str = ""  # where it computes something else, or is helped
    divergences: tuple[str, ...] = tuple(BETA)  # others than these three: this package alone, beside forward KL
    device: str = ""  # where it runs; '': everywhere
    soft_only: bool = False


LIGER = "no T² of its own: given in its weight_soft_loss; log_softmax in the dtype of the logits"
CANDIDATES = {
    "kd_trainer, compiled": Candidate(functools.partial(kd_trainer_loss, compiled=True), divergences=EVERY),
    "kd_trainer, eager": Candidate(functools.partial(kd_trainer_loss, compiled=False), divergences=EVERY),
    "kd_trainer, plain twin": Candidate(
        functools.partial(kd_trainer_loss, function=fused_linear_distillation_plain), divergences=EVERY
    ),
    "kd_trainer, forward KL": Candidate(
        lambda case, x: kd_trainer_loss(dataclasses.replace(case, divergence="forward_kl"), x),
        divergences=tuple(name for name in EVERY if name not in BETA),
    ),
    "naive": Candidate(naive),
    "trl, full logits": Candidate(
        trl_full, "trl.experimental.gkd", "no T², no hard loss: added here; softmax in the dtype of the logits"
    ),
    "trl, chunked": Candidate(
        trl_chunked, "trl.kernels.chunked_divergence", "no T², no hard loss: added here with its own chunked log-prob"
    ),
    "trl, chunked, soft only": Candidate(
        functools.partial(trl_chunked, hard=False), "trl.kernels.chunked_divergence", "less work: no hard loss, no T²"
    ),
    "liger, compiled": Candidate(
        functools.partial(liger_chunked, compiled=True, rows=1024), "liger_kernel.chunked_loss", LIGER
    ),
    "liger, compiled, 256": Candidate(
        functools.partial(liger_chunked, compiled=True, rows=256), "liger_kernel.chunked_loss", LIGER
    ),
    "liger, eager": Candidate(
        functools.partial(liger_chunked, compiled=False, rows=1024), "liger_kernel.chunked_loss", LIGER
    ),
    "liger, triton jsd": Candidate(
        liger_triton, "liger_kernel.ops.fused_linear_jsd", "no T²: added here; no hard loss", device="cuda",
        soft_only=True,
    ),
    "liger, triton kl": Candidate(
        liger_triton_kl, "liger_kernel.ops.fused_linear_kl_div", "as above; takes the teacher's probabilities in full",
        ("forward_kl",), "cuda", soft_only=True,
    ),
    "torchtune, chunked": Candidate(
        torchtune_chunked, "torchtune.modules.loss",
        "no temperature, no T²: given here; its forward KL is the cross-entropy (another value, the same gradient)",
        ("forward_kl", "reverse_kl"),
    ),
}  # fmt: skip


def usable(candidate: Candidate, device: str) -> str:
    """'' or why not."""
    if candidate.device not in ("", device):
        return f"needs {candidate.device}"
    try:
        if candidate.package:
            importlib.import_module(candidate.package)
    except Exception as error:  # a peer may fail in any way
        return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return ""


# ---- floor, check, time, memory -------------------------------------------------------------------------------------


def floor(x: Inputs) -> Callable[[], None]:
    hidden, weight = x.hidden.detach(), x.weight.detach()
    logits, teacher_logits = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(x.teacher_hidden, x.teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return products


def forward_backward(candidate: Candidate, case: Case, x: Inputs) -> Tensor:
    loss = candidate.loss(case, x)
    loss.backward()
    return loss.detach()


def soft_terms(divergence: str, log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """The definitions, elementwise."""
    if divergence not in BETA:
        entry = DIVERGENCES[divergence]
        return entry.evaluate(log_p, log_q, entry.check(None), labels)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return p * (log_p - log_q)
    if divergence == "reverse_kl":
        return q * (log_q - log_p)
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)) / 2


def in_float64(case: Case, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two gradients, 64 rows at a time."""
    weight, teacher_weight = x.weight.detach().double().requires_grad_(), x.teacher_weight.double()
    counted = x.labels != -100
    value = torch.zeros((), dtype=torch.float64, device=x.hidden.device)
    grad_hidden = torch.zeros_like(x.hidden, dtype=torch.float64)
    for rows in torch.arange(case.rows, device=x.hidden.device)[counted].split(64):
        hidden = x.hidden.detach()[rows].double().requires_grad_()
        logits = hidden @ weight.T
        entry = DIVERGENCES[case.divergence]
        t, z_t = entry.temperature(T), x.teacher_hidden[rows].double() @ teacher_weight.T
        log_p, log_q = entry.arguments(z_t / t), entry.arguments(logits / t)
        soft = soft_terms(case.divergence, log_p, log_q, x.labels[rows]).sum() * (t / T) ** 2
        hard = functools.partial(F.cross_entropy, logits, x.labels[rows], reduction="sum")
        part = weigh(case, soft, hard) / counted.sum()
        part.backward()
        value += part.detach()
        grad_hidden[rows] = hidden.grad
    return value, grad_hidden, weight.grad


def check(case: Case, x: Inputs, names: list[str]) -> dict[str, tuple[float, float]]:
    """Per path the relative error of the value and the larger one of the two gradients; compiles as it goes."""
    expected = in_float64(case, x)
    errors = {}
    for name in names:
        if name == "kd_trainer, forward KL" and case.divergence != "forward_kl":
            continue
        x.hidden.grad = x.weight.grad = None
        found = (forward_backward(CANDIDATES[name], case, x), x.hidden.grad, x.weight.grad)
        value, *gradients = (((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
        errors[name] = value, max(gradients)
        if name.startswith("kd_trainer"):
            assert max(errors[name]) < TOLERANCE[case.dtype], (str(case), name, errors[name])
    return errors


def wait_until_quiet(max_load: float, patience: float = 600.0) -> None:
    """Other work takes cores and cache from some paths more than from others; the load is the average of a minute."""
    start = time.monotonic()
    while os.getloadavg()[0] >= max_load:
        if time.monotonic() - start > patience:
            print(f"the load is still {os.getloadavg()[0]:.2f} after {patience:.0f} s: read the ratios with care")
            return
        time.sleep(2)


Runs = dict[str, Callable[[], object]]


def take_turns(runs: Runs, before: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in random order within a round; `before` is called outside the clock."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name in random.sample(list(runs), k=len(runs)):
            before()
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_time(case: Case, x: Inputs, names: list[str], rounds: int) -> dict[str, list[float]]:
    runs: Runs = {"floor": floor(x)}
    if case.masked:
        counted = x.labels != -100
        rows = x._replace(hidden=x.hidden[counted], teacher_hidden=x.teacher_hidden[counted])
        runs["floor, counted rows"] = floor(rows)
    for name in names:
        runs[name] = functools.partial(forward_backward, CANDIDATES[name], case, x)

    def forget_gradients() -> None:
        x.hidden.grad = x.weight.grad = None

    return take_turns(runs, forget_gradients, rounds)


def resident_peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure_memory_here(case: Case, name: str, device: str) -> int:
    """Bytes beyond inputs and gradients, after one warm-up."""
    x = make_inputs(case, device)
    forward_backward(CANDIDATES[name], case, x)
    gradients = sum(t.grad.nbytes for t in (x.hidden, x.weight))
    x.hidden.grad = x.weight.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated
    else:
        fused_linear._KEPT.__dict__.clear()  # kept between the steps: counted as if they were new
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what the warm-up has freed would not count again
        if give_back is not None:
            give_back(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        peak = resident_peak
    before = peak()
    forward_backward(CANDIDATES[name], case, x)
    return peak() - before - gradients


def measure_memory(case: Case, name: str) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "--memory_of", name, json.dumps(dataclasses.asdict(case))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"{int(output.splitlines()[-1]) / 1e6:.0f}"


def report(case: Case, device: str, names: list[str], options: argparse.Namespace) -> None:
    names = [
        name
        for name in names
        if case.divergence in CANDIDATES[name].divergences
        and not (case.hard and CANDIDATES[name].soft_only)
        and not (not case.hard and name == "trl, chunked, soft only")
    ]
    x = make_inputs(case, device)
    errors = check(case, x, names)
    wait_until_quiet(options.max_load)
    load = os.getloadavg()[0]
    seconds = measure_time(case, x, names, options.rounds)
    del x
    memory = {} if options.no_memory else {name: measure_memory(case, name) for name in names}
    middle = {name: (statistics.median(s), statistics.quantiles(s, n=4)[0]) for name, s in seconds.items()}
    product_time = f"floor {middle['floor'][0] * 1e3:.0f} ms, {options.rounds} rounds, load {load:.2f} before"
    print(f"\n{case}; {product_time}")
    print(f"{'path':25}{'x floor':>15}{'x naive':>9}{'extra MB':>10}{'value err':>11}{'grad err':>11}")
    for name, (median, quartile) in middle.items():
        ratio = f"{median / middle['floor'][0]:.2f} ({quartile / middle['floor'][1]:.2f})"
        to_naive = f"{median / middle['naive'][0]:.2f}" if "naive" in middle else ""
        line = f"{name:25}{ratio:>15}{to_naive:>9}{memory.get(name, ''):>10}"
        if name in errors:
            line += "".join(f"{e:>10.0e}{' ' if e < TOLERANCE[case.dtype] else '*'}" for e in errors[name])
        print(line.rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = ["bfloat16"] if device == "cuda" else ["float32"]
    parser.add_argument("--shape", nargs="+", default=SHAPES[device], metavar="N,Hs,Ht,V")
    parser.add_argument("--dtype", nargs="+", default=dtype, choices=list(TOLERANCE))
    parser.add_argument("--divergence", nargs="+", default=["forward_kl"], choices=EVERY)
    parser.add_argument("--masked", nargs="+", type=float, default=[0.0], help="shares of rows without a label")
    parser.add_argument("--no_hard", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--path", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="PATH")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max_load", type=float, default=0.5)
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(measure_memory_here(Case(**json.loads(options.memory_of[1])), options.memory_of[0], device))
        return
    reasons = {name: usable(CANDIDATES[name], device) for name in options.path}
    names = [name for name, reason in reasons.items() if not reason]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; T {T:g}, soft weight {ALPHA if not options.no_hard else 1:g}")
    for name, reason in reasons.items():
        if reason or CANDIDATES[name].note:
            print(f"  {name}: {reason or CANDIDATES[name].note}")
    print(f"  *: an error above {TOLERANCE}")
    for shape, dtype, divergence, masked in itertools.product(
        options.shape, options.dtype, options.divergence, options.masked
    ):
        sizes = [int(size) for size in shape.split(",")]
        report(Case(*sizes, dtype, divergence, not options.no_hard, masked), device, names, options)
        torch.compiler.reset()  # else a path with many recompilations behind it falls back to eager in silence


if __name__ == "__main__":
    main()

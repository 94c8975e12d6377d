"""Time of a whole training step of a Llama-like pair, as ratios within one run:

    python tests/benchmarks/bench_step.py

floor      both bodies (the student's forward and backward, the teacher's forward), the four matrix products of the
           heads, and AdamW over all of the student's parameters: everything but a loss
fused      the same with `fused_linear_distillation` on the bodies' last hidden states, compiled and eager
full       the same with the logits of both models in full: `SoftTargetLoss` and F.cross_entropy
naive      the same with log_softmax and F.kl_div by hand

The student has 4 layers of width 256, the teacher 8 of width 512, the vocabulary 32000 tokens. The variants take turns
in random order once the machine is quiet; ratios are those of the medians over the rounds and, in brackets, of the
lower quartiles, since other work on the machine only adds time. Every variant starts from the same student, and the
losses of their first three steps are compared first. Bar: fused, compiled / floor <= 1.10.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_fused import take_turns, wait_until_quiet
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd_trainer import SoftTargetLoss, fused_linear_distillation

T, ALPHA, VOCABULARY = 2.0, 0.7, 32_000


def llama(layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=width, intermediate_size=width * 11 // 4,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, use_cache=False,
        )
    )  # fmt: skip


Head = tuple[Tensor, Tensor, Tensor, Tensor]  # student's hidden states [N, Hs] and head, the teacher's
Loss = Callable[[Head, Tensor], Tensor]  # and labels [N], -100 at the end of each row -> a scalar


def fused(head: Head, labels: Tensor, *, compiled: bool) -> Tensor:
    return fused_linear_distillation(*head, labels, alpha=ALPHA, temperature=T, compiled=compiled).total


def full(head: Head, labels: Tensor) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight = head
    logits = hidden @ weight.T
    soft = SoftTargetLoss(temperature=T, reduction="tokenmean")(logits, teacher_hidden @ teacher_weight.T, labels)
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(logits, labels)


def naive(head: Head, labels: Tensor) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight = head
    logits, counted = hidden @ weight.T, labels != -100
    p = F.softmax(teacher_hidden @ teacher_weight.T / T, -1)
    soft = F.kl_div(F.log_softmax(logits / T, -1), p, reduction="none").sum(-1)[counted].mean()
    return ALPHA * T**2 * soft + (1 - ALPHA) * F.cross_entropy(logits, labels)


class Step:
    """One training step of its own student on one batch of random tokens."""

    def __init__(self, loss: Loss | None, teacher: LlamaForCausalLM, ids: Tensor) -> None:
        self.student, self.teacher, self.loss, self.ids = llama(4, 256), teacher, loss, ids
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.labels = F.pad(ids[:, 1:], (0, 1), value=-100).reshape(-1)
        if loss is None:
            self.logits, self.teacher_logits = (torch.empty(ids.numel(), VOCABULARY) for _ in range(2))
            self.student.lm_head.weight.grad = torch.zeros_like(self.student.lm_head.weight)

    def __call__(self) -> float:
        hidden = self.student.model(input_ids=self.ids).last_hidden_state.flatten(0, 1)
        with torch.no_grad():
            teacher_hidden = self.teacher.model(input_ids=self.ids).last_hidden_state.flatten(0, 1)
        head = (hidden, self.student.lm_head.weight, teacher_hidden, self.teacher.lm_head.weight)
        value = 0.0
        if self.loss is None:
            hidden.backward(self.four_products(*(t.detach() for t in head)))
        else:
            loss = self.loss(head, self.labels)
            loss.backward()
            value = loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.loss is not None)  # the floor keeps the buffer of its head's gradient
        return value

    def four_products(self, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        torch.mm(hidden, weight.T, out=self.logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=self.teacher_logits)
        torch.mm(self.logits.T, hidden, out=self.student.lm_head.weight.grad)
        return self.logits @ weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max_load", type=float, default=0.5)
    options = parser.parse_args()
    teacher = llama(8, 512).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (options.batch, options.length))
    losses: dict[str, Loss | None] = {
        "floor": None,
        "fused, compiled": lambda head, labels: fused(head, labels, compiled=True),
        "fused, eager": lambda head, labels: fused(head, labels, compiled=False),
        "full": full,
        "naive": naive,
    }
    steps: dict[str, Callable[[], object]] = {name: Step(loss, teacher, ids) for name, loss in losses.items()}
    values = torch.tensor([[steps[name]() for _ in range(3)] for name in list(losses)[1:]])
    torch.testing.assert_close(values, values[-1:].expand_as(values), rtol=1e-5, atol=0)
    wait_until_quiet(options.max_load)
    load = os.getloadavg()[0]
    seconds = take_turns(steps, lambda: None, options.rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch} x {options.length}")
    print(f"{options.rounds} rounds, load {load:.2f} before; loss of the third step {values[0, -1]:.4f}")
    print(f"{'variant':20}{'ms a step':>11}{'x floor':>15}{'x naive':>15}")
    middle = {name: (statistics.median(s), statistics.quantiles(s, n=4)[0]) for name, s in seconds.items()}
    for name, (median, quartile) in middle.items():
        ratios = [f"{median / middle[to][0]:.2f} ({quartile / middle[to][1]:.2f})" for to in ("floor", "naive")]
        print(f"{name:20}{median * 1e3:11.0f}{ratios[0]:>15}{ratios[1]:>15}")


if __name__ == "__main__":
    main()

"""Time and memory of the relation of the last layers:

    python tests/benchmarks/bench_features.py

step    forward and backward of a student (BERT, 6 layers of width 768) and forward of its teacher (12 layers), batch 16
        of 128 tokens, with the logits' loss alone; with the relation of the last layers (48 heads); CPU seconds, the
        variants take turns. Bar: 1.10x.
memory  the growth of the process (resident memory) in one relation, and in one attention term, forward and backward, at
        16 rows of 512 tokens, width 768. Bar: 300 MB.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from kd_trainer.losses.features import Attention, attention, relation
from kd_trainer.tasks.capture import capture

ROUNDS, ROWS, LENGTH, WIDTH, HEADS = 5, 16, 128, 768, 48


def bert(layers: int) -> BertForSequenceClassification:
    torch.manual_seed(layers)
    return BertForSequenceClassification(BertConfig(vocab_size=30522, num_hidden_layers=layers, num_labels=8))


def step(student: nn.Module, teacher: nn.Module, ids: torch.Tensor, *, related: bool) -> None:
    mask = torch.ones_like(ids)
    with torch.no_grad(), capture(teacher, [11] if related else []) as teacher_side:
        target = teacher(input_ids=ids, attention_mask=mask).logits.softmax(-1)
    with capture(student, [5] if related else []) as captured:
        logits = student(input_ids=ids, attention_mask=mask).logits
    loss = nn.functional.cross_entropy(logits, target)
    if related:
        loss = (
            loss
            + relation(captured.attention(5), teacher_side.attention(11), mask.bool(), heads=HEADS).sum() / ids.numel()
        )
    student.zero_grad()
    loss.backward()


def time_of_step() -> None:
    student, teacher = bert(6).train(), bert(12).eval()
    ids = torch.randint(1, 30522, (ROWS, LENGTH))
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(ROUNDS + 1):
        for related in times:
            start = time.process_time()
            step(student, teacher, ids, related=related)
            if turn:
                times[related].append(time.process_time() - start)
    plain, with_relation = (statistics.median(times[related]) for related in times)
    print(f"step: {plain:.2f} s, with relation {with_relation:.2f} s: {with_relation / plain:.3f}x")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory(name: str) -> None:
    sides = [[torch.randn(ROWS, 4 * LENGTH, 12, WIDTH // 12).transpose(1, 2) for _ in range(3)] for _ in range(2)]
    student, teacher = Attention(*(x.requires_grad_() for x in sides[0])), Attention(*sides[1])
    mask, running, peak = torch.ones(ROWS, 4 * LENGTH, dtype=torch.bool), True, [0]

    def watch() -> None:
        while running:
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.002)

    before, thread = resident_bytes(), threading.Thread(target=watch)
    thread.start()
    value = relation(student, teacher, mask, heads=HEADS) if name == "relation" else attention(student, teacher, mask)
    value.sum().backward()
    running = False
    thread.join()
    print(
        f"memory of {name}: {(peak[0] - before) / 1e6:.0f} MB, of which gradients {3 * sides[0][0].nbytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    memory("relation")
    memory("attention")
    time_of_step()

"""Quantisation-aware distillation: a student with 2-bit weights learns from its own full-precision self.

    python examples/quantization.py             # about 75 seconds on one CPU core

A language of 16 symbols: behind each pair one of four may follow. The teacher has learned it from 4,000 rows. The
student has its weights, of 4 levels: not trained, or after 300 steps on 100 rows. Nats per symbol on held-out text, 3
seeds, at least 1.12: full precision 1.20 ± 0.01, not trained 1.46 ± 0.03, fine-tuned 2.37 ± 0.06, distilled 1.23 ± 0.01
"""

import copy
import statistics

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments

SYMBOLS, LENGTH, BITS = 16, 32, 2
allowed = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0)).topk(4).indices


class FakeQuantized(nn.Module):
    """A weight [out, in] rounded to 2^bits levels a row; the gradient passes straight through within the range."""

    def forward(self, weight):
        low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
        scale = (weight.detach().abs().amax(1) / -low).clamp(min=1e-8)
        return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale).int(), 0, low, high)


def quantized(model):
    student = copy.deepcopy(model)
    for layer in student.model.layers.modules():
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", FakeQuantized())
    return student


def text(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(SYMBOLS, (rows, LENGTH), generator=draw)
    choice = torch.multinomial(torch.tensor([[0.6, 0.2, 0.15, 0.05]]), rows * LENGTH, True, generator=draw)
    for i, chosen in zip(range(2, LENGTH), choice.view(LENGTH, rows), strict=False):
        ids[:, i] = allowed[ids[:, i - 2], ids[:, i - 1], chosen]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, rows, held_out, steps, seed, teacher=None, rate=3e-3):
    settings = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": rate, "seed": seed}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    args = TrainingArguments("outputs/quantization", **settings)
    settings |= {"kd_alpha": 1.0, "kd_temperature": 1.0, "kd_reduction": "tokenmean"}
    if teacher is not None:
        kd_args = DistillationTrainingArguments("outputs/quantization", **settings)
        DistillationTrainer(model, kd_args, teacher_model=teacher, train_dataset=rows).train()
    elif steps:
        Trainer(model, args, train_dataset=rows).train()
    return Trainer(model, args, eval_dataset=held_out).evaluate()["eval_loss"]


def main(seeds=3, steps=300, teacher_steps=500, few=100):
    found = {name: [] for name in ("full precision", "not trained", "fine-tuned", "distilled")}
    for seed in range(seeds):
        rows, held_out = text(4000, seed), text(256, 100 + seed)
        set_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
        teacher = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=SYMBOLS, max_position_embeddings=LENGTH))
        found["full precision"].append(train(teacher, rows, held_out, teacher_steps, seed))
        for name, count, own in (("not trained", 0, None), ("fine-tuned", steps, None), ("distilled", steps, teacher)):
            found[name].append(train(quantized(teacher), rows[:few], held_out, count, seed + 100, own, 1e-3))
    for name, losses in found.items():
        print(f"    {name:15} {statistics.mean(losses):.2f} ± {statistics.stdev(losses) if seeds > 1 else 0:.2f}")


if __name__ == "__main__":
    main()

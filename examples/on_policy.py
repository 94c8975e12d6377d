"""On-policy distillation: the student writes the text that both models then score, beside the same on given text.

    python examples/on_policy.py                # about 90 seconds on one CPU core

A language of 16 symbols: behind each pair one of four may follow. The teacher has learned it. A small student has 450
steps on given text (forward KL), then 150 more: on given text again, or on its own with reverse KL. Measured on what it
writes behind 256 new prompts: KL(student || teacher) per symbol, and how many symbols may follow. Expected, 3 seeds:
    before       KL 0.60 ± 0.06 nats, 74.24 ± 1.63 % may follow
    given text   KL 0.31 ± 0.07 nats, 84.86 ± 2.22 % may follow
    own text     KL 0.20 ± 0.01 nats, 93.16 ± 0.47 % may follow
"""

import copy
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments, reverse_kl

SYMBOLS, PROMPT, LENGTH = 16, 4, 32
OWN = {"kd_divergence": "reverse_kl", "kd_student_fraction": 1.0, "kd_max_new_tokens": LENGTH - PROMPT}
allowed = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0)).topk(4).indices


def text(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(SYMBOLS, (rows, LENGTH), generator=draw)
    choice = torch.multinomial(torch.tensor([[0.6, 0.2, 0.15, 0.05]]), rows * LENGTH, True, generator=draw)
    for i, chosen in zip(range(2, LENGTH), choice.view(LENGTH, rows), strict=False):
        ids[:, i] = allowed[ids[:, i - 2], ids[:, i - 1], chosen]
    labels = ids.where(torch.arange(LENGTH) >= PROMPT, -100)  # a completion begins at the first label
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def model(width):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"vocab_size": SYMBOLS, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0))


def train(student, rows, steps, seed, teacher=None, **options):
    settings = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "seed": seed}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    if teacher is None:
        return Trainer(student, TrainingArguments("outputs/on_policy", **settings), train_dataset=rows).train()
    options |= {"kd_alpha": 1.0, "kd_temperature": 1.0, "kd_reduction": "tokenmean"}
    args = DistillationTrainingArguments("outputs/on_policy", **settings, **options)
    return DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows).train()


@torch.no_grad()
def measured(student, teacher, prompts):
    set_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH - PROMPT, "pad_token_id": 0}
    own = student.cpu().eval().generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    q, p = (each.cpu().eval()(own).logits[:, PROMPT - 1 : -1] for each in (student, teacher))
    follow = allowed[own[:, PROMPT - 2 : -2], own[:, PROMPT - 1 : -1]] == own[:, PROMPT:, None]
    return reverse_kl(q, p).mean().item(), 100 * follow.any(-1).float().mean().item()


def main(seeds=3, steps=150, teacher_steps=500):
    found = {"before": [], "given text": [], "own text": []}
    for seed in range(seeds):
        rows, prompts = text(4000, seed), torch.stack([row["input_ids"][:PROMPT] for row in text(256, 100 + seed)])
        set_seed(seed)
        train(teacher := model(64), rows, teacher_steps, seed)
        train(student := model(16), rows, 3 * steps, seed, teacher)
        found["before"].append(measured(student, teacher, prompts))
        for name, options in (("given text", {}), ("own text", OWN)):
            train(further := copy.deepcopy(student), rows, steps, seed + 100, teacher, **options)
            found[name].append(measured(further, teacher, prompts))
    for name, values in found.items():
        kl, share = (f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" for v in zip(*values, strict=True))
        print(f"    {name:12} KL {kl} nats, {share} % may follow")


if __name__ == "__main__":
    main()

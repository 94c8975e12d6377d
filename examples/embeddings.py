"""Embeddings: a student with a third of the layers of a sentence encoder, over 3 seeds.

    python examples/embeddings.py        # about 110 seconds on one CPU core; with a path or hub name: that teacher

The teacher is a folder as sentence-transformers writes it: 6 layers, mean pooling, trained here so that the two halves
of a docstring are alike. The student has 2 of its layers and sees 4,800 texts. Spearman correlation between its cosine
similarities of all pairs of 500 held-out texts and the teacher's; the student is used with mean pooling. Expected:

    untrained                   0.9587 ± 0.0000
    trained with mean pooling   0.9903 ± 0.0002
    trained with cls pooling    0.5940 ± 0.0124
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from lm_text import local_texts, train_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, DataCollatorWithPadding, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments, student_from_teacher

FOLDER, BATCH, CUT = Path("outputs/embeddings"), 48, {"truncation": True, "max_length": 32}
KINDS = (("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling"))
MODULES = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(KINDS)]
texts = {part: [text for text in found if len(text) > 60] for part, found in local_texts().items()}


def make_teacher(steps):
    set_seed(42)
    tokenizer, train = train_tokenizer(texts["train"], 2000), texts["train"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        words = [train[i].split()[:48] for i in torch.randint(len(train), (BATCH,))]
        halves = [" ".join(each[start::2]) for start in (0, 1) for each in words]
        batch = tokenizer(halves, padding=True, return_tensors="pt", **CUT)
        mask = batch["attention_mask"].unsqueeze(-1)
        one, other = F.normalize((model(**batch)[0] * mask).sum(1) / mask.sum(1), dim=-1).chunk(2)
        F.cross_entropy(one @ other.T / 0.05, torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    (FOLDER / "1_Pooling").mkdir(exist_ok=True)
    (FOLDER / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}')
    (FOLDER / "modules.json").write_text(json.dumps(MODULES))
    return str(FOLDER)


def main(seeds=3, teacher_steps=400, steps=150):
    teacher = sys.argv[1] if len(sys.argv) > 1 else make_teacher(teacher_steps)
    tokenizer, found = AutoTokenizer.from_pretrained(teacher), {}
    both = (Dataset.from_dict({"text": texts[part][:rows]}) for part, rows in (("train", 4800), ("validation", 500)))
    train, held_out = (each.map(lambda rows: tokenizer(rows["text"], **CUT), batched=True) for each in both)
    data = {"train_dataset": train, "eval_dataset": held_out, "data_collator": DataCollatorWithPadding(tokenizer)}
    for seed in range(42, 42 + seeds):
        for pooling in ("mean", "cls"):
            settings = {"max_steps": steps, "seed": seed, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
            args = DistillationTrainingArguments(FOLDER / "student", save_strategy="no", kd_pooling=pooling, **settings)
            student = student_from_teacher(teacher, layers="every_3")
            trainer = DistillationTrainer(student, args, teacher_model=teacher, **data)
            for name in ("untrained", f"trained with {pooling} pooling"):
                if name != "untrained":
                    trainer.train()
                args.kd_pooling = "mean"  # as its folder says, whatever it was trained with
                found.setdefault(name, []).append(trainer.evaluate()["eval_teacher_spearman"])
                args.kd_pooling = pooling
    for name, values in found.items():
        print(f"{name:<27} {statistics.mean(values):.4f} ± {statistics.stdev(values) if seeds > 1 else 0:.4f}")


if __name__ == "__main__":
    main()

"""A language model learns from a teacher with another tokenizer, beside one without a teacher, over 3 seeds.

    python examples/cross_tokenizer.py     # about 3 minutes on one CPU core

The start of docstrings of Python's standard library. The teacher has 1,000 tokens and has seen 6,000 texts; the
students have 500 other tokens and see 300 of these texts. Perplexities of different tokens cannot be compared: figures
are bits per byte of 500 held-out texts. With tau 1 the gain is within the spread; a large tau gains some. Expected:
    teacher         2.47 ± 0.02 bits per byte
    no teacher      3.11 ± 0.02 bits per byte
    chunks, tau 1   3.10 ± 0.01 bits per byte
    chunks, tau 100 3.03 ± 0.02 bits per byte
"""

import math
import random
import statistics

from datasets import Dataset
from lm_text import END, local_texts, train_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments, TeacherCollator, align_teacher_tokens

STUDENTS = {
    "no teacher": {"kd_alpha": 0.0},
    "chunks, tau 1": {"kd_alpha": 0.5},
    "chunks, tau 100": {"kd_alpha": 0.99, "kd_chunk_temperature": 100.0},
}


def tokenizer_of(texts, size):
    """Byte-level BPE with the end token in front of a text too: then its first token is predicted."""
    tokenizer, template = train_tokenizer(texts, size), f"{END} $A {END}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, None, [(END, tokenizer.eos_token_id)])
    return tokenizer


def train(tokenizer, width, layers, data, held_out, seed, steps, teacher=None, teacher_tokenizer=None, **kd):
    """A trained model, and its bits for each byte of the held-out texts."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, hidden_size=width,
        intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
    )  # fmt: skip
    args = DistillationTrainingArguments(
        "outputs/cross_tokenizer", max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=50,
        learning_rate=4e-3, seed=seed, logging_strategy="no", save_strategy="no", kd_reduction="tokenmean",
        kd_cross_tokenizer="chunks", **kd,
    )  # fmt: skip
    collator = TeacherCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), teacher_tokenizer)
    model, given = LlamaForCausalLM(config), {"train_dataset": data, "eval_dataset": held_out}
    trainer = DistillationTrainer(model, args, teacher_model=teacher, data_collator=collator, **given)
    trainer.train()
    bits = math.log2(trainer.evaluate()["eval_perplexity"]) * sum(len(row) - 1 for row in held_out["input_ids"])
    return model, bits / sum(len(text.encode()) for text in held_out["text"])


def main(seeds=3, teacher_steps=300, steps=250):
    splits = {name: sorted({text[:100] for text in texts}) for name, texts in local_texts().items()}
    texts = random.Random(0).sample(splits["train"], 6000)
    held_out = Dataset.from_dict({"text": random.Random(0).sample(splits["validation"], 500)})
    found = {name: [] for name in ("teacher", *STUDENTS)}
    for seed in range(seeds):
        few = random.Random(seed).sample(texts, 300)
        tokenizer, teacher_tokenizer = tokenizer_of(few, 500), tokenizer_of(texts, 1000)
        own = [Dataset.from_dict({"text": x, **teacher_tokenizer(x)}) for x in (texts, list(held_out["text"]))]
        teacher, bits = train(teacher_tokenizer, 96, 2, *own, seed, teacher_steps, kd_alpha=0.0)
        found["teacher"].append(bits)
        both, few = {"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer}, Dataset.from_dict({"text": few})
        data = [align_teacher_tokens(x, "text", **both) for x in (few, held_out)]
        for name, kd in STUDENTS.items():
            found[name].append(train(tokenizer, 48, 1, *data, seed, steps, teacher, teacher_tokenizer, **kd)[1])
    for name, bits in found.items():
        print(f"{name:15} {statistics.mean(bits):.2f} ± {statistics.stdev(bits):.2f} bits per byte")


if __name__ == "__main__":
    main()

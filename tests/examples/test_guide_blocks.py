"""The guide's blocks for images, speech, LoRA and chats: each runs as it stands, on tiny models in `path/of/...`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import (
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlavaProcessor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from tests.helpers import tiny, tiny_generative

pytestmark = pytest.mark.trains
PAGE = Path(__file__).resolve().parents[2] / "examples" / "README.md"
TEXTS = [f"a {('red dog', 'old cat', 'big bird')[i % 3]} sat {'near the tree ' * (i % 4)}in {i}" for i in range(16)]
IMAGE, EOS = tiny_generative.IMAGE, 1
ROWS = 2048  # of the embeddings: from here on the loss is computed inside the output heads

# In place of a block's own: SGD without clipping, rows in order, no files.
TEST = {
    "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "bf16": False,
    "max_steps": 2, "logging_steps": 1, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8,
    "save_strategy": "no",
}  # fmt: skip


def blocks() -> dict[str, str]:
    """The blocks of the section by the first word of their `output_dir`."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Images, speech, LoRA, chats\n")[1].split("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    return {re.search(r'"outputs/(\w+)"', text)[1]: text for text in found}  # type: ignore[index]


def run(name: str, folder: Path, edit: Callable[[str], str] = str, **settings: Any) -> Any:
    """The trainer of a block that was run in `folder`, after `edit` and with other training arguments."""
    text = edit(blocks()[name])
    for key in settings:
        text = re.sub(rf",\s+{key}=[^,)\n]+", "", text)
    text, count = re.subn(r'"outputs/\w+"', r"\g<0>, use_cpu=True, **SETTINGS", text)
    assert count == 1
    main = ModuleType("guide_block")  # a checkpoint holds the arguments, whose class is looked up in its module
    given = main.__dict__
    given["SETTINGS"] = settings
    before = Path.cwd()
    sys.modules["guide_block"] = main
    os.chdir(folder)
    torch.manual_seed(0)  # fresh adapters are drawn
    try:
        exec(compile(text, f"{PAGE}: {name}", "exec"), given)
    finally:
        os.chdir(before)
    return given["trainer"]


def stock(text: str) -> str:
    """The block without distillation."""
    text = re.sub(r"Distillation(Mixin|Arguments), ", "", text)
    text = re.sub(r", teacher_model=[^)]+|,? kd_\w+=[^,)\n]+", "", text)
    used = "Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments"
    imports = f"from transformers import {used}\nfrom kd_trainer import student_from_teacher"
    return re.sub("from kd_trainer import .*", imports, text).replace("Distillation", "")


# ---- models and data ----


def tokenizer() -> Any:
    special = ["<pad>", "</s>", "<s>", "<vision>", "</vision>", "<image>"]
    made = tiny.byte_level_tokenizer(
        TEXTS, 300, special, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert made.convert_tokens_to_ids("<image>") == IMAGE
    return made


def save(folder: Path, build: Callable[[int], Any], processor: Any, data: Dataset) -> None:
    torch.manual_seed(0)
    for name, hidden in (("student", 16), ("teacher", 24)):
        build(hidden).save_pretrained(folder / "path" / "of" / name)
        processor.save_pretrained(folder / "path" / "of" / name)
    data.save_to_disk(str(folder / "path" / "of" / "data"))


def images(kind: str, folder: Path) -> None:
    size = {"height": 8, "width": 8}
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer(), **settings)
    draw = np.random.default_rng(0)
    pictures = [Picture.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in TEXTS]
    features = Features({"image": Image(), "text": Value("string")})
    texts = ["<vision><image></vision>" + text for text in TEXTS]

    def build(hidden: int) -> Any:
        model = tiny_generative.llava(hidden)
        model.resize_token_embeddings(ROWS, mean_resizing=False)
        return model

    save(folder, build, processor, Dataset.from_dict({"image": pictures, "text": texts}, features=features))


def speech(kind: str, folder: Path) -> None:
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    bytes_of = json.loads(tiny.byte_level_tokenizer(TEXTS, 300, special).backend_tokenizer.to_str())["model"]
    words = WhisperTokenizer(bytes_of["vocab"], [tuple(m) for m in bytes_of["merges"]], pad_token="<|endoftext|>")
    reader = WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400)

    def build(hidden: int) -> Any:
        config = tiny_generative.whisper(hidden).config
        config.update({"vocab_size": ROWS, "max_source_positions": 50, "encoder_layers": 2, "decoder_layers": 4})
        config.update({"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1})
        return WhisperForConditionalGeneration(config)

    draw = np.random.default_rng(0)
    sounds = [draw.standard_normal(draw.integers(4000, 9000)).astype(np.float32) for _ in TEXTS]
    audio = [{"array": sound, "sampling_rate": 16000} for sound in sounds]
    save(folder, build, WhisperProcessor(reader, words), Dataset.from_dict({"audio": audio, "text": TEXTS}))


def texts(kind: str, folder: Path) -> None:
    def build(hidden: int) -> Any:
        sizes = {"vocab_size": ROWS, "max_position_embeddings": 128, "attn_implementation": "eager"}
        return LlamaForCausalLM(tiny.llama_config(hidden, eos_token_id=EOS, bos_token_id=None, **sizes))

    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS]
    column = {"messages": chats} if kind == "chats" else {"text": TEXTS}
    save(folder, build, tokenizer(), Dataset.from_dict(column))


PREPARE: dict[str, Callable[[str, Path], None]] = {
    "images": images, "speech": speech, "lora": texts, "chats": texts,
}  # fmt: skip


@pytest.fixture(scope="module", params=PREPARE)
def prepared(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    """(name of a block, folder with its models and data)."""
    folder = tmp_path_factory.mktemp(request.param)
    PREPARE[request.param](request.param, folder)
    return request.param, folder


# ---- what the blocks do ----


def test_every_block_that_needs_models_is_run_here():
    assert set(blocks()) == set(PREPARE)
    pages = [PAGE, PAGE.parents[1] / "README.md", PAGE.parents[1] / "configs" / "README.md"]
    found = [text for page in pages for text in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert len([text for text in found if '"path/of/' in text]) == len(blocks())
    assert all(text.count("\n") < 33 for text in blocks().values())


def test_a_block_runs_as_it_stands(prepared, capsys):
    name, folder = prepared
    trainer = run(name, folder)
    assert trainer.state.global_step > 0
    shown = capsys.readouterr().out
    assert "loss = 0.7 * soft(forward_kl, T=1) + 0.3 * hard, per token" in shown
    assert "no logits are held" in shown
    metrics = trainer.evaluate(trainer.train_dataset)
    mixture = 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixture, rel=1e-5)
    (checkpoint,) = (folder / "outputs" / name).glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").exists() == (name == "lora")
    assert (checkpoint / "model.safetensors").exists() == (name != "lora")


SPLITS = {"1 x 8": {}, "4 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}}


def test_a_block_does_not_depend_on_the_split(prepared):
    name, folder = prepared
    more = {"max_length": 48} if name == "chats" else {}  # more rows than one
    found = [run(name, folder, **{**TEST, **more, **split}) for split in SPLITS.values()]
    for key in ("loss", "soft_loss", "hard_loss"):
        first, second = (tiny.logged(trainer, key) for trainer in found)
        assert len(first) == 2
        assert first == pytest.approx(second, rel=1e-5), key
    first, second = (tiny.weights(trainer.model) for trainer in found)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_a_block_with_alpha_zero_is_the_stock_trainer(prepared):
    name, folder = prepared
    more = {"max_length": 48} if name == "chats" else {}
    found, expected = run(name, folder, **TEST, **more, kd_alpha=0.0), run(name, folder, stock, **TEST, **more)
    assert "kd_trainer" not in {cls.__module__.partition(".")[0] for cls in type(expected).__mro__}
    assert tiny.logged(found, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-5)
    torch.testing.assert_close(tiny.weights(found.model), tiny.weights(expected.model), rtol=1e-5, atol=1e-6)


def test_image_tokens_and_padding_have_no_label(tmp_path):
    images("images", tmp_path)
    batch = next(iter(run("images", tmp_path, **{**TEST, "max_steps": 1}).get_train_dataloader()))
    counted = batch["labels"] != -100
    assert (batch["labels"][counted] == batch["input_ids"][counted]).all()
    assert torch.equal(~counted, (batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0))
    assert (batch["input_ids"] == IMAGE).sum() == 4 * 8  # four places an image


def test_only_what_an_assistant_writes_has_labels(tmp_path):
    texts("chats", tmp_path)
    trainer = run("chats", tmp_path, **{**TEST, "max_steps": 1})
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    written = trainer.processing_class.decode(labels[labels != -100]).split("</s>")
    assert {text.strip() for text in written} == {*(text[::-1] for text in TEXTS), ""}


def test_a_smaller_encoder_compares_its_layers(tmp_path):
    speech("speech", tmp_path)

    def smaller(text: str) -> str:
        changed = text.replace('layers="every_1"', 'layers="every_2"').replace("student.freeze_encoder()\n", "")
        assert len(changed) < len(text)
        return changed

    trainer = run("speech", tmp_path, smaller, **TEST, kd_features={"hidden_mse": 0.1})
    hidden, parts = tiny.logged(trainer, "hidden_mse_loss"), tiny.logs(trainer)
    for loss, soft, hard, between in zip(
        *(parts[key] for key in ("loss", "soft_loss", "hard_loss")), hidden, strict=True
    ):
        assert loss == pytest.approx(0.7 * soft + 0.3 * hard + 0.1 * between, rel=1e-5)
        assert between > 0.01


def test_a_lora_student_learns_from_its_own_base(tmp_path):
    texts("lora", tmp_path)
    trainer = run("lora", tmp_path, lambda text: text.replace('"path/of/teacher"', '"adapter_off"'), **TEST)
    first, second = tiny.logged(trainer, "soft_loss")
    assert first == pytest.approx(0, abs=1e-6)  # fresh adapters change nothing
    assert second > first

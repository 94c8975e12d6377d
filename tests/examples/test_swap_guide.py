"""The guide to Hugging Face's own scripts: its diffs, applied to reproductions of the scripts, make them distil."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from PIL import Image as Picture
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from tests.helpers import tiny
from tests.helpers.script_process import run_script
from tests.helpers.tiny_generative import wav2vec2_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "scripts"
BESIDE = {"run_qa.py": ["trainer_qa.py"]}  # what a script imports from its own folder
PAGE = "run_image_distillation.py"  # a page of the documentation: no arguments, so no JSON
SCRIPT_NAMES = sorted(path.name for path in SCRIPTS.glob("run_*.py") if path.name != PAGE)
SPLITS = {"train": 16, "validation": 8, "test": 8}


# ---- the blocks of the guide ----


def guide() -> str:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    return text.split("\n## Hugging Face's own scripts\n")[1].split("\n## ")[0]


def named(text: str) -> set[str]:
    """The scripts that a piece of the guide names; the page of the documentation has no file name."""
    return set(re.findall(r"`(\w+\.py)`", text)) or {PAGE}


def blocks(language: str) -> list[tuple[set[str], str]]:
    """Each block with the scripts that the paragraph before it names."""
    found = re.findall(rf"((?:[^\n]+\n)+)\n```{language}\n(.*?)```", guide(), re.S)
    return [(named(paragraph), block) for paragraph, block in found]


def diff_of(name: str) -> list[str]:
    return [line for names, block in blocks("diff") if name in names for line in [*block.splitlines(), ""]]


def settings_of(name: str) -> dict[str, Any]:
    (settings,) = [json.loads(block) for names, block in blocks("json") if name in names]
    return settings


def promised() -> dict[str, tuple[int, set[str]]]:
    """The table: by script, how many lines change, and the metrics that its evaluation returns."""
    rows = re.findall(r"^\| (.*) \| (\d)[^|]* \| (.*) \|$", guide(), re.M)
    return {name: (int(n), set(re.findall(r"`(\w+)`", keys))) for which, n, keys in rows for name in named(which)}


def changed(text: str, diff: list[str]) -> str:
    """`text` after the diff; every hunk's old lines must stand in it, side by side, exactly once."""
    lines = text.splitlines()
    for hunk in "\n".join(diff).strip("\n").split("\n\n"):
        hunk_lines = [line for line in hunk.splitlines() if line]
        old = [line[1:] for line in hunk_lines if line[0] in " -"]
        new = [line[1:] for line in hunk_lines if line[0] in " +"]
        at = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
        assert len(at) == 1, f"{len(at)} places in the script for\n{hunk}"
        lines[at[0] : at[0] + len(old)] = new
    return "\n".join(lines) + "\n"


def test_the_guide_is_about_every_script():
    assert set().union(*(names for names, _ in blocks("diff"))) == {*SCRIPT_NAMES, PAGE, "trainer_qa.py"}
    assert set(promised()) == {*SCRIPT_NAMES, PAGE}
    assert all("teacher_model_name_or_path" in settings_of(name) for name in SCRIPT_NAMES)


@pytest.mark.parametrize("name", [*SCRIPT_NAMES, PAGE])
def test_few_lines_change(name):
    lines = [line for part in (name, *BESIDE.get(name, [])) for line in diff_of(part)]
    added, removed = ([line for line in lines if line.startswith(sign)] for sign in "+-")
    assert len(added) == promised()[name][0] <= 4  # a line that is replaced counts once
    if name != PAGE:
        assert len(removed) < len(added)
    for part in (name, *BESIDE.get(name, [])):
        stock = (SCRIPTS / part).read_text(encoding="utf-8")
        patched = changed(stock, diff_of(part))
        assert stock not in patched
        compile(patched, part, "exec")


# ---- models and data that the scripts are given ----


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    who, did, where = ["red dog", "old cat", "big bird"], ["sat in", "ran to", "slept near"], ["house", "tree", "barn"]
    return [f"the {draw.choice(who)} {draw.choice(did)} the {draw.choice(where)}" for _ in range(count)]


def text_rows(seed: int, count: int) -> dict[str, Any]:
    """One kind of rows for each script that reads JSON files, all made of the same sentences."""
    texts = sentences(count, seed)
    animals = [" ".join(text.split()[1:3]) for text in texts]
    glue = [
        {"sentence1": text, "sentence2": animal, "label": "positive" if "dog" in animal else "negative"}
        for text, animal in zip(texts, animals, strict=True)
    ]
    ner = [{"tokens": text.split(), "ner_tags": ["O", "B-WHO", "I-WHO", *["O"] * 4]} for text in texts]
    ner = [{**row, "ner_tags": row["ner_tags"][: len(row["tokens"])]} for row in ner]
    summaries = [{"text": text, "summary": animal} for text, animal in zip(texts, animals, strict=True)]
    squad = [
        {"id": str(i), "context": text, "question": f"who {text.split()[3]}",
         "answers": {"text": [animal], "answer_start": [text.index(animal)]}}
        for i, (text, animal) in enumerate(zip(texts, animals, strict=True))
    ]  # fmt: skip
    swag = [
        {"sent1": text, "sent2": "the", "label": i % 4, **{f"ending{j}": texts[(i + j) % count] for j in range(4)}}
        for i, text in enumerate(texts)
    ]
    return {"glue": glue, "ner": ner, "summarization": summaries, "qa": {"data": squad}, "swag": swag}


def write_data(folder: Path) -> None:
    draw = np.random.default_rng(0)
    pictures: dict[str, Dataset] = {}
    scenes: dict[str, Dataset] = {}
    speech: dict[str, Dataset] = {}
    for seed, (split, count) in enumerate(SPLITS.items()):
        for name, rows in text_rows(seed, count).items():
            text = json.dumps(rows) if isinstance(rows, dict) else "\n".join(map(json.dumps, rows))
            (folder / f"{name}-{split}.json").write_text(text, encoding="utf-8")
        texts = sentences(4 * count, seed)
        (folder / f"lines-{split}.txt").write_text("\n".join(texts), encoding="utf-8")
        images = []
        for i in range(count):
            image = Picture.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            path = folder / "images" / split / ("cats", "dogs")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            images.append({"image": image, "labels": i % 2})
        classes = [draw.integers(0, 3, (8, 8), dtype=np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(count)]
        for each in classes:
            each[:5] = 255
        labels = [Picture.fromarray(each) for each in classes]
        scenes[split] = Dataset.from_dict(
            {"image": [row["image"] for row in images], "label": labels},
            features=Features({"image": Image(), "label": Image()}),
        )
        sounds = [draw.standard_normal(draw.integers(400, 800)).astype(np.float32) for _ in range(count)]
        audio = [{"array": sound, "sampling_rate": 16000} for sound in sounds]
        speech[split] = Dataset.from_dict({"audio": audio, "text": [text[4:11] for text in texts[:count]]})
        features = Features({"image": Image(), "labels": ClassLabel(names=["cats", "dogs"])})
        pictures[split] = Dataset.from_list(images, features=features)
    DatasetDict(pictures).save_to_disk(str(folder / "pictures"))
    DatasetDict(scenes).save_to_disk(str(folder / "scenes"))
    DatasetDict(speech).save_to_disk(str(folder / "speech"))


def write_models(folder: Path) -> None:
    special = {"pad": "<pad>", "bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "mask": "<mask>"}
    tokenizer = tiny.byte_level_tokenizer(
        sentences(99, 9), 320, ["<pad>", "<s>", "</s>", "<mask>"], model_max_length=32,
        **{f"{name}_token": token for name, token in special.items()},
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def bert(cls: Any, hidden: int, *names: str) -> Any:
        labels = dict(enumerate(names or ("LABEL_0", "LABEL_1")))
        config = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "vocab_size": len(tokenizer)}
        return cls(tiny.bert_config(hidden, initializer_range=0.5, **config))

    def llama(hidden: int) -> Any:  # 2,048 rows for fewer tokens: the loss is computed inside the output heads
        return LlamaForCausalLM(tiny.llama_config(hidden, vocab_size=2048, **ids))

    def t5(hidden: int) -> Any:
        sizes = {"d_model": hidden, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes, **ids))

    def segformer(hidden: int) -> Any:
        config = SegformerConfig(
            num_encoder_blocks=1, depths=[1], hidden_sizes=[hidden], num_attention_heads=[1], patch_sizes=[3],
            strides=[4], sr_ratios=[1], mlp_ratios=[2], decoder_hidden_size=hidden, id2label=scene_names,
            label2id={name: i for i, name in scene_names.items()},
        )  # fmt: skip
        return SegformerForSemanticSegmentation(config)

    def wav2vec2(hidden: int) -> Any:
        return Wav2Vec2ForCTC(wav2vec2_config(hidden, vocab_size=len(letters), pad_token_id=0))

    letters = {letter: i for i, letter in enumerate(["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"])}
    folder.mkdir()
    (folder / "letters.json").write_text(json.dumps(letters), encoding="utf-8")
    spelled = Wav2Vec2CTCTokenizer(str(folder / "letters.json"), bos_token=None, eos_token=None)
    speech = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), spelled)
    scene_names = {i: f"class {i}" for i in range(3)}
    names = {"id2label": {0: "cats", 1: "dogs"}, "label2id": {"cats": 0, "dogs": 1}, "num_labels": 2}
    torch.manual_seed(0)
    models = {
        "bert": bert(BertForMaskedLM, 16),  # a student without a head for its task, as from the hub
        "run_glue.py": bert(BertForSequenceClassification, 24, "negative", "positive"),
        "run_mlm.py": bert(BertForMaskedLM, 24),
        "run_ner.py": bert(BertForTokenClassification, 24, "B-WHO", "I-WHO", "O"),
        "run_qa.py": bert(BertForQuestionAnswering, 24),
        "llama": llama(16),
        "run_clm.py": llama(24),
        "t5": t5(16),
        "run_summarization.py": t5(24),
        "vit": tiny.vit(32),
        "run_image_classification.py": tiny.vit(32, hidden_size=24, **names),
        "segformer": segformer(8),
        "run_semantic_segmentation.py": segformer(16),
        "run_swag.py": bert(BertForMultipleChoice, 24),
        "wav2vec2": wav2vec2(16),
        "run_speech_recognition_ctc.py": wav2vec2(24),
    }
    size = {"height": 32, "width": 32}
    processors = {"vit": ViTImageProcessor(size=size), "segformer": SegformerImageProcessor(size=size)}
    processors["wav2vec2"] = speech
    for name, model in models.items():
        model.save_pretrained(folder / name)
        processors.get(model.config.model_type, tokenizer).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def given(tmp_path_factory: Any) -> Path:
    """A folder with the data and, in `models`, students by their family and teachers by their script."""
    folder = tmp_path_factory.mktemp("given")
    write_data(folder)
    write_models(folder / "models")
    return folder


def files(given: Path, name: str, ending: str = "json") -> dict[str, str]:
    return {f"{split}_file": str(given / f"{name}-{split}.{ending}") for split in SPLITS}


def options(name: str, given: Path, folder: Path) -> dict[str, Any]:
    """What a user of the stock script would write for a run of 4 steps on the CPU."""
    text = {**files(given, name[4:-3]), "do_predict": True}
    lines = {k: v for k, v in files(given, "lines", "txt").items() if "test" not in k}
    choices = {k: v for k, v in files(given, "swag").items() if "test" not in k}
    images = {f"{split}_dir": str(given / "images" / split) for split in ("train", "validation")}
    student, own = {
        "run_glue.py": ("bert", {**text, "max_seq_length": 24}),
        "run_image_classification.py": ("vit", {**images, "remove_unused_columns": False}),
        "run_semantic_segmentation.py": (
            "segformer", {"dataset_name": str(given / "scenes"), "remove_unused_columns": False}
        ),
        "run_speech_recognition_ctc.py": ("wav2vec2", {"dataset_name": str(given / "speech"), "mask_time_prob": 0.0}),
        "run_swag.py": ("bert", choices),
        "run_ner.py": ("bert", text),
        "run_clm.py": ("llama", {**lines, "block_size": 16}),
        "run_mlm.py": ("bert", {**lines, "line_by_line": True}),
        "run_summarization.py": ("t5", {**text, "predict_with_generate": True, "val_max_target_length": 8}),
        "run_qa.py": ("bert", {**text, "max_seq_length": 32, "doc_stride": 8}),
    }[name]  # fmt: skip
    if student == "vit":  # its own head has other classes
        own["ignore_mismatched_sizes"] = True
    return {
        "model_name_or_path": str(given / "models" / student), "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"), "do_train": True, "do_eval": True, "max_steps": 4, "logging_steps": 2,
        "learning_rate": 0.01, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 64,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **own,
    }  # fmt: skip


def script(name: str, folder: Path, *, patched: bool = True) -> Path:
    """A copy of the script in `folder`, with the guide's changes or as it stands."""
    for part in (name, *BESIDE.get(name, [])):
        text = (SCRIPTS / part).read_text(encoding="utf-8")
        (folder / part).write_text(changed(text, diff_of(part)) if patched else text, encoding="utf-8")
    return folder / name


def started(path: Path, options: dict[str, Any], *, as_json: bool = True) -> tuple[str, dict[str, Any], list[dict]]:
    """What a run prints, the metrics that it writes, and its log."""
    if as_json:
        path.with_suffix(".json").write_text(json.dumps(options), encoding="utf-8")
        argv = [path.with_suffix(".json").name]
    else:
        argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    printed = run_script(path, argv)
    out = Path(options["output_dir"])
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    return printed, json.loads((out / "eval_results.json").read_text(encoding="utf-8")), state["log_history"]


# ---- and what comes of it ----


@pytest.mark.trains
@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_a_patched_script_distils(name, given, tmp_path):
    kd = {**settings_of(name), "teacher_model_name_or_path": str(given / "models" / name)}
    printed, metrics, log = started(script(name, tmp_path), {**options(name, given, tmp_path), **kd})

    _, keys = promised()[name]
    assert {"eval_loss", "eval_soft_loss", "eval_teacher_agreement", *keys} <= set(metrics)
    assert ("eval_hard_loss" in metrics) == (name != "run_qa.py")
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 <= metrics["eval_teacher_agreement"] <= 1
    mixture = kd["kd_alpha"] * metrics["eval_soft_loss"] + (1 - kd["kd_alpha"]) * metrics.get("eval_hard_loss", 0)
    assert metrics["eval_loss"] == pytest.approx(mixture, rel=1e-5)
    assert len([entry for entry in log if entry.get("soft_loss", 0) > 0]) == 2  # 4 steps, logged every 2

    # The settings are those of the guide's JSON.
    used = json.loads((tmp_path / "out" / "distillation.json").read_text(encoding="utf-8"))
    expected = {key.removeprefix("kd_"): value for key, value in kd.items() if key.startswith("kd_")}
    assert {key: used[key] for key in expected} == expected
    assert f"loss = {kd['kd_alpha']:g} * soft(forward_kl, T={kd['kd_temperature']:g})" in printed

    if "perplexity" in keys:
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_hard_loss"]), rel=1e-5)
        assert metrics["perplexity"] != pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-2)
    assert ("no logits are held" in printed) == (name == "run_clm.py")  # the only vocabulary that is large enough


@pytest.mark.trains
@pytest.mark.parametrize("name", ["run_glue.py", "run_clm.py", "run_mlm.py", "run_summarization.py", "run_qa.py"])
def test_alpha_zero_is_the_stock_script(name, given, tmp_path):
    """Loss for loss, with dropout and random masks: the teacher that is loaded beside it draws no random number."""
    settings = settings_of(name)
    kd = {**settings, "teacher_model_name_or_path": str(given / "models" / name), "kd_alpha": 0.0}
    runs = {}
    for which, extra in (("stock", {}), ("patched", kd)):
        folder = tmp_path / which
        folder.mkdir()
        path = script(name, folder, patched=which == "patched")
        runs[which] = started(path, {**options(name, given, folder), **extra}, as_json=False)
    for key in ("loss", "grad_norm"):
        stock, patched = ([entry[key] for entry in run[2] if key in entry] for run in (runs["stock"], runs["patched"]))
        assert len(stock) == 2
        assert patched == pytest.approx(stock, rel=1e-5)
    (_, stock, _), (_, patched, _) = runs["stock"], runs["patched"]
    same = [key for key in stock if key.endswith(("loss", "accuracy", "perplexity", "f1", "exact_match", "rouge1"))]
    assert same
    assert {key: patched[key] for key in same} == pytest.approx({key: stock[key] for key in same}, rel=1e-5)


@pytest.mark.trains
def test_what_the_stock_script_writes_is_a_teacher(given, tmp_path):
    name = "run_glue.py"
    for part in ("teacher", "student"):
        (tmp_path / part).mkdir()
    larger = {**options(name, given, tmp_path / "teacher"), "model_name_or_path": str(given / "models" / "run_mlm.py")}
    started(script(name, tmp_path / "teacher", patched=False), larger)
    kd = {**settings_of(name), "teacher_model_name_or_path": str(tmp_path / "teacher" / "out")}
    printed, metrics, _ = started(
        script(name, tmp_path / "student"), {**options(name, given, tmp_path / "student"), **kd}
    )
    assert metrics["eval_soft_loss"] > 0
    assert "cannot be compared by name" not in printed


@pytest.mark.trains
def test_the_patched_page_has_the_pages_loss(given, tmp_path):
    teacher, out = given / "models" / "run_image_classification.py", tmp_path / "out"
    argv = [str(given / "pictures"), str(teacher), str(out)]
    with pytest.raises(AssertionError, match="unexpected keyword argument 'training_args'"):  # so nothing to compare
        run_script(script(PAGE, tmp_path, patched=False), argv)
    run_script(script(PAGE, tmp_path), argv)
    metrics = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    assert {"eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_agreement"} <= set(metrics)
    assert promised()[PAGE][1] <= set(metrics)

    state = max(out.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    log = json.loads(state.read_text(encoding="utf-8"))
    assert len([entry for entry in log["log_history"] if entry.get("soft_loss", 0) > 0]) == 2  # epochs
    test, processor = load_from_disk(str(given / "pictures"))["test"], AutoImageProcessor.from_pretrained(teacher)
    with torch.no_grad():
        pixels = processor([row["image"] for row in test], return_tensors="pt")["pixel_values"]
        student_logits, teacher_logits = (
            AutoModelForImageClassification.from_pretrained(folder)(pixels).logits
            for folder in (log["best_model_checkpoint"], teacher)
        )
    log_q, p = F.log_softmax(student_logits / 5, -1), F.softmax(teacher_logits / 5, -1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * 5**2
    hard = F.cross_entropy(student_logits, torch.tensor(test["labels"]))
    assert metrics["eval_loss"] == pytest.approx(float(0.5 * hard + 0.5 * soft), rel=1e-4)

"""Training from a teacher cache is training with the live teacher; whatever does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast

from kd_trainer import CachedTeacher, DistillationTrainer
from kd_trainer.cache import build as cache_build
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache import teacher_reader
from kd_trainer.cache.formats import Format
from kd_trainer.cache.store import CacheError
from kd_trainer.data.tensor_rows import as_tensors, collate_tensors
from kd_trainer.training.checkpoints import ResumableInterrupt
from tests.cache.test_formats import encoded
from tests.helpers import config_run, tiny

TASKS = ("classification", "multi_label_classification", "regression", "question_answering", "token_classification",
         "causal_lm", "masked_lm", "seq2seq_lm", "plain", "embedding")  # fmt: skip
LM = {"kd_reduction": "tokenmean", "train_sampling_strategy": "random"}


def build(task: str, out: Path, *, data: Any = None, pair: Any = None, **kwargs: Any) -> Any:
    """The tiny trainer of a task, batches in random order; `cache` is a folder and a format."""
    if task in ("masked_lm", "seq2seq_lm") and pair is None:
        torch.manual_seed(0)
        make = config_run.bart if task == "seq2seq_lm" else config_run.distilbert
        pair = make(16), make(24)
    rows = tiny.rows("causal_lm" if task in ("masked_lm", "seq2seq_lm") else task) if data is None else data
    made = tiny.trainer(task, out, data=rows, pair=pair, **{**LM, **kwargs})
    made.eval_dataset = rows[:21] if isinstance(rows, list) else made.eval_dataset
    return made


def cache(folder: Path, form: str, k: int | None = None) -> dict[str, Any]:
    return {"teacher_cache_dir": str(folder), "teacher_cache_format": form, "teacher_cache_k": k}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return tiny.logged(trainer, "loss")


# ---- the same losses ----


@pytest.mark.parametrize("task", TASKS)
def test_logits_from_a_cache_are_the_teacher(task, tmp_path):
    live, cached = (build(task, tmp_path / "run", **more) for more in ({}, cache(tmp_path / "cache", "logits")))
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert isinstance(cached.teacher, CachedTeacher)
    torch.testing.assert_close(tiny.weights(cached.model), tiny.weights(live.model), rtol=1e-5, atol=1e-6)
    live, cached = live.evaluate(), cached.evaluate()
    for name in ("eval_loss", "eval_soft_loss", "eval_teacher_agreement"):
        if name in live or name in cached:  # a regression agrees with nobody
            assert cached[name] == pytest.approx(live[name], rel=1e-5), name


LM_FORMS = [("logits", None), ("hidden", None), ("topk", 36), ("sampled", 40)]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "seq2seq_lm"])
@pytest.mark.parametrize("implementation", ["fused", "full"])
def test_language_models(task, implementation, tmp_path):
    """Logits and hidden states are exact; the top 36 of 37 classes nearly; draws lie around the truth."""
    more = {"kd_loss_implementation": implementation, "kd_temperature": 2.0, "max_steps": 5}
    live = losses(build(task, tmp_path / "run", **more))
    for form, k in LM_FORMS:
        trainer = build(task, tmp_path / "run", **more, **cache(tmp_path / form, form, k))
        found = losses(trainer)
        assert (trainer._plan.heads is not None) == (implementation == "fused"), form
        assert found == pytest.approx(live, rel={"topk": 2e-3, "sampled": 0.3}.get(form, 1e-5)), form
        assert found != pytest.approx(live, rel=1e-9) or form in ("logits", "hidden"), form


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_sparse_forms_give_one_loss_with_logits_and_without(form, tmp_path):
    runs = [
        losses(build("causal_lm", tmp_path / "run", kd_loss_implementation=way, **cache(tmp_path / "cache", form, 6)))
        for way in ("fused", "full")
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_sparse_forms_of_classes(tmp_path):
    live = build("classification", tmp_path / "run")
    cached = build("classification", tmp_path / "run", **cache(tmp_path / "cache", "topk", 4))
    assert losses(cached) == pytest.approx(losses(live), rel=1e-3)  # float16
    assert cached.evaluate()["eval_teacher_agreement"] == pytest.approx(live.evaluate()["eval_teacher_agreement"])


@pytest.mark.trains
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_fifty_steps_with_dropout_accumulation_and_a_resume(form, tmp_path):
    """Building draws no random number of the training's: dropout is the same."""
    dropout = {"attention_dropout": 0.1, "initializer_range": 0.5}

    def trainer(out: str, **more: Any) -> Any:
        torch.manual_seed(0)
        pair = tuple(
            type(m)(tiny.llama_config(h, **dropout)) for h, m in zip((16, 24), tiny.models("causal_lm"), strict=True)
        )
        settings = {
            "max_steps": 50, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "optim": "adamw_torch",
            "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 20, "kd_loss_implementation": "fused",
        }  # fmt: skip
        return build("causal_lm", tmp_path / out, pair=pair, data=tiny.rows("causal_lm", 100), **settings, **more)

    live = losses(trainer("live"))
    assert len(live) == 50
    cached = cache(tmp_path / "cache", form)
    assert losses(trainer("cached", **cached)) == pytest.approx(live, rel=1e-5)
    resumed = trainer("cached", **cached)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cached/checkpoint-20"))
    assert tiny.logged(resumed, "loss")[-30:] == pytest.approx(live[-30:], rel=1e-5)


@pytest.mark.parametrize(("side", "mask"), [("left", True), ("right", True), ("right", False)])
def test_padding_may_change(side, mask, tmp_path):
    """A cache that was built in batches of 5 is read in batches of 8, padded to other lengths."""

    def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch, longest = {}, max(len(f["input_ids"]) for f in features) + len(features)
        for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
            gap = [[fill] * (longest - len(f[name])) for f in features]
            rows = [g + f[name] if side == "left" else f[name] + g for f, g in zip(features, gap, strict=True)]
            batch[name] = torch.tensor(rows)
        if not mask:
            del batch["attention_mask"]
        elif side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    found = []
    for more in ({}, cache(tmp_path / "cache", "hidden")):
        trainer = build(
            "causal_lm", tmp_path / "run", per_device_eval_batch_size=5, kd_loss_implementation="fused", **more
        )
        trainer.data_collator = pad
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_attended_positions(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in tiny.rows("causal_lm")]
    settings = {"data": rows, "kd_positions": "attended", "kd_alpha": 1.0}
    live = losses(build("causal_lm", tmp_path / "run", **settings))
    assert losses(
        build("causal_lm", tmp_path / "run", **settings, **cache(tmp_path / "cache", "logits"))
    ) == pytest.approx(live, rel=1e-5)


# ---- any dataset ----


def test_a_dataset_whose_columns_are_removed(tmp_path):
    rows = [{**row, "note": "x", "token_type_ids": [0] * len(row["input_ids"])} for row in tiny.rows("classification")]
    data = datasets.Dataset.from_list(rows)
    settings = {"data": data, "remove_unused_columns": True, "dataloader_num_workers": 1}
    live = losses(build("classification", tmp_path / "run", **settings))
    trainer = build("classification", tmp_path / "run", **settings, **cache(tmp_path / "cache", "logits"))
    assert losses(trainer) == pytest.approx(live, rel=1e-5)
    assert trainer.teacher.manifest["columns_read"] == ["attention_mask", "input_ids", "token_type_ids"]


def test_rows_in_one_tensor(tmp_path):
    rows = tiny.rows("plain")
    columns = {"features": [r["features"].tolist() for r in rows], "labels": [r["labels"] for r in rows]}
    data = datasets.Dataset.from_dict(columns).cast_column("features", datasets.List(datasets.Value("float32")))
    found = []
    for more in ({}, cache(tmp_path / "cache", "logits")):
        trainer = build("plain", tmp_path / "run", data=as_tensors(data), **more)
        trainer.eval_dataset, trainer.data_collator = None, collate_tensors
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def numbered_rows(count: int = 32) -> list[dict[str, Any]]:
    return [{**row, "teacher_row_id": 1000 + 7 * i} for i, row in enumerate(tiny.rows("classification", count))]


@pytest.mark.parametrize("streamed", [True, False])
def test_rows_with_numbers_of_their_own(streamed, tmp_path):
    """A stream, and a dataset that is shuffled and cut after the building."""

    def data(rows: list[dict[str, Any]]) -> Any:
        made = datasets.Dataset.from_list(rows)
        return made.to_iterable_dataset() if streamed else made

    more = {"max_steps": 4, "remove_unused_columns": True}
    built = build(
        "classification", tmp_path / "run", data=data(numbered_rows()), **more, **cache(tmp_path / "cache", "logits")
    )
    built.eval_dataset = None
    built.build_teacher_cache()
    rows = numbered_rows()[::-1][:20]
    live = build("classification", tmp_path / "run", data=data(rows), **more)
    read = build("classification", tmp_path / "run", data=data(rows), **more)
    read._teacher_cache.given = read.teacher = CachedTeacher(tmp_path / "cache")
    assert losses(read) == pytest.approx(losses(live), rel=1e-5)


def test_a_stream_without_numbers_is_refused(tmp_path):
    data = datasets.Dataset.from_list(tiny.rows("classification")).to_iterable_dataset()
    trainer = build("classification", tmp_path / "run", data=data, **cache(tmp_path / "cache", "logits"))
    with pytest.raises(
        ValueError, match="stream of rows without a number; expected rows with a column 'teacher_row_id'"
    ):
        trainer.train()


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"features": torch.randn(6), "labels": row % 5}


def test_random_augmentation_is_refused(tmp_path):
    trainer = build("plain", tmp_path / "run", data=Augmented(), **cache(tmp_path / "cache", "logits"))
    with pytest.raises(ValueError, match=r"`train_dataset` is one whose rows differ from one reading to the next"):
        trainer.train()
    assert not (tmp_path / "cache/train/manifest.json").exists()


def test_random_masking_is_refused(tmp_path):
    texts = ["def return import class self None True False for in"] * 8
    tokenizer: PreTrainedTokenizerFast = tiny.byte_level_tokenizer(
        texts, 300, ["<pad>", "<mask>"], pad_token="<pad>", mask_token="<mask>"
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5)
    config = config_run.distilbert(16).config
    config.vocab_size = len(tokenizer)
    pair = tuple(type(config_run.distilbert(16))(config) for _ in range(2))
    trainer = build(
        "masked_lm", tmp_path / "run", pair=pair, data=[tokenizer(t) for t in texts], **cache(tmp_path / "c", "logits")
    )
    trainer.data_collator = collator
    with pytest.raises(ValueError, match="random augmentation, masking or padding"):
        trainer.train()


ALL_KEYS = {"return_flash_attn_kwargs": True, "return_seq_idx": True}


@pytest.mark.parametrize(("how", "kept"), [({}, "hidden"), ({}, "topk"), (ALL_KEYS, "hidden"), (ALL_KEYS, "sampled")])
def test_batches_that_are_one_long_row(how, kept, tmp_path):
    """As the flattening collator makes them: read in another order, they are the live teacher's."""
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in tiny.rows("causal_lm")]
    collator = DataCollatorWithFlattening(**how)
    options = {"kd_reduction": "tokenmean", "max_steps": 6, "kd_divergence": "forward_kl", "seed": 3}

    def run(name: str, teacher: Any = None, **more: Any) -> list[float]:
        student, live = tiny.models("causal_lm")
        trainer = build("causal_lm", tmp_path / name, pair=(student, teacher or live), data=rows, **{**options, **more})
        trainer.data_collator = collator
        return losses(trainer)

    right = run("live")
    built = run(
        "built", **cache(tmp_path / "cache", kept, {"hidden": None, "topk": tiny.VOCAB - 1, "sampled": 50}[kept])
    )
    again = run("read", CachedTeacher(tmp_path / "cache"))
    assert built == again
    assert right == pytest.approx(built, rel={"hidden": 1e-5, "topk": 1e-3, "sampled": 0.05}[kept])
    manifest = CachedTeacher(tmp_path / "cache").manifest
    assert manifest["total_rows"] == len(rows)
    rows[4] = {**rows[4], "labels": [-100] * len(rows[4]["labels"])}  # other positions are kept
    with pytest.raises(ValueError, match="differs from the one the teacher read"):
        run("other", CachedTeacher(tmp_path / "cache"))


def test_one_long_row_must_tell_where_rows_begin(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in tiny.rows("causal_lm")]
    trainer = build("causal_lm", tmp_path / "run", data=rows, **cache(tmp_path / "cache", "hidden"))
    trainer.data_collator = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(ValueError, match=r"`data_collator` is one that makes 1 rows of .* Use DataCollatorWithFlatten"):
        trainer.train()


def test_rows_that_see_each_other_are_refused(tmp_path):
    """The attention of torch does not read cu_seq_lens."""
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in tiny.rows("causal_lm")]
    trainer = build("causal_lm", tmp_path / "run", data=rows, **cache(tmp_path / "cache", "hidden"))
    trainer.data_collator = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(
        ValueError, match=r"`data_collator` is one that packs rows, and the teacher attends from one row to another"
    ):
        trainer.train()


# ---- without the teacher ----


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache of logits, one of top-k and one of draws of the causal pair."""
    folder = tmp_path_factory.mktemp("built")
    for form, k in (("logits", None), ("topk", 8), ("sampled", 20), ("hidden", None)):
        build("causal_lm", folder / "run", **cache(folder / form, form, k)).build_teacher_cache()
    return folder


def reader(built: Path, out: Path, form: str, **kwargs: Any) -> Any:
    student, _ = tiny.models("causal_lm")
    return DistillationTrainer(
        model=student,
        teacher_model=CachedTeacher(built / form),
        args=tiny.arguments(out, **{**LM, **kwargs}),
        data_collator=tiny.pad,
        train_dataset=kwargs.pop("data", tiny.rows("causal_lm")),
        eval_dataset=tiny.rows("causal_lm")[:21],
    )


def test_it_knows_all_by_itself(built, tmp_path, capsys):
    live = build("causal_lm", tmp_path / "run")
    trainer = reader(built, tmp_path, "hidden")
    assert losses(trainer) == pytest.approx(losses(live), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-5)
    text = capsys.readouterr().out
    assert "LlamaForCausalLM, read from" in text
    assert "(hidden; eval 21 rows, train 32 rows)" in text
    summary = trainer.summary()
    assert (summary["teacher"], summary["teacher_parameters"]) == (
        "LlamaForCausalLM",
        live.summary()["teacher_parameters"],
    )
    trainer.create_model_card()
    assert "Distilled from the teacher `LlamaForCausalLM`" in (tmp_path / "README.md").read_text()


def test_one_part_alone(built, tmp_path):
    trainer = reader(built, tmp_path, "logits")
    trainer.teacher = CachedTeacher(built / "logits" / "train")
    whole = losses(reader(built, tmp_path, "logits"))
    assert losses(trainer) == whole


def test_evaluation_data_without_a_cache_has_its_hard_loss_alone(built, tmp_path, caplog):
    trainer = reader(built, tmp_path, "logits")
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate(tiny.rows("causal_lm", 9, seed=5))
        trainer.evaluate(tiny.rows("causal_lm", 9, seed=5))
    assert metrics["eval_loss"] == pytest.approx(0.3 * metrics["eval_hard_loss"], rel=1e-5)
    assert "eval_soft_loss" not in metrics
    assert sum("there is no teacher cache of this evaluation data" in r.getMessage() for r in caplog.records) == 1
    assert trainer.predict(tiny.rows("causal_lm", 9, seed=5)).predictions.shape[0] == 9


def test_several_evaluation_sets(tmp_path):
    sets = {"a": tiny.rows("classification", 9, seed=3), "b": tiny.rows("classification", 7, seed=4)}
    found = []
    for more in ({}, cache(tmp_path / "cache", "logits")):
        trainer = build("classification", tmp_path / "run", max_steps=2, **more)
        trainer.eval_dataset = sets
        trainer.train()
        found.append(trainer.evaluate())
    assert {p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()} == {"train", "eval-a", "eval-b"}
    for name in ("eval_a_loss", "eval_b_soft_loss"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)


def test_a_second_run_does_not_load_the_teacher(tmp_path, monkeypatch):
    student, teacher = tiny.models("classification")
    teacher.save_pretrained(tmp_path / "teacher")
    settings = {"teacher_model_name_or_path": str(tmp_path / "teacher"), **cache(tmp_path / "cache", "logits")}

    def run() -> Any:
        return DistillationTrainer(
            model=copy.deepcopy(student),
            args=tiny.arguments(tmp_path / "run", **settings),
            data_collator=tiny.pad,
            train_dataset=tiny.rows("classification"),
        )

    first = losses(run())
    import kd_trainer.training.setup

    def never(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(kd_trainer.training.setup, "load_teacher", never)
    again = run()
    assert isinstance(again.teacher, CachedTeacher)
    assert losses(again) == first


def test_the_module_that_was_given_is_not_held(tmp_path):
    import gc
    import weakref

    student, teacher = tiny.models("classification")
    held = weakref.ref(teacher)
    trainer = build("classification", tmp_path / "run", pair=(student, teacher), **cache(tmp_path / "cache", "logits"))
    del teacher
    trainer.train()
    gc.collect()
    assert held() is None


def test_the_students_own_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    def trainer(**more: Any) -> Any:
        torch.manual_seed(0)
        student = get_peft_model(
            tiny.models("causal_lm")[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        return build("causal_lm", tmp_path / "run", pair=(student, "adapter_off"), **more)

    live = losses(trainer())
    assert losses(trainer(**cache(tmp_path / "cache", "hidden"))) == pytest.approx(live, rel=1e-5)
    again = trainer(**cache(tmp_path / "cache", "hidden"))
    assert isinstance(again.teacher, CachedTeacher)
    assert losses(again) == pytest.approx(live, rel=1e-5)


def test_a_cache_of_the_hub(built, tmp_path, monkeypatch):
    downloaded, sent = [], []

    def download(name: str, *, repo_type: str) -> str:
        downloaded.append((name, repo_type))
        return str(built / "logits")

    class Api:
        def __init__(self, token: Any) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> None: ...

        def upload_folder(self, **options: Any) -> str:
            sent.append(options)
            return "done"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    teacher = CachedTeacher("someone/outputs")
    assert downloaded == [("someone/outputs", "dataset")]
    assert set(teacher.parts) == {"train", "eval"}
    assert teacher.push_to_hub("me/copy") == "done"
    assert (sent[0]["repo_type"], sent[0]["folder_path"]) == ("dataset", str(built / "logits"))


# ---- sweeps: what each format serves ----

SETTINGS = {
    "alpha": {"kd_alpha": 0.2},
    "temperature": {"kd_temperature": 1.5},
    "divergence": {"kd_divergence": "jsd"},
    "dkd": {"kd_divergence": "dkd", "kd_beta": 1.0},
    "logit_mse": {"kd_divergence": "logit_mse"},
    "entropy_switch": {"kd_divergence": "entropy_switch"},
    "standardized": {"kd_standardize_logits": True},
}
DENSE = {"dkd", "logit_mse", "entropy_switch", "standardized"}


@pytest.mark.parametrize(
    ("form", "refused"),
    [
        ("logits", set()),
        ("hidden", set()),
        ("topk", {"temperature", *DENSE}),
        ("sampled", {"temperature", "divergence", *DENSE}),
    ],
)
def test_what_a_format_serves(form, refused, built, tmp_path):
    for name, setting in SETTINGS.items():
        trainer = reader(built, tmp_path, form, max_steps=2, **setting)
        if name in refused:
            expected = {
                "temperature": "`kd_temperature` is 1.5; expected 3, for which",
                "standardized": "`kd_standardize_logits` is True",
            }.get(name, f"`kd_divergence` is '{setting.get('kd_divergence')}'")
            with pytest.raises(ValueError, match="teacher cache") as error:
                trainer.train()
            assert expected in str(error.value)
        else:
            found = losses(trainer)
            if form in ("logits", "hidden"):
                assert found == pytest.approx(losses(build("causal_lm", tmp_path, max_steps=2, **setting)), rel=1e-5)


def test_top_k_under_another_divergence(built, tmp_path):
    trainer = build("causal_lm", tmp_path, kd_divergence="reverse_kl", **cache(tmp_path / "c", "topk", 36))
    live = losses(build("causal_lm", tmp_path, kd_divergence="reverse_kl"))
    assert losses(trainer) == pytest.approx(live, rel=5e-3)


# ---- what is refused ----


def another_teacher() -> nn.Module:
    teacher = tiny.models("causal_lm")[1]
    with torch.no_grad():
        next(teacher.parameters())[0, 0] += 1e-3
    return teacher


def other_config() -> nn.Module:
    teacher = tiny.models("causal_lm")[1]
    teacher.config.rms_norm_eps = 1e-5
    return teacher


def changed_row() -> list[dict[str, Any]]:
    rows = tiny.rows("causal_lm")
    rows[31] = {**rows[31], "input_ids": [*rows[31]["input_ids"][:-1], 1]}
    return rows


# What is changed, and the beginning of the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights": (
        {"pair": lambda: (tiny.models("causal_lm")[0], another_teacher())},
        "`teacher_model` is one with weights of SHA-256",
    ),
    "config": (
        {"pair": lambda: (tiny.models("causal_lm")[0], other_config())},
        "`teacher_model` is one with a config of SHA-256",
    ),
    "format": (
        {"teacher_cache_format": "hidden"},
        "`teacher_cache_format` is one with the format 'hidden'; expected the format 'topk'",
    ),
    "k": ({"teacher_cache_k": 9}, "`teacher_cache_k` is one with the value 9; expected the value 8"),
    "dtype": (
        {"teacher_cache_dtype": "bfloat16"},
        "`teacher_cache_dtype` is one with the dtype 'bfloat16'; expected the dtype 'float16'",
    ),
    "temperature": ({"kd_temperature": 2.0}, "`kd_temperature` is 2.0; expected 3, for which the teacher cache was"),
    "a temperature that moves": (
        {"kd_schedule": "linear", "kd_temperature_end": 1.0},
        "`kd_temperature` is 1.0; expected 3",
    ),
    "positions": (
        {"kd_positions": "attended"},
        "`kd_positions` is one with the positions 'attended'; expected the positions 'labels'",
    ),
    "rows": (
        {"data": tiny.rows("causal_lm")[:30]},
        "`train_dataset` is one with a number of rows of 30; expected a number of rows of 32",
    ),
    "a row": ({"data": changed_row()}, "`train_dataset` is one whose row 31 differs from the one the teacher read"),
    "order": (
        {"data": tiny.rows("causal_lm")[::-1]},
        "`train_dataset` is one whose row 0 differs from the one the teacher read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_of_something_else_is_refused(case, built, tmp_path):
    changes, text = REFUSED[case]
    given = {name: value() if callable(value) else value for name, value in changes.items()}
    settings = {**cache(built / "topk", "topk", 8), **given}
    if case == "format":
        settings["teacher_cache_k"] = None
    trainer = build("causal_lm", tmp_path / "run", **settings)
    with pytest.raises(ValueError, match="cache") as error:
        trainer.train()
    assert text in str(error.value)
    assert str(error.value).count(". ") >= 1, "no fix in it"


def test_another_tokenizer_is_refused(tmp_path):
    def run(extra: str) -> Any:
        tokenizer = tiny.byte_level_tokenizer(["a b c"], 290, ["<pad>", extra], pad_token="<pad>")
        trainer = build("causal_lm", tmp_path / "run", **cache(tmp_path / "cache", "logits"))
        trainer.processing_class = tokenizer
        return trainer

    run("<one>").build_teacher_cache()
    with pytest.raises(CacheError, match="`processing_class` is one with a vocabulary of SHA-256"):
        run("<two>").train()


def test_a_changed_row_is_found_when_it_is_read(built, tmp_path, monkeypatch):
    """Some are compared before the training, every one when it comes."""
    monkeypatch.setattr(cache_settings, "_SAMPLE_ROWS", 2)
    rows = tiny.rows("causal_lm")
    rows[5] = {**rows[5], "input_ids": [1] * len(rows[5]["input_ids"])}
    trainer = reader(built, tmp_path, "logits")
    trainer.train_dataset = rows
    with pytest.raises(
        CacheError, match="`train_dataset` is giving a row 5 that differs from the one the teacher read"
    ):
        trainer.train()
    monkeypatch.undo()
    with pytest.raises(CacheError, match="`train_dataset` is one whose row 5 differs from the one the teacher read"):
        trainer.train()


def test_other_classes_are_refused(tmp_path):
    build("classification", tmp_path / "run", **cache(tmp_path / "cache", "logits")).build_teacher_cache()
    student, _ = tiny.models("classification")
    names = {i: f"class {(i + 1) % 5}" for i in range(5)}
    student.config.id2label, student.config.label2id = names, {v: k for k, v in names.items()}
    trainer = build("classification", tmp_path / "run", pair=(student, CachedTeacher(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"`teacher_cache` is one in which class 'class 1' has id 1; expected id 0"):
        trainer.train()


def test_another_task_is_refused(built, tmp_path):
    student, _ = tiny.models("classification")
    trainer = build("classification", tmp_path, pair=(student, CachedTeacher(built / "logits")), kd_temperature=3.0)
    with pytest.raises(ValueError, match="`teacher_cache` is one for the task 'causal_lm'; expected 'classification'"):
        trainer._plan_of(tiny.pad(tiny.rows("classification", 4)))


def test_a_teacher_that_says_nan_is_not_kept(tmp_path):
    student, teacher = tiny.models("classification")
    rows = tiny.rows("classification")
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[rows[20]["input_ids"][0]] = torch.nan
    trainer = build(
        "classification",
        tmp_path / "run",
        pair=(student, teacher),
        data=rows,
        kd_check_finite="log",
        **cache(tmp_path / "cache", "logits"),
    )
    with pytest.raises(ValueError, match=r"`teacher_model` is giving NaN or inf on rows (\d+ to \d+ of the data|\[)"):
        trainer.train()
    assert not (tmp_path / "cache/train/manifest.json").exists()


@pytest.mark.parametrize("strange", [math.nan, math.inf])
@pytest.mark.parametrize(
    "kept",
    [
        Format("logits", 50),
        Format("hidden", 50),
        Format("topk", 50, 8, 1.0, "float16"),
        Format("sampled", 50, 8, 1.0),
    ],
    ids=lambda kept: f"{kept.name} {kept.dtype}",
)
def test_a_single_number_that_is_not_finite_is_seen_in_every_format(kept, strange):
    outputs = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    cache_build._check_finite(encoded(kept, outputs, torch.full((20,), 0.5, dtype=torch.float64)), [3, 4])
    outputs[7, 11] = strange
    with pytest.raises(ValueError, match="`teacher_model` is giving NaN or inf on rows 3 to 4 of the data"):
        cache_build._check_finite(encoded(kept, outputs, torch.full((20,), 0.5, dtype=torch.float64)), [3, 4])


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    usage = type(cache_settings.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(cache_settings.shutil, "disk_usage", lambda _: usage(10, 10, 5))
    trainer = build("classification", tmp_path / "run", **cache(tmp_path / "cache", "logits"))
    with pytest.raises(
        RuntimeError, match=r"with 0 MB free; expected about 0 MB for 32 rows of format logits. Make room"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"teacher_cache_format": "topk"},
            "`teacher_cache_format` is 'topk'; expected no value without teacher_cache_dir",
        ),
        ({"kd_run": "cache"}, "`teacher_cache_dir` is None; expected a folder with kd_run 'cache'"),
        (
            {"teacher_cache_dir": "c", "teacher_cache_k": 0},
            "`teacher_cache_k` is 0; expected a whole number, at least 1",
        ),
        ({"teacher_cache_dir": "c", "teacher_cache_format": "top"}, "Did you mean `topk`?"),
        (
            {"teacher_cache_dir": "c", "teacher_cache_dtype": "uint8"},
            "`teacher_cache_dtype` is 'uint8'; expected one of",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, text, tmp_path):
    with pytest.raises(ValueError, match="teacher_cache") as error:
        tiny.arguments(tmp_path, **given)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("task", "form", "k", "text"),
    [
        ("regression", "topk", None, "expected 'logits' for the task 'regression'"),
        ("classification", "hidden", None, "expected 'logits', 'topk' or 'sampled'"),
        ("classification", "logits", 3, "`teacher_cache_k` is 3; expected no value with teacher_cache_format 'logits'"),
        ("causal_lm", "topk", 37, "`teacher_cache_k` is 37; expected 1 to 36"),
    ],
)
def test_formats_that_do_not_fit_are_refused(task, form, k, text, tmp_path):
    with pytest.raises(ValueError, match="teacher_cache") as error:
        build(task, tmp_path / "run", **cache(tmp_path / "cache", form, k)).train()
    assert text in str(error.value)


def test_hidden_states_of_a_teacher_that_changes_its_logits(tmp_path):
    class Odd(type(tiny.models("causal_lm")[1])):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.sort(-1).values
            return outputs

    torch.manual_seed(0)
    student, teacher = tiny.models("causal_lm")[0], Odd(tiny.llama_config(24))
    with pytest.raises(ValueError, match="because the logits of Odd are more than its output head's product"):
        build("causal_lm", tmp_path / "run", pair=(student, teacher), **cache(tmp_path / "cache", "hidden")).train()
    torch.manual_seed(0)
    live = losses(build("causal_lm", tmp_path / "run", pair=(tiny.models("causal_lm")[0], teacher)))
    cached = build(
        "causal_lm",
        tmp_path / "run",
        pair=(tiny.models("causal_lm")[0], teacher),
        **cache(tmp_path / "other", "logits"),
    )
    assert losses(cached) == pytest.approx(live, rel=1e-5)


def test_a_dataloader_of_the_scripts_own_is_told(built, tmp_path):
    trainer = reader(built, tmp_path, "logits")
    batch = tiny.pad(tiny.rows("causal_lm", 4))
    trainer.model.train()
    with pytest.raises(RuntimeError, match="a batch without teacher outputs"):
        trainer.compute_loss(trainer.model, batch)


# ---- from any script ----


def test_kd_run_cache_builds_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_settings, "SHARD_BYTES", 1000)
    trainer = build("classification", tmp_path / "run", kd_run="cache", **cache(tmp_path / "cache", "logits"))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 0
    assert trainer.state.global_step == 0
    manifest = json.loads((tmp_path / "cache/train/manifest.json").read_text())
    assert (manifest["total_rows"], len(manifest["shards"]), manifest["rows_per_shard"]) == (32, 2, 16)
    assert manifest["total_bytes"] == sum(p.stat().st_size for p in (tmp_path / "cache/train/data").glob("*.arrow"))


def test_check_with_a_cache(built, tmp_path):
    trainer = reader(built, tmp_path, "hidden", kd_loss_implementation="fused")
    before = tiny.weights(trainer.model).clone()
    rows = trainer.check()
    assert {row.what: row.status for row in rows}["loss"] == "ok"
    assert not [row for row in rows if row.status == "error"]
    assert torch.equal(before, tiny.weights(trainer.model))
    assert "read from" in next(row.found for row in rows if row.what == "teacher")


def test_half_precision_hidden_states(tmp_path):
    """A bf16 teacher is kept in bf16: exactly the outputs of the live one."""

    def trainer(**more: Any) -> Any:
        student, teacher = tiny.models("causal_lm")
        return build(
            "causal_lm",
            tmp_path / "run",
            pair=(student, teacher.to(torch.bfloat16)),
            kd_loss_implementation="fused",
            **more,
        )

    live = losses(trainer())
    cached = trainer(**cache(tmp_path / "cache", "hidden"))
    assert losses(cached) == pytest.approx(live, rel=1e-5)
    assert cached.teacher.manifest["dtype"] == "bfloat16"


def test_autocast(tmp_path):
    live = build("causal_lm", tmp_path / "run", bf16=True, kd_loss_implementation="fused")
    cached = build(
        "causal_lm", tmp_path / "run", bf16=True, kd_loss_implementation="fused", **cache(tmp_path / "cache", "hidden")
    )
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert cached.teacher.manifest["dtype"] == "bfloat16"


def test_the_teachers_head_computes_only_what_is_counted(tmp_path, monkeypatch):
    """No logits of uncounted positions are made, and none at all for hidden states."""
    seen: list[int] = []
    product = teacher_reader.OutputProjection.product

    def counting(self: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return product(self, hidden, *rest)

    monkeypatch.setattr(teacher_reader.OutputProjection, "product", counting)
    trainer = build("causal_lm", tmp_path / "run", **cache(tmp_path / "cache", "topk", 5))
    trainer.eval_dataset = None
    trainer.build_teacher_cache()
    counted = sum((np.array(row["labels"][1:]) != -100).sum() for row in tiny.rows("causal_lm"))
    assert sum(seen) == counted
    seen.clear()
    trainer = build("causal_lm", tmp_path / "run", **cache(tmp_path / "other", "hidden"))
    trainer.build_teacher_cache()
    assert not seen


def test_ctrl_c_leaves_no_callback_behind(built, tmp_path):
    trainer = reader(built, tmp_path, "logits", max_steps=1)
    trainer.train()
    assert any(isinstance(c, ResumableInterrupt) for c in trainer.callback_handler.callbacks)


def test_auto_is_exact_and_keeps_to_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_settings, "SMALL_VOCABULARY", 30)
    built = build("causal_lm", tmp_path / "run", **cache(tmp_path / "a", "auto")).build_teacher_cache()
    assert {store.manifest["format"] for store in built.parts.values()} == {"hidden"}
    monkeypatch.setattr(cache_settings, "SMALL_VOCABULARY", 40)
    built = build("causal_lm", tmp_path / "run", **cache(tmp_path / "b", "auto")).build_teacher_cache()
    assert built.format.name == "logits"
    first = build("causal_lm", tmp_path / "run", **cache(tmp_path / "c", "topk", 7))
    first.eval_dataset = None
    first.build_teacher_cache()
    built = build("causal_lm", tmp_path / "run", **cache(tmp_path / "c", "auto")).build_teacher_cache()
    assert {(s.manifest["format"], s.manifest["k"]) for s in built.parts.values()} == {("topk", 7)}

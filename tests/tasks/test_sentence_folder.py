"""Folders of sentence-transformers as teachers and students, against the library itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, BertModel, DataCollatorWithPadding, Trainer

from kd_trainer import DistillationMixin, DistillationTrainer, student_from_teacher
from kd_trainer.tasks.sentence_folder import read_sentence_folder, sentence_encoder, width_of
from tests.helpers import tiny

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["a cat", "the cat sat on a mat", "rain", "it rains on the mat today", "no", "cats and rain and mats"]


def tokenizer() -> Any:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]"}
    return tiny.byte_level_tokenizer(TEXTS, 300, list(special.values()), **special)


def bert(seed: int, hidden: int = 16, layers: int = 1) -> BertModel:
    torch.manual_seed(seed)
    config = tiny.bert_config(hidden, vocab_size=300, initializer_range=0.5)
    config.num_hidden_layers = layers
    return BertModel(config)


def library_folder(path: Path, *, pooling: str = "mean", seed: int = 1, layers: int = 1, after: Any = ()) -> Path:
    """A folder as the library saves it; `after`: modules behind the pooling."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = path.with_name(path.name + "-plain")
    bert(seed, layers=layers).save_pretrained(plain)
    tokenizer().save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(16, pooling), *after]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    model.prompts = {"query": "find "}
    model.save_pretrained(str(path), create_model_card=False)
    shutil.rmtree(plain)
    return path


def normalise() -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def dense(activation: Any = None) -> Any:
    from sentence_transformers.base.modules import Dense

    torch.manual_seed(5)
    return Dense(16, 12, activation_function=activation or torch.nn.Tanh())


def encode(path: Any) -> torch.Tensor:
    return sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(TEXTS, convert_to_tensor=True)


def data() -> Dataset:
    return Dataset.from_dict({"text": TEXTS}).map(lambda batch: tokenizer()(batch["text"]), batched=True)


def trainer(tmp_path: Path, student: Any, teacher: Any, cls: Any = DistillationTrainer, **kwargs: Any) -> Any:
    kwargs = {"remove_unused_columns": True, "per_device_train_batch_size": 3, **kwargs}
    return cls(
        model=student,
        teacher_model=teacher,
        args=tiny.arguments(tmp_path / "run", **kwargs),
        data_collator=DataCollatorWithPadding(tokenizer()),
        train_dataset=data(),
        eval_dataset=data(),
    )


# ---- a teacher by path ----


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("after", ["", "normalised", "dense", "dense, normalised"])
def test_a_folder_embeds_as_the_library_does(pooling, after, tmp_path):
    modules = [dense()] * ("dense" in after) + [normalise()] * ("normalised" in after)
    path = library_folder(tmp_path / "st", pooling=pooling, after=modules)
    folder = read_sentence_folder(str(path))
    assert folder is not None
    assert folder.pooling == {"lasttoken": "last"}.get(pooling, pooling)
    assert (folder.normalises, folder.has_weights) == ("normalised" in after, "dense" in after)
    encoder = sentence_encoder(AutoModel.from_pretrained(path), folder)
    assert width_of(encoder) == (12 if "dense" in after else 16)
    with torch.no_grad():
        found = encoder(**tokenizer()(TEXTS, padding=True, return_tensors="pt"))["sentence_embedding"]
    torch.testing.assert_close(found, encode(path), rtol=1e-5, atol=1e-5)


def test_a_teacher_by_path_has_its_own_pooling(tmp_path):
    path = library_folder(tmp_path / "st", pooling="cls", after=[normalise()])
    run = trainer(tmp_path, bert(0), str(path), kd_pooling="mean")
    with torch.no_grad():
        batch = tokenizer()(TEXTS, padding=True, return_tensors="pt")
        states, mask = run.model(**batch)[0], batch["attention_mask"].unsqueeze(-1)
    student = (states * mask).sum(1) / mask.sum(1)
    expected = 1 - torch.nn.functional.cosine_similarity(student, encode(path)).mean()
    assert run.evaluate()["eval_soft_loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_student_takes_the_pooling_of_the_teachers_folder(tmp_path):
    path = library_folder(tmp_path / "st", pooling="lasttoken")
    run = trainer(tmp_path, bert(1), str(path))
    assert run.evaluate()["eval_soft_loss"] == pytest.approx(0, abs=1e-6)


def edited(path: Path, name: str, /, **changes: Any) -> Path:
    """A JSON file of the folder, or of modules.json the last entry, with other values."""
    content = json.loads((path / name).read_text())
    (content[-1] if isinstance(content, list) else content).update(changes)
    (path / name).write_text(json.dumps(content))
    return path


def test_flags_of_older_versions_are_read(tmp_path):
    path = library_folder(tmp_path / "st")
    flags = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (path / "1_Pooling/config.json").write_text(json.dumps(flags))
    folder = read_sentence_folder(str(path))
    assert folder is not None and folder.pooling == "cls"  # noqa: PT018


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "with the pooling max; expected one of the poolings mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "with the pooling mean, cls; expected one of"),
        ("modules.json", {"type": "my_code.Pooling"}, "of the class my_code.Pooling; .* code of another class is not"),
        ("modules.json", {"type": "sentence_transformers.models.WordWeights"}, "with the modules Transformer, WordW"),
        ("modules.json", {"path": "../1_Pooling"}, "with modules in , ../1_Pooling; expected subfolders of it"),
    ],
)
def test_what_is_not_applied_is_refused(name, changes, message, tmp_path):
    path = edited(library_folder(tmp_path / "st"), name, **changes)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, bert(0), str(path))


def test_a_pickled_dense_layer_is_refused(tmp_path):
    path = library_folder(tmp_path / "st", after=[dense()])
    (path / "2_Dense/model.safetensors").rename(path / "2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense has no model.safetensors; .* because a pickle can run code"):
        trainer(tmp_path, bert(0), str(path))


def test_an_unknown_activation_is_refused(tmp_path):
    path = library_folder(tmp_path / "st", after=[dense()])
    edited(path, "2_Dense/config.json", activation_function="os.system")
    with pytest.raises(ValueError, match="with the activation Identity, Tanh"):
        trainer(tmp_path, bert(0), str(path))


# ---- a student that came from a folder ----


@pytest.mark.parametrize("after", ["", "normalised"])
@pytest.mark.parametrize("pooling", [None, "cls"])
def test_a_student_from_a_folder_is_saved_as_one(pooling, after, tmp_path):
    path = library_folder(tmp_path / "st", seed=3, after=[normalise()] * bool(after))
    run = trainer(tmp_path, AutoModel.from_pretrained(path), bert(1), kd_pooling=pooling, kd_embedding_loss="mse",
                  save_strategy="steps", save_steps=4)  # fmt: skip
    run.train()
    trained = torch.tensor(run.predict(data()).predictions)
    run.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run/checkpoint-4"):
        torch.testing.assert_close(encode(folder), trained, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiny.weights(AutoModel.from_pretrained(folder)), tiny.weights(run.model))
    assert (encode(path) - trained).abs().max() > 1e-2
    kept = json.loads((tmp_path / "saved/config_sentence_transformers.json").read_text())
    assert kept["prompts"]["query"] == "find "
    if after:
        assert trained.norm(dim=-1).tolist() == pytest.approx([1.0] * len(TEXTS), abs=1e-5)


def test_a_student_of_a_folders_layers_is_saved_as_one(tmp_path):
    """The usual way: some layers of the teacher."""
    path = library_folder(tmp_path / "st", layers=3, pooling="cls")
    student = student_from_teacher(str(path), layers=[0, 2])
    assert student.config.num_hidden_layers == 2
    run = trainer(tmp_path, student, str(path))
    run.train()
    run.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(encode(tmp_path / "saved"), torch.tensor(run.predict(data()).predictions))
    assert len(sentence_transformers.SentenceTransformer(str(tmp_path / "saved"))[0].model.encoder.layer) == 2


def test_another_student_is_saved_as_ever(tmp_path):
    run = trainer(tmp_path, bert(0), bert(1))
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved/modules.json").exists()
    torch.testing.assert_close(tiny.weights(AutoModel.from_pretrained(tmp_path / "saved")), tiny.weights(run.model))


def test_a_student_from_a_folder_with_a_dense_layer_is_refused(tmp_path):
    path = library_folder(tmp_path / "st", after=[dense()])
    with pytest.raises(ValueError, match=r"which has a Dense module .* the student as SentenceTransformer\(path\)"):
        trainer(tmp_path, AutoModel.from_pretrained(path), bert(1))


# ---- a SentenceTransformer itself ----


class InFront(DistillationMixin, Trainer):
    pass


def test_a_sentence_transformer_is_trained_saved_and_resumed(tmp_path):
    path = library_folder(tmp_path / "st", after=[dense()], seed=3)
    teacher = sentence_transformers.SentenceTransformer(
        str(library_folder(tmp_path / "other", after=[dense(torch.nn.Identity())])), device="cpu"
    )

    def run(name: str, **kwargs: Any) -> Any:
        student = sentence_transformers.SentenceTransformer(str(path), device="cpu")
        return trainer(tmp_path / name, student, teacher, InFront, save_strategy="steps", save_steps=2, **kwargs)

    whole = run("whole")
    expected = 1 - torch.nn.functional.cosine_similarity(encode(path), encode(tmp_path / "other")).mean()
    assert whole.evaluate()["eval_soft_loss"] == pytest.approx(expected.item(), abs=1e-6)
    whole.train()
    trained = torch.tensor(whole.predict(data()).predictions)
    assert (encode(path) - trained).abs().max() > 1e-3
    torch.testing.assert_close(encode(tmp_path / "whole/run/checkpoint-4"), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.model.encode(TEXTS, convert_to_tensor=True), trained, rtol=1e-5, atol=1e-5)
    shutil.copytree(tmp_path / "whole/run/checkpoint-2", tmp_path / "resumed/run/checkpoint-2")
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed/run/checkpoint-2"))
    torch.testing.assert_close(tiny.weights(resumed.model), tiny.weights(whole.model), rtol=0, atol=1e-7)


def test_the_best_sentence_transformer_is_loaded(tmp_path):
    path = library_folder(tmp_path / "st", seed=3)
    student = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    run = trainer(tmp_path, student, bert(1), save_strategy="steps", metric_for_best_model="teacher_spearman",
                  learning_rate=3.0, **best)  # fmt: skip
    run.train()
    logged = tiny.logged(run, "eval_teacher_spearman")
    assert run.evaluate()["eval_teacher_spearman"] == pytest.approx(run.state.best_metric, abs=1e-6)
    assert run.state.best_metric == max(logged) > min(logged)


def test_pooling_of_a_sentence_transformer_is_its_modules(tmp_path):
    student = sentence_transformers.SentenceTransformer(str(library_folder(tmp_path / "st")), device="cpu")
    with pytest.raises(ValueError, match="`kd_pooling` is 'cls'; expected None for a student that is a SentenceTransf"):
        trainer(tmp_path, student, bert(1), kd_pooling="cls")


def test_a_sentence_transformer_of_another_width_is_refused(tmp_path):
    student = sentence_transformers.SentenceTransformer(str(library_folder(tmp_path / "st")), device="cpu")
    with pytest.raises(ValueError, match=r"embeddings of 16 numbers; expected 24, .* Add a Dense module"):
        trainer(tmp_path, student, bert(1, hidden=24)).train()

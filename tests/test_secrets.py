"""Tokens, keys and passwords reach no file, log, card or message; and they are no part of a teacher's identity."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, TrainerCallback, TrainingArguments

from kd_trainer import (
    CachedTeacher,
    DistillationArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)
from kd_trainer.cache.identity import output_kwargs
from kd_trainer.diagnostics.results import refused
from kd_trainer.redaction import hidden, is_secret_name, scrub, secrets_in
from kd_trainer.validation import fail, message
from tests.cache.test_cached_teacher import cache
from tests.helpers import tiny

SECRET = "hf_QWERTYuiopASDFGHjklZXCVbnm123456"
ODD = "not-in-any-known-form"  # a secret because of its name alone
KWARGS: dict[str, Any] = {
    "token": SECRET,
    "use_auth_token": ODD,
    "proxies": {"https": f"http://me:{ODD}@proxy:80"},
    "adapter_kwargs": {"token": ODD, "deep": [{"api_key": ODD}, SECRET]},
    "dtype": "float32",
}


def shows_a_secret(text: str) -> bool:
    return SECRET in text or ODD in text


# ---- names and values ----


@pytest.mark.parametrize(
    "name",
    ["token", "use_auth_token", "hf_token", "HF_TOKEN", "hub_token", "access-token", "accessToken", "api_key", "apiKey",
     "OPENAI_API_KEY", "password", "db_passwd", "client_secret", "secret", "credentials", "Authorization", "auth",
     "private_key", "--hub_token"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert hidden({name: ODD}) == {name: "<hidden>"}
    assert hidden({name: [ODD]}) == {name: "<hidden>"}
    assert hidden({name: True, "other": None}) == {name: True, "other": None}
    assert set(secrets_in({"x": [{name: ODD}]})) == {ODD}


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "pad_token", "pad_token_id", "eos_token", "max_new_tokens", "token_type_ids", "num_image_tokens",
     "mask_token", "key", "num_key_value_heads", "keys_to_ignore", "key_mapping", "label_names", "", None, 7,
     "author", "secretary", "tokens"],
)  # fmt: skip
def test_names_of_other_things(name):
    assert not is_secret_name(name)
    assert hidden({name: ODD}) == {name: ODD}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (SECRET, "<hidden>"),
        (f"401 for {SECRET}.", "401 for <hidden>."),
        ("hf_abc123", "<hidden>"),
        (f"https://user:{SECRET}@huggingface.co/x", "https://<hidden>@huggingface.co/x"),
        (f"https://hub/x?token={ODD}&a=1", "https://hub/x?token=<hidden>&a=1"),
        (f"Authorization: Bearer {ODD}", "Authorization: <hidden> <hidden>"),
        (f'{{"token": "{ODD}", "dtype": "x"}}', '{"token": "<hidden>", "dtype": "x"}'),
        (f'{{"hf_token": "{ODD}', '{"hf_token": "<hidden>"'),
        (f"f(password='{ODD}')", "f(password='<hidden>')"),
        ("sk-abcdefghijklmnop1234", "<hidden>"),
        ("ghp_abcdefghijklmnop1234", "<hidden>"),
    ],
)
def test_texts_with_secrets(text, cleaned):
    assert not shows_a_secret(scrub(text))
    assert scrub(text).startswith(cleaned[:12])
    assert scrub(scrub(text)) == scrub(text)


@pytest.mark.parametrize(
    "text",
    ["models/hf_bert-base/x", "/home/me/hf_models/teacher", "token=True", "pad_token: '<pad>'", "a token: the next",
     "https://huggingface.co/a/b@main", "basic distillation", "bearer of news", "key: value", "hf_", "user@host"],
)  # fmt: skip
def test_other_texts_stay(text):
    assert scrub(text) == text


def test_any_depth_and_the_words_of_a_command_line():
    assert not shows_a_secret(repr(hidden(KWARGS)))
    assert hidden(KWARGS)["dtype"] == "float32"
    assert hidden(["--alpha", "1", "--hub_token", ODD, "x"]) == ["--alpha", "1", "--hub_token", "<hidden>", "x"]
    assert hidden((SECRET, {SECRET}, b"x", SECRET.encode())) == ("<hidden>", {"<hidden>"}, b"x", "<hidden>")
    assert KWARGS["token"] == SECRET, "what was given stays"


# ---- messages ----


def test_no_message_shows_a_secret():
    messages = [
        message("teacher_model_init_kwargs", KWARGS, "nothing", "Leave it out."),
        message("token", ODD, "no", "x"),
    ]
    messages.append(message("x", SECRET, f"y ({SECRET})", f"Use token={ODD}.", because=f"{SECRET} is wrong"))
    assert not shows_a_secret("".join(messages))
    assert messages[0].fix == "Leave it out."
    with pytest.raises(ValueError, match="<hidden>") as error:
        fail("argv", ["--hub_token", ODD], "options", "Give them.")
    assert not shows_a_secret(str(error.value))
    row = refused("teacher", OSError(f"401 Client Error: token={ODD} {SECRET}"))
    assert not shows_a_secret(row.found)


@pytest.mark.parametrize(
    "given",
    [f'{{"token": "{ODD}"', f'{{"token": "{SECRET}"', [{"token": ODD}], f"token={ODD}", f'["{SECRET}"]'],
)
def test_arguments_that_cannot_be_read(given):
    with pytest.raises((ValueError, TypeError), match="teacher_model_init_kwargs") as error:
        DistillationArguments(teacher_model_init_kwargs=given)
    assert not shows_a_secret(str(error.value))


def test_a_key_of_a_json_file_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"output_dir": "x", "hf_token": ODD}))
    with pytest.raises(ValueError, match="`hf_token` is <hidden>; expected no such key"):
        parse_args(DistillationTrainingArguments, argv=[str(tmp_path / "config.json")])
    with pytest.raises(ValueError, match="hf_token") as error:
        parse_args(DistillationTrainingArguments, argv=["--hf_token", ODD])
    assert not shows_a_secret(str(error.value))


@pytest.mark.parametrize("raises", [OSError, ValueError, TypeError, RuntimeError])
def test_a_teacher_that_cannot_be_loaded(raises, tmp_path, monkeypatch):
    """Upstream's message has the token in it; its traceback is not shown then."""
    from transformers import AutoModelForSequenceClassification

    def refuse(*_: Any, token: str, **__: Any) -> None:
        raise raises(f"no access with {ODD} or {token}\nmore")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", refuse)
    args = tiny.arguments(tmp_path, teacher_model_init_kwargs=KWARGS, teacher_model_name_or_path="no/where")
    with pytest.raises(ValueError, match="teacher_model") as error:
        DistillationTrainer(model=tiny.models("classification")[0], args=args)
    assert not shows_a_secret(str(error.value))
    assert error.value.__cause__ is None


def test_a_module_with_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_model_init_kwargs` is .*<hidden>.* expected nothing") as error:
        tiny.trainer("classification", tmp_path, teacher_model_init_kwargs=KWARGS)
    assert not shows_a_secret(str(error.value))


# ---- the arguments ----


@pytest.mark.parametrize("cls", [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments])
def test_the_arguments_as_text_json_and_pickle(cls, tmp_path):
    args = cls(str(tmp_path), use_cpu=True, hub_token=ODD, teacher_model_init_kwargs=dict(KWARGS))
    shown = [
        str(args),
        repr(args),
        f"{args}",
        args.to_json_string(),
        str(args.to_dict()),
        str(args.to_sanitized_dict()),
    ]
    torch.save(args, tmp_path / "training_args.bin")
    shown += [(tmp_path / "training_args.bin").read_bytes().decode("latin-1"), pickle.dumps(args).decode("latin-1")]
    shown += [repr(args.teacher_model_init_kwargs), f"{args.teacher_kwargs}", str(DistillationArguments.of(args))]
    assert not any(map(shows_a_secret, shown))
    assert json.loads(args.to_json_string())["teacher_model_init_kwargs"]["dtype"] == "float32"
    assert args.teacher_kwargs == KWARGS, "from_pretrained gets them whole"
    assert args.hub_token == ODD
    for made in (copy.deepcopy(args), copy.copy(args)):
        assert (made.teacher_kwargs, made.hub_token) == (KWARGS, ODD)
    assert DistillationArguments.of(args).teacher_kwargs == KWARGS
    again = pickle.loads(pickle.dumps(args))
    assert again.teacher_kwargs["dtype"] == "float32"
    assert again.learning_rate == args.learning_rate


def test_the_arguments_of_a_class_of_the_scripts_own(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Own(DistillationArguments, TrainingArguments):
        more: int = 1

    args = Own(output_dir=str(tmp_path), use_cpu=True, teacher_model_init_kwargs=dict(KWARGS))
    assert not any(map(shows_a_secret, (str(args), repr(args), args.to_json_string())))


# ---- a whole run ----


def files_of(folder: Path) -> dict[str, str]:
    return {str(p): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()}


class _Tracker(TrainerCallback):
    """Writes of the arguments what upstream's callbacks give to TensorBoard, MLflow and others."""

    def on_train_begin(self, args, state, control, **kwargs):
        shown = [args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict()), str(args)]
        (Path(args.output_dir) / "tracked.txt").write_text("\n".join(shown))


def test_a_run_with_a_token_leaves_it_nowhere(tmp_path, capsys, caplog):
    """Cache, checkpoints, card, distillation.json, TensorBoard, what is printed and logged; then the token rotates."""
    student, teacher = tiny.models("classification")
    teacher.save_pretrained(tmp_path / "teacher")
    rows = tiny.rows("classification")

    def run(kwargs: dict[str, Any], steps: int = 2) -> DistillationTrainer:
        settings = cache(tmp_path / "cache", "logits")
        args = tiny.arguments(
            tmp_path / "run", teacher_model_name_or_path=str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs,
            hub_token=ODD, max_steps=steps, save_strategy="steps", save_steps=1, report_to="none", **settings,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=copy.deepcopy(student), args=args, data_collator=tiny.pad, train_dataset=rows, eval_dataset=rows,
            callbacks=[_Tracker()],
        )  # fmt: skip
        trainer.train()
        return trainer

    given = {name: value for name, value in KWARGS.items() if name not in ("use_auth_token", "adapter_kwargs")}
    with caplog.at_level(logging.DEBUG):
        trainer = run(given)
        trainer.save_model()
        trainer.create_model_card()
        trainer.check()
        print(trainer.args, trainer.summary())
    printed = capsys.readouterr()
    shown = {**files_of(tmp_path / "run"), **files_of(tmp_path / "cache"), "out": printed.out, "err": printed.err}
    shown["log"] = caplog.text
    assert any(name.endswith("training_args.bin") for name in shown)
    assert any(name.endswith("tracked.txt") for name in shown)
    assert [name for name, text in shown.items() if shows_a_secret(text)] == []
    assert CachedTeacher(tmp_path / "cache").manifest["teacher"]["init_kwargs"] == {"dtype": "float32"}
    run({"token": "hf_another1234567890", "dtype": torch.float32, "cache_dir": str(tmp_path), "force_download": False})
    with pytest.raises(ValueError, match=r"`teacher_model_init_kwargs` is one with the value .*'bfloat16'"):
        run({"token": SECRET, "dtype": "bfloat16"})


# ---- what is part of a teacher's identity ----


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"token": "x", "use_auth_token": "y", "cache_dir": "c", "force_download": True, "resume_download": True}, {}),
        ({"local_files_only": True, "proxies": {}, "low_cpu_mem_usage": True, "use_safetensors": True}, {}),
        ({"device_map": "auto", "max_memory": {0: "1GB"}, "offload_folder": "x"}, {}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "auto"}, {"dtype": "auto"}),
        (
            {"revision": "v1", "variant": "fp16", "subfolder": "s"},
            {"revision": "v1", "subfolder": "s", "variant": "fp16"},
        ),
        ({"attn_implementation": "eager"}, {"attn_implementation": "eager"}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"trust_remote_code": False}, {}),
        ({"use_safetensors": False}, {"use_safetensors": False}),
        ({"quantization_config": {"load_in_4bit": True}}, {"quantization_config": {"load_in_4bit": True}}),
        ({"adapter_kwargs": {"token": ODD, "x": 1}}, {"adapter_kwargs": {"token": "<hidden>", "x": 1}}),
        ({"num_labels": 3, "layer_norm_eps": 1e-5}, {"layer_norm_eps": 1e-5, "num_labels": 3}),
        ({"another": SECRET}, {"another": "<hidden>"}),
    ],
)
def test_what_changes_the_output_is_the_identity(given, kept):
    assert output_kwargs(given) == kept


def test_objects_in_the_identity():
    one, same, other = (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=t) for t in (5.0, 5.0, 6.0))
    one, same, other = (output_kwargs({"quantization_config": each}) for each in (one, same, other))
    assert one == same != other
    with pytest.raises(ValueError, match=r"one whose fancy has an object of type object; expected values that JSON"):
        output_kwargs({"fancy": [object()]})

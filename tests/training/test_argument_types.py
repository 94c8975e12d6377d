"""Every field of the arguments takes one type, from JSON, the command line and Python; errors name what was given."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig

from kd_trainer import DistillationArguments, DistillationTrainingArguments, SoftTargetLoss, forward_kl, parse_args
from tests.helpers import tiny

FIELDS = {field.name: field for field in dataclasses.fields(DistillationArguments)}
BOOLS = ("kd_remap_labels", "kd_standardize_logits", "teacher_compile")
NUMBERS = ("kd_alpha", "kd_temperature", "kd_beta", "kd_alpha_end", "kd_temperature_end", "kd_chunk_temperature",
           "teacher_server_timeout", "kd_student_fraction", "kd_position_fraction")  # fmt: skip
WHOLE = ("teacher_cache_k", "kd_relation_heads", "kd_max_new_tokens", "kd_compare_seeds",
         "teacher_server_top_k", "teacher_server_retries", "teacher_server_concurrency")  # fmt: skip
OBJECTS = ("teacher_model_init_kwargs", "kd_features", "kd_generation_kwargs")
LISTS = ("teacher_weights", "teacher_names")
PATHS = ("teacher_model_name_or_path", "teacher_cache_dir")
TEXTS = tuple(name for name in FIELDS if name not in (*BOOLS, *NUMBERS, *WHOLE, *OBJECTS, *LISTS))
OPTIONAL = {name for name, field in FIELDS.items() if field.default is None}
SERVED = {
    "teacher_server_url": "http://h:1", "teacher_server_model": "m", "teacher_cache_dir": "x", "kd_temperature": 1.0,
}  # fmt: skip
# What another field has to be for this one to be allowed at all.
BESIDE = {
    "kd_beta": {"kd_divergence": "jsd"},
    "kd_chunk_temperature": {"kd_cross_tokenizer": "chunks"},
    "kd_alpha_end": {"kd_schedule": "linear"},
    "kd_temperature_end": {"kd_schedule": "linear"},
    "kd_feature_layers": {"kd_features": {"relation": 1}},
    "kd_relation_heads": {"kd_features": {"relation": 1}},
    "kd_max_new_tokens": {"kd_student_fraction": 1.0},
    "kd_generation_kwargs": {"kd_student_fraction": 1.0},
    "teacher_cache_k": {"teacher_cache_dir": "x"},
    "teacher_cache_format": {"teacher_cache_dir": "x"},
    "teacher_cache_dtype": {"teacher_cache_dir": "x"},
    **{f"teacher_server_{name}": SERVED for name in ("top_k", "timeout", "retries", "concurrency")},
}


def from_python(name, value, folder):
    return DistillationArguments(**{name: value}, **BESIDE.get(name, {}))


def from_json(name, value, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({name: value, **BESIDE.get(name, {})}))
    return parse_args(DistillationArguments, argv=[str(path)])


def to_a_trainer(name, value, folder):
    """Set after the arguments were made; the trainer reads them again."""
    args = tiny.arguments(folder)
    for each, given in {**BESIDE.get(name, {}), name: value}.items():
        setattr(args, each, given)
    return DistillationArguments.of(args)


def of(names, values):
    return dict.fromkeys(names, values)


SOURCES = [from_python, from_json, to_a_trainer]
OTHERS = {
    **of(BOOLS, ["false", "true", "0", "", 0, 1, 0.0, [], [True], {}, {"a": 1}, None]),
    **of(NUMBERS, ["0.5", "", True, False, [0.5], {"a": 0.5}]),
    **of(WHOLE, ["64", "", True, 64.0, 1.5, math.nan, [64], {}]),
    **of(TEXTS, [1, 0.5, True, ["jsd"], [], {"a": 1}, ""]),
    **of(LISTS, ["", "no list", "1", 1, 0.5, True, [], {}, {"a": 1}, [True], [[1]], [None]]),
    **of(OBJECTS, ["", "no object", "[1]", "1", 1, 0.5, True, [], [["a", 1]]]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_type_is_one_clear_error(name, tmp_path):
    for give, value in itertools.product(SOURCES, OTHERS[name]):
        with pytest.raises((TypeError, ValueError), match=f"^`{name}` is .*; expected .*[.] .*[.]$") as caught:
            give(name, value, tmp_path)
        if name not in (*OBJECTS, *LISTS):
            value_at_fault = name in TEXTS and (isinstance(value, str) or name not in PATHS)
            assert type(caught.value) is (ValueError if value_at_fault else TypeError), (give, value)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("give", SOURCES)
def test_none_is_for_what_may_be_unset(give, name, tmp_path):
    if name in OPTIONAL:
        beside = BESIDE.pop(name, None)
        try:
            assert getattr(give(name, None, tmp_path), name) is None
        finally:
            if beside is not None:
                BESIDE[name] = beside
        return
    with pytest.raises(ValueError if name in TEXTS else TypeError, match=f"^`{name}` is None; expected "):
        give(name, None, tmp_path)


def test_the_text_says_how_to_write_it(tmp_path):
    with pytest.raises(TypeError, match=r"`kd_remap_labels` is 'false'; expected true or false\. Write it without quo"):
        from_json("kd_remap_labels", "false", tmp_path)
    with pytest.raises(TypeError, match=r"`teacher_compile` is 1; expected true or false\. Write true or false"):
        from_json("teacher_compile", 1, tmp_path)
    with pytest.raises(ValueError, match=r"`teacher_cache_dir` is ''; expected a folder.*Leave it out"):
        from_json("teacher_cache_dir", "", tmp_path)
    with pytest.raises(ValueError, match=r"`teacher_cache_dir` is '  '; expected a folder"):
        from_json("teacher_cache_dir", "  ", tmp_path)
    with pytest.raises(ValueError, match=r"`kd_divergence` is \['jsd'\]; expected one of 'forward_kl', .*'jsd'"):
        from_json("kd_divergence", ["jsd"], tmp_path)


def test_the_command_line_gives_the_same_types(tmp_path):
    for word, value in {"true": True, "True": True, "1": True, "false": False, "0": False, "no": False}.items():
        args = parse_args(DistillationArguments, argv=["--kd_remap_labels", word, "--teacher_compile", word])
        assert (args.kd_remap_labels, args.teacher_compile) == (value, value)
    line = ["--kd_alpha", "1", "--kd_temperature", "2", "--teacher_cache_dir", "x", "--teacher_cache_k", "3"]
    args = parse_args(DistillationArguments, argv=line)
    assert (args.kd_alpha, args.kd_temperature, args.teacher_cache_k) == (1, 2, 3)
    for name in PATHS:
        with pytest.raises(ValueError, match=f"`{name}` is ''; expected"):
            parse_args(DistillationArguments, argv=[f"--{name}", ""])
    for value in ("nan", "inf", "-inf", "1e400"):
        with pytest.raises(ValueError, match="`kd_alpha` is"):
            parse_args(DistillationArguments, argv=[f"--kd_alpha={value}"])


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_kind(name, tmp_path):
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2), 0.5):
        found = getattr(from_python(name, value, tmp_path), name)
        assert (found, type(found)) == (0.5, float)
    if name != "kd_beta":
        for value in (1, np.int64(1), np.uint8(1)):
            assert getattr(from_python(name, value, tmp_path), name) == 1
    for value in (math.nan, math.inf, -math.inf, np.float32("nan"), 10**400):
        with pytest.raises(ValueError, match=f"`{name}` is "):
            from_python(name, value, tmp_path)
    for value in (np.bool_(True), torch.tensor(0.5), np.array(0.5), 1j):
        with pytest.raises(TypeError, match=f"`{name}` is "):
            from_python(name, value, tmp_path)


def test_other_kinds_of_booleans_whole_numbers_and_texts(tmp_path):
    for value in (True, np.bool_(True)):
        assert from_python("kd_remap_labels", value, tmp_path).kd_remap_labels is True
    found = from_python("teacher_cache_k", np.int32(3), tmp_path).teacher_cache_k
    assert (found, type(found)) == (3, int)
    for value in (0, -1, np.int64(0)):
        with pytest.raises(ValueError, match=r"`teacher_cache_k` is .*; expected a whole number, at least 1"):
            from_python("teacher_cache_k", value, tmp_path)
    assert type(from_python("kd_divergence", np.str_("jsd"), tmp_path).kd_divergence) is str
    for name in PATHS:
        found = getattr(from_python(name, Path("a") / "b", tmp_path), name)
        assert (found, type(found)) == (str(Path("a") / "b"), str)
    with pytest.raises(ValueError, match="`kd_task` is "):
        from_python("kd_task", Path("classification"), tmp_path)
    with pytest.raises(TypeError, match="`teacher_cache_dir` is b'x'; expected"):
        from_python("teacher_cache_dir", b"x", tmp_path)


# ---- temperatures that are numbers and still too large ----


@pytest.mark.parametrize("name", ["kd_temperature", "kd_temperature_end"])
@pytest.mark.parametrize("value", [1e200, 1e19, 1e-19, 1e-200, 5e-324])
def test_a_temperature_whose_square_is_no_float32_is_refused(name, value, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`{name}` is {re.escape(f'{value:g}')}; expected a number from 1e-18 to 1e\+18, because"
    ):
        from_python(name, value, tmp_path)


@pytest.mark.parametrize("value", [1e200, 1e-200])
def test_the_functions_refuse_it_too(value):
    logits = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"`temperature` is .*; expected a number from 1e-18"):
        SoftTargetLoss(temperature=value)
    with pytest.raises(ValueError, match=r"`temperature` is .*; expected a number from 1e-18"):
        forward_kl(logits, logits, temperature=value)


# ---- objects for from_pretrained ----


def test_objects_in_teacher_model_init_kwargs_are_written_as_json(tmp_path):
    given = {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "dtype": torch.bfloat16,
        "device_map": {"": torch.device("cpu")},
        "cache_dir": Path("somewhere"),
        "max_memory": {0: np.int64(3), "cpu": "1GiB"},
        "ignore": (1, {2}),
        "loader": print,
    }
    args = tiny.arguments(tmp_path, teacher_model_init_kwargs=given)
    assert isinstance(args.teacher_model_init_kwargs["quantization_config"], BitsAndBytesConfig)  # as given
    assert args.teacher_kwargs["dtype"] is torch.bfloat16
    kept = json.loads(args.to_json_string())["teacher_model_init_kwargs"]
    assert kept["quantization_config"]["load_in_8bit"] is True
    assert kept["dtype"] == "bfloat16"
    assert kept["device_map"] == {"": "cpu"}
    assert kept["cache_dir"] == "somewhere"
    assert kept["max_memory"] == {"0": 3, "cpu": "1GiB"}
    assert kept["ignore"] == [1, [2]]
    assert "print" in kept["loader"]
    assert args.to_sanitized_dict()
    assert str(args)
    assert DistillationArguments(teacher_model_init_kwargs=given).to_dict()["teacher_model_init_kwargs"] == kept
    again = DistillationTrainingArguments(**{**args.to_dict(), "teacher_model_init_kwargs": kept})
    assert again.teacher_kwargs == kept


def test_names_in_teacher_model_init_kwargs_are_texts():
    with pytest.raises(TypeError, match=r"`teacher_model_init_kwargs` is \{1: 2\}; expected .*names"):
        DistillationArguments(teacher_model_init_kwargs={1: 2})

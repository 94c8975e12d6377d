"""Bad input through the public surface: each one clear error, in the house's form, naming the argument and the fix."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel, Trainer

from kd_trainer import (
    DistillationArguments,
    DistillationLoss,
    DistillationMixin,
    DistillationTrainer,
    KLDivergenceLoss,
    MLPConfig,
    SoftTargetLoss,
    fit_temperature,
    forward_kl,
    jsd,
    parse_args,
    soft_target_data,
    synthetic_classification,
)
from kd_trainer.data.own_files import load_classification
from kd_trainer.data.tensor_rows import as_tensors, split_labelled
from kd_trainer.training.bases import check_options
from tests.helpers import tiny

FORM = re.compile(r"`(?P<argument>[^`]+)` is .+; expected .+[^.]\. (?P<fix>[A-Z].+[.?])", re.DOTALL)


class Case(NamedTuple):
    """What a user does, and what the message must have."""

    do: Callable
    argument: str
    fix: str  # a part of the fix
    part: str = ""  # a part of the rest
    error: type[Exception] = ValueError


CASES: dict[str, Case] = {}


def case(argument: str, fix: str, part: str = "", error: type[Exception] = ValueError):
    def add(do):
        CASES[do.__name__.replace("_", " ")] = Case(do, argument, fix, part, error)
        return do

    return add


def settings(argument: str, value, fix: str, part: str = "", error: type[Exception] = ValueError, **more):
    CASES[f"{argument}={value!r} {more or ''}".strip()] = Case(
        lambda tmp_path: tiny.arguments(tmp_path, **{argument: value}, **more), argument, fix, part, error
    )


# ---- training arguments ----

settings("kd_alpha", 1.5, "Set `kd_alpha` to a value in that range", r"\[0, 1\]")
settings("kd_alpha", -0.1, "Set `kd_alpha` to a value in that range", r"\[0, 1\]")
settings("kd_alpha", math.nan, "Set `kd_alpha`", r"\[0, 1\]")
settings("kd_alpha", "0.5", "as a number, not as str", error=TypeError)
settings("kd_temperature", 0, "Set `kd_temperature`", "a finite number > 0")
settings("kd_temperature", math.inf, "Set `kd_temperature`", "a finite number > 0")
settings("kd_divergence", "foward_kl", "Did you mean `forward_kl`", "'forward_kl', 'reverse_kl'")
settings("kd_beta", 0.5, "Leave it out, or choose kd_divergence jsd", "'forward_kl', which has no beta")
settings("kd_beta", 1.0, "Set `kd_beta`", r"\(0, 1\)", kd_divergence="jsd")
settings("kd_reduction", "batch_mean", "Did you mean `batchmean`", "'batchmean', 'tokenmean'")
settings("kd_positions", "all", "Set `kd_positions` to one of these", "'labels', 'attended'")
settings("kd_schedule", "step", "Set `kd_schedule` to one of these", "'constant', 'linear', 'cosine'")
settings("kd_schedule", "linear", "Set kd_alpha_end or kd_temperature_end", "'constant' without an end")
settings("kd_alpha_end", 0.1, "Set kd_schedule to linear or cosine")
settings("kd_alpha_end", 2, "Set `kd_alpha_end`", r"\[0, 1\]", kd_schedule="linear")
settings("kd_temperature_end", 0, "Set `kd_temperature_end`", "> 0", kd_schedule="cosine")
settings("kd_task", "clasification", "Did you mean `classification`")
settings("kd_run", "evaluate", "Set `kd_run` to one of these", "'train', 'check'")
settings("kd_check_finite", "always", "Set `kd_check_finite` to one of these", "'step', 'log', 'off'")
settings("teacher_model_init_kwargs", "{dtype: x}", r'Write it as .*"dtype"', r"a JSON value \(")
settings("teacher_model_init_kwargs", [1], 'Write it as {"dtype": "bfloat16"}', "a JSON object", TypeError)
settings("alpha", 0.3, "Rename it", "`kd_alpha`, which weighs the SOFT loss", TypeError)
settings("temperature", 2.0, "Rename it", "`kd_temperature`", TypeError)

# ---- parse_args ----


def parse(tmp_path, text: str, *options: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    return parse_args(DistillationArguments, argv=[str(path), *options])


@case("kd_temprature", "Did you mean `kd_temperature`", "no such key of the JSON file")
def unknown_JSON_key(tmp_path):
    parse(tmp_path, json.dumps({"kd_temprature": 2}))


@case("banana", "Remove it", "no such key of the JSON file")
def JSON_key_like_no_other(tmp_path):
    parse(tmp_path, json.dumps({"banana": 2}))


@case("kd_tempreature", "Did you mean `kd_temperature`", "no such option")
def unknown_option(tmp_path):
    parse(tmp_path, "{}", "--kd_tempreature", "2")


@case("config file", "Check the path", "an existing JSON file", FileNotFoundError)
def missing_JSON_file(tmp_path):
    parse_args(DistillationArguments, argv=[str(tmp_path / "none.json")])


@case("config file", "Fix the file at that line", "valid JSON .*line 2")
def broken_JSON(tmp_path):
    parse(tmp_path, '{"kd_alpha": 0.5,\n"kd_beta" 3}')


@case("alpha", "Rename it", "SOFT loss", TypeError)
def alpha_in_JSON(tmp_path):
    parse(tmp_path, json.dumps({"alpha": 0.5}))


# ---- the constructor ----


def build(tmp_path, student=None, teacher=None, **kwargs):
    args = kwargs.pop("args", None) or tiny.arguments(tmp_path)
    return DistillationTrainer(
        model=tiny.models("classification")[0] if student is None else student, teacher_model=teacher, args=args,
        data_collator=tiny.pad, train_dataset=tiny.rows("classification"), **kwargs,
    )  # fmt: skip


@case("teacher_model", "Pass teacher_model= to the trainer", "a teacher, with kd_alpha 0.7")
def no_teacher(tmp_path):
    build(tmp_path)


@case("teacher_model", "Load the teacher as a model of its own", "the student itself")
def student_is_teacher(tmp_path):
    student = tiny.models("classification")[0]
    build(tmp_path, student, student)


@case("teacher_model", "copy.deepcopy", "shares 1 parameters with the student")
def teacher_shares_a_layer(tmp_path):
    student, teacher = tiny.Plain(), tiny.Plain()
    teacher.linear.weight = student.linear.weight
    build(tmp_path, student, teacher)


@case("teacher_model", "Give both models the same num_labels", "3 classes")
def other_num_labels(tmp_path):
    teacher = BertForSequenceClassification(
        tiny.bert_config(id2label={i: f"class {i}" for i in range(3)}, label2id=None)
    )
    build(tmp_path, teacher=teacher)


@case("teacher_model", "Set kd_remap_labels to true", "class 'class 0' has id 4; expected id 0")
def permuted_labels(tmp_path):
    names = {i: f"class {4 - i}" for i in range(5)}
    teacher = BertForSequenceClassification(tiny.bert_config(id2label=names, label2id={v: k for k, v in names.items()}))
    build(tmp_path, teacher=teacher)


@case("teacher_model", "Check the path for a typing error", "a folder with config.json")
def teacher_path_does_not_exist(tmp_path):
    build(tmp_path, teacher=str(tmp_path / "none"))


@case("teacher_model", "Fine-tune the teacher first", "newly initialised and teach noise: classifier")
def bare_pretrained_body_as_teacher(tmp_path):
    BertModel(tiny.bert_config()).save_pretrained(tmp_path / "body")
    build(tmp_path, teacher=tmp_path / "body")


@case("teacher_model", "save them again as safetensors", "pytorch_model|model.safetensors")
def teacher_saved_as_a_pickle(tmp_path):
    teacher = tiny.models("classification")[1]
    teacher.config.save_pretrained(tmp_path / "teacher")
    torch.save(teacher.state_dict(), tmp_path / "teacher" / "pytorch_model.bin")
    build(tmp_path, teacher=tmp_path / "teacher")


@case("teacher_model", "Load the model first", "of type Tensor", TypeError)
def teacher_of_a_strange_type(tmp_path):
    build(tmp_path, teacher=torch.zeros(2))


@case("teacher_model", "Load the teacher yourself", "no Auto class of transformers has a student of type Plain")
def teacher_path_for_a_plain_student(tmp_path):
    build(tmp_path, tiny.Plain(), str(tmp_path))


@case("teacher_model_name_or_path", "Give the teacher once", "nothing beside the argument teacher_model")
def two_teachers(tmp_path):
    build(
        tmp_path,
        teacher=tiny.models("classification")[1],
        args=tiny.arguments(tmp_path, teacher_model_name_or_path="x"),
    )


@case("teacher_model_init_kwargs", "Leave it out, or give the teacher by path")
def init_kwargs_for_a_module(tmp_path):
    args = tiny.arguments(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    build(tmp_path, teacher=tiny.models("classification")[1], args=args)


@case("kd_hard_loss", "Leave out one of the two", "expected 'auto' with a compute_loss_func")
def compute_loss_func(tmp_path):
    student, teacher = tiny.models("classification")
    args = tiny.arguments(tmp_path, kd_hard_loss="task")
    DistillationTrainer(model=student, teacher_model=teacher, args=args, compute_loss_func=lambda *a, **k: 0)


@case("alpha", "Rename it in the training arguments", "weighs the SOFT loss", TypeError)
def alpha_for_the_trainer(tmp_path):
    build(tmp_path, teacher=tiny.models("classification")[1], alpha=0.5)


@case("n_gpu", "accelerate launch", "not nn.DataParallel")
def several_GPUs_in_one_process(tmp_path):
    args = tiny.arguments(tmp_path)
    assert args.device.type == "cpu"
    args._n_gpu = 2
    build(tmp_path, teacher=tiny.models("classification")[1], args=args)


@case("parallelism_config", "Switch sequence parallelism off", "Ulysses")
def Ulysses(tmp_path):
    from types import SimpleNamespace

    from accelerate import ParallelismConfig

    run = tiny.trainer("plain", tmp_path)
    config = ParallelismConfig(sp_size=2, sp_backend="deepspeed")
    run.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), parallelism_config=config)
    check_options(run.args, "auto", None, run.accelerator)


@case("bases", r"Write class Wrong\(DistillationMixin, Trainer\)", "the teacher never run", TypeError)
def wrong_order_of_bases(tmp_path):
    type("Wrong", (Trainer, DistillationMixin), {})


# ---- the first batch ----


def train(tmp_path, student, teacher, data=None, **kwargs):
    task = "plain" if isinstance(student, tiny.Plain) else "classification"
    run = tiny.trainer(task, tmp_path, pair=(student, teacher), data=data or tiny.rows(task), **kwargs)
    before = tiny.weights(run.model)
    try:
        run.train()
    finally:
        assert torch.equal(tiny.weights(run.model), before), "refused before the first step"


def with_labels(change) -> list[dict]:
    return [{**row, "labels": change(row["labels"])} for row in tiny.rows("plain")]


@case("teacher_model", "Check its weights, its dtype", r"giving NaN or inf on rows \[0, 1, 2")
def teacher_gives_NaN(tmp_path):
    teacher = tiny.Plain()
    nn.init.constant_(teacher.linear.weight, math.nan)
    train(tmp_path, tiny.Plain(), teacher)


@case("teacher_model", "the same classes", r"shape \(8, 7\); expected the student's shape \(8, 5\)")
def plain_teacher_with_other_classes(tmp_path):
    train(tmp_path, tiny.Plain(), tiny.Plain(classes=7))


@case("labels", "an unlabelled row is -100, not -1", "5 at position 3 of the batch; expected 0 to 4")
def label_id_too_large(tmp_path):
    data = tiny.rows("classification")
    data[3]["labels"] = 5
    train(tmp_path, *tiny.models("classification"), data)


@case("labels", "an unlabelled row is -100, not -1", "-1 at position 0 of the batch; expected 0 to 4")
def label_minus_one(tmp_path):
    train(tmp_path, tiny.Plain(), tiny.Plain(), with_labels(lambda label: -1))


@case("labels", "Cast the column to int64", "of dtype torch.float32", TypeError)
def float_labels(tmp_path):
    train(tmp_path, tiny.Plain(), tiny.Plain(), with_labels(float))


@case("labels", "Check the label column", r"of shape \(16,\); expected \(8,\)")
def two_labels_a_row(tmp_path):
    train(tmp_path, tiny.Plain(), tiny.Plain(), with_labels(lambda label: torch.tensor([label, label])))


@case("inputs", "Rename the column 'label'", "the labels would be ignored")
def labels_under_another_name(tmp_path):
    data = [{"features": row["features"], "label": row["labels"]} for row in tiny.rows("plain")]
    train(tmp_path, tiny.Plain(), tiny.Plain(), data)


@case("inputs", "Let the data collator return a dict", "a batch of type tuple", TypeError)
def batches_of_tuples(tmp_path):
    run = tiny.trainer("plain", tmp_path)
    run.data_collator = lambda rows: tuple(torch.stack([row["features"] for row in rows]))
    run.train()


@case("teacher_model", "Wrap the model", "returns a mapping with the keys last_hidden_state, pooler_output", TypeError)
def teacher_without_a_head(tmp_path):
    student, _ = tiny.models("classification")
    train(tmp_path, student, BertModel(tiny.bert_config()))


@case("teacher_model", "Wrap the model", "start_logits, end_logits", TypeError)
def question_answering(tmp_path):
    two = {"id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}
    student, teacher = (
        build(tiny.bert_config(**two)) for build in (BertForSequenceClassification, BertForQuestionAnswering)
    )
    train(tmp_path, student, teacher)


@case("kd_task", "Leave it out, or change problem_type", "'regression', as the student's config says")
def another_task_than_the_config(tmp_path):
    pair = [BertForSequenceClassification(tiny.bert_config(problem_type="regression")) for _ in range(2)]
    train(tmp_path, *pair, kd_task="classification")


@case("problem_type", "Fix the student's config", "'ranking'; expected one of single_label_classification")
def a_kind_of_labels_that_nobody_knows(tmp_path):
    config = tiny.bert_config()
    config.__dict__["problem_type"] = "ranking"
    pair = [BertForSequenceClassification(config) for _ in range(2)]
    train(tmp_path, *pair)


@case("num_labels", "Set num_labels, or problem_type to regression", "2 classes or more, or regression")
def a_softmax_of_one_class(tmp_path):
    pair = tiny.models("regression")
    train(tmp_path, *pair, kd_task="classification")


@case("kd_divergence", "Leave it out", "'jsd'; expected 'forward_kl' .*because its soft loss is squared error")
def a_divergence_between_numbers(tmp_path):
    tiny.trainer("regression", tmp_path, kd_divergence="jsd").train()


@case(
    "kd_standardize_logits",
    "Leave it out",
    "True; expected False for the task 'regression', whose outputs are no logits",
)
def standardised_regression(tmp_path):
    tiny.trainer("regression", tmp_path, kd_standardize_logits=True).train()


@case("label_smoothing_factor", "Leave it out", "0.1; expected 0 for the task 'question_answering'")
def smoothing_where_there_are_no_classes(tmp_path):
    tiny.trainer("question_answering", tmp_path, label_smoothing_factor=0.1).train()


@case("labels", "Fill the row or mask all of it", "a row with -100 beside other values")
def half_a_row_of_labels(tmp_path):
    data = tiny.rows("multi_label_classification")
    data[3]["labels"][1] = -100.0
    tiny.trainer("multi_label_classification", tmp_path, data=data).train()


@case("end_positions", "Correct the column", "-1 in row 3 of the batch; expected a position from 0 on, or -100")
def an_answer_before_the_text(tmp_path):
    data = tiny.rows("question_answering")
    data[3]["end_positions"] = -1
    tiny.trainer("question_answering", tmp_path, data=data).train()


@case("teacher_input_ids", "the student's tokenizer", "expected no tokens of the teacher's own")
def tokens_of_another_tokenizer_for_every_position(tmp_path):
    data = tiny.rows("token_classification")
    data = [row | {"teacher_" + k: row[k] for k in ("input_ids", "attention_mask")} for row in data]
    tiny.trainer("token_classification", tmp_path, data=data).train()


@case("pixel_values", "in the column teacher_pixel_values", "images of 8 x 8; expected 16 x 16 for the teacher")
def images_of_the_students_size(tmp_path):
    student, teacher = (tiny.vit(image_size=size) for size in (8, 16))
    data = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0} for _ in range(8)]
    DistillationTrainer(student, tiny.arguments(tmp_path), teacher_model=teacher, train_dataset=data).train()


@case("model", "Set kd_task to the task", r"giving logits of shape \(8, 5\); expected 3 dimensions")
def kd_task_that_the_model_has_not(tmp_path):
    run = tiny.trainer("classification", tmp_path, kd_task="token_classification")
    run.compute_loss(run.model, {k: v for k, v in tiny.pad(tiny.rows("classification")[:8]).items() if k != "labels"})


@case("teacher_model", "Else take a teacher with the student's tokenizer", "vocab_size 20; expected at least 37")
def teacher_with_fewer_tokens(tmp_path):
    train(tmp_path, tiny.models("classification")[0], BertForSequenceClassification(tiny.bert_config(vocab_size=20)))


@case("kd_reduction", "Set kd_reduction to tokenmean", "rows of a packed batch are no longer sequences")
def packed_batch_with_batchmean(tmp_path):
    data = [{"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1], "labels": [1, 2, 3, 4]} for _ in range(8)]
    tiny.trainer("causal_lm", tmp_path, data=data).train()


@case("teacher_attention_mask", "Keep the attention_mask of the teacher's tokenizer", "beside teacher_input_ids")
def own_tokens_without_a_mask(tmp_path):
    data = [{**row, "teacher_input_ids": row["input_ids"]} for row in tiny.rows("classification")]
    train(tmp_path, *tiny.models("classification"), data)


@case("num_items_in_batch", "pass num_items_in_batch=None", "the Counts of get_batch_samples, or None", TypeError)
def a_number_of_items_from_elsewhere(tmp_path):
    run = tiny.trainer("plain", tmp_path)
    run.compute_loss(run.model, tiny.pad(tiny.rows("plain")[:8]), num_items_in_batch=8)


@case("loss", "Lower the learning rate", "not finite at step 2, process 0: 8 rows of the student's", RuntimeError)
def a_student_that_diverges(tmp_path):
    run = tiny.trainer("plain", tmp_path, learning_rate=1e30, kd_alpha=0.0, kd_check_finite="step", max_steps=50)
    calls = []

    def break_it(module, args):
        calls.append(1)
        if len(calls) == 3:
            nn.init.constant_(module.linear.weight, math.inf)

    run.model.register_forward_pre_hook(break_it)
    run.train()


# ---- losses ----

Z = torch.zeros(2, 3)


@case("temperature", "Set `temperature`", "> 0")
def loss_at_temperature_zero(tmp_path):
    SoftTargetLoss(temperature=0)


@case("divergence", "Did you mean `reverse_kl`")
def loss_with_an_unknown_divergence(tmp_path):
    SoftTargetLoss(divergence="revers_kl")


@case("beta", "Leave `beta` out, or choose one of 'jsd'", "None with divergence 'forward_kl'")
def beta_for_forward_kl(tmp_path):
    SoftTargetLoss(divergence="forward_kl", beta=0.5)


@case("beta", "Set `beta`", r"\(0, 1\)")
def beta_at_the_end(tmp_path):
    jsd(Z, Z, beta=1.0)


@case("reduction", "Did you mean `batchmean`")
def loss_with_an_unknown_reduction(tmp_path):
    SoftTargetLoss(reduction="batch_mean")


@case("student_logits", "Give both sides the same positions", r"\[2, 3\] and `teacher_logits` of shape \[2, 4\]")
def logits_of_two_shapes(tmp_path):
    forward_kl(Z, torch.zeros(2, 4))


@case("student_logits", "Pass the scores before the softmax", "of dtype torch.int64", TypeError)
def integer_logits(tmp_path):
    forward_kl(Z.long(), Z.long())


@case("student_logits", r"unsqueeze\(0\)", "at least")
def logits_without_a_batch(tmp_path):
    SoftTargetLoss()(Z[0], Z[0])


@case("mask", "the logits' shape without the last dimension", "one entry per position")
def mask_of_another_shape(tmp_path):
    SoftTargetLoss()(Z, Z, mask=torch.ones(3))


@case("labels", r"Call `\.long\(\)`", "integer class ids", TypeError)
def float_labels_for_a_loss(tmp_path):
    DistillationLoss()(Z, Z, torch.zeros(2))


@case("alpha", "Set `alpha`", r"\[0, 1\]")
def alpha_out_of_range(tmp_path):
    DistillationLoss(alpha=2)


@case("target_probs", "Apply a softmax to logits", "row 1 sums to 1.1")
def probabilities_that_do_not_sum_to_one(tmp_path):
    KLDivergenceLoss()(torch.tensor([[0.5, 0.5], [0.5, 0.6]]), torch.full((2, 2), 0.5))


@case("epsilon", "Set `epsilon`", ">= 0")
def negative_epsilon(tmp_path):
    KLDivergenceLoss(epsilon=-1)


@case("labels", "Mark what has no label with -100", r"class ids in \[0, 2\]")
def labels_out_of_range_for_a_temperature(tmp_path):
    fit_temperature(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))


# ---- data and models ----


@case("num_train", "Set `num_train`", ">= 1")
def no_rows(tmp_path):
    synthetic_classification(num_train=0)


@case("label_noise", "Set `label_noise`", r"\[0, 1\]")
def label_noise_out_of_range(tmp_path):
    synthetic_classification(num_train=5, label_noise=1.5)


@case("num_classes", "Set `num_classes`", ">= 2")
def one_class(tmp_path):
    soft_target_data(num_classes=1)


@case("num_labelled", "Give a smaller number", "at most 20")
def more_labelled_rows_than_there_are(tmp_path):
    split_labelled(synthetic_classification(num_train=20, num_features=3)["train"], 21)


@case("dataset", "Pick one split of a DatasetDict", "a datasets.Dataset", TypeError)
def a_dict_of_splits_as_rows(tmp_path):
    as_tensors(synthetic_classification(num_train=20, num_features=3))


@case("train_file", "Check the path", "an existing file", FileNotFoundError)
def missing_data_file(tmp_path):
    load_classification(train_file=str(tmp_path / "none.csv"))


def csv(tmp_path, text: str) -> str:
    (tmp_path / "rows.csv").write_text(text)
    return str(tmp_path / "rows.csv")


@case("train_file", "Renumber the classes", "with the label 7 in row 1; expected labels from 0 to 2")
def label_in_a_file_out_of_range(tmp_path):
    load_classification(train_file=csv(tmp_path, "label,a,b\n0,1.5,2\n7,3,4\n"), num_features=2, num_classes=3)


@case("train_file", "Rename the column of class ids", "one column `labels` or `label`")
def no_label_column(tmp_path):
    load_classification(train_file=csv(tmp_path, "y,a,b\n0,1.5,2\n"), num_features=2, num_classes=3)


@case("dataset_name", "Give `train_file` or `dataset_name`")
def neither_file_nor_name(tmp_path):
    load_classification()


@case("hidden_sizes[0]", r"Set `hidden_sizes\[0\]`", ">= 1")
def a_layer_of_size_zero(tmp_path):
    MLPConfig(hidden_sizes=[0])


# ---- the test ----


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name, tmp_path):
    wanted = CASES[name]
    with pytest.raises(wanted.error) as caught:
        wanted.do(tmp_path)
    text = str(caught.value)
    assert type(caught.value) is wanted.error, text
    found = FORM.fullmatch(text)
    assert found, f"not in the house's form: {text}"
    assert found["argument"] == wanted.argument, text
    assert re.search(wanted.fix, found["fix"], re.DOTALL), text
    assert re.search(wanted.part, text, re.DOTALL), text


def test_there_are_enough_of_them():
    assert len(CASES) >= 30


def test_good_input_is_not_refused(tmp_path):
    """The same calls with nothing wrong in them."""
    tiny.arguments(tmp_path, kd_alpha=0.5, kd_divergence="jsd", kd_beta=0.5, kd_schedule="linear", kd_alpha_end=0.1)
    student, teacher = tiny.models("classification")
    build(tmp_path, student, copy.deepcopy(teacher)).train()
    SoftTargetLoss(divergence="jsd", beta=0.5)(Z, Z, mask=torch.ones(2))
    load_classification(train_file=csv(tmp_path, "label,a,b\n0,1.5,2\n2,3,4\n"), num_features=2, num_classes=3)

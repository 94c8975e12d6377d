"""Labels that no loss can be taken of: named before the first step, and in later batches by the finite check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.training.logs import FiniteWatch
from tests.helpers import tiny

IGNORED = -100
MULTI, NUMBERS = "multi_label_classification", "regression"


def changed(task: str, row: int, change, data=None) -> list[dict]:
    data = tiny.rows(task) if data is None else data
    data[row] = change(dict(data[row]))
    return data


def with_labels(labels):
    return lambda row: {**row, "labels": labels}


# ---- the first batch ----


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([7.0, 0.0, 1.0, 0.0, 0.0], "7 in row 3"),
        ([0.0, 1.0, -1.0, 0.0, 0.0], "-1 in row 3"),
        ([0.0, 1.0, math.nan, 0.0, 0.0], "nan in row 3"),
        ([0.0, 1.0, math.inf, 0.0, 0.0], "inf in row 3"),
        ([0.0, 1.0, IGNORED, 0.0, 0.0], "a row with -100 beside other values"),
        ([1.01, 1.0, 0.0, 0.0, 0.0], "1.01 in row 3"),
        ([IGNORED, IGNORED, IGNORED, IGNORED, 7.0], "7 in row 3"),
    ],
)
@pytest.mark.parametrize("kd_alpha", [0.0, 0.7, 1.0])
def test_odd_values_of_several_labels_are_named(labels, shown, kd_alpha, tmp_path):
    run = tiny.trainer(MULTI, tmp_path, data=changed(MULTI, 3, with_labels(labels)), kd_alpha=kd_alpha)
    before = tiny.weights(run.model)
    with pytest.raises(ValueError, match=rf"`labels` is {shown}.*; expected 0 to 1 for each label, or rows of -100"):
        run.train()
    assert torch.equal(tiny.weights(run.model), before)


@pytest.mark.parametrize(
    "labels", [[0.3, 1.0, 0.0, 0.9, 0.5], [1.00001, -0.00001, 0.0, 1.0, 0.0], [float(IGNORED)] * 5]
)
def test_probabilities_and_whole_rows_without_labels_train(labels, tmp_path):
    run = tiny.trainer(MULTI, tmp_path, data=changed(MULTI, 3, with_labels(labels)), max_steps=2)
    run.train()
    assert all(math.isfinite(value) for value in tiny.logged(run, "hard_loss"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float16, torch.float64])
def test_several_labels_of_every_dtype(dtype, tmp_path):
    rows = [{**row, "labels": torch.tensor(row["labels"]).to(dtype)} for row in tiny.rows(MULTI)]
    runs = [tiny.trainer(MULTI, tmp_path, data=data, max_steps=2) for data in (rows, None)]
    for run in runs:
        run.train()
    assert tiny.logs(runs[0])["hard_loss"] == pytest.approx(tiny.logs(runs[1])["hard_loss"], rel=1e-6)


@pytest.mark.parametrize(("value", "shown"), [(math.inf, "infinite in row 3"), (-math.inf, "infinite in row 3")])
def test_infinite_numbers_are_named(value, shown, tmp_path):
    run = tiny.trainer(NUMBERS, tmp_path, data=changed(NUMBERS, 3, with_labels(value)))
    with pytest.raises(ValueError, match=rf"`labels` is {shown} of the batch; expected finite numbers, or rows of NaN"):
        run.train()


def test_numbers_of_which_some_are_unknown():
    task, logits = TASKS[NUMBERS], torch.randn(3, 2)
    targets = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [1.0, math.nan]])
    with pytest.raises(ValueError, match="`labels` is NaN beside other values in row 2"):
        task.hard_loss_sum(logits, targets)
    assert task.hard_loss_sum(logits[:2], targets[:2]).isfinite()
    assert task.wrong(targets, None).tolist() == [False, False, True]


@pytest.mark.parametrize("value", [float("nan"), -100.0, 1e3, 3])
def test_numbers_that_are_labels_or_none_train(value, tmp_path):
    run = tiny.trainer(NUMBERS, tmp_path, data=changed(NUMBERS, 3, with_labels(value)), max_steps=1)
    run.train()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1, "-1 at position 3 of the batch; expected 0 to 4"), (5, "5 at position 3 of the batch; expected 0 to 4")],
)
@pytest.mark.parametrize("task", ["classification", "plain"])
def test_class_ids_outside_the_logits(task, value, shown, tmp_path):
    with pytest.raises(ValueError, match=rf"`labels` is {shown} \(the logits have 5 classes\), or -100"):
        tiny.trainer(task, tmp_path, data=changed(task, 3, with_labels(value))).train()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_class_ids_of_every_dtype(dtype, tmp_path):
    data = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("classification")]
    typed = [{**row, "labels": torch.tensor(row["labels"]).to(dtype)} for row in data]
    runs = [tiny.trainer("classification", tmp_path, data=rows, max_steps=2) for rows in (typed, data)]
    for run in runs:
        run.train()
    assert tiny.logs(runs[0]) == tiny.logs(runs[1])


def test_a_class_156_of_uint8_is_a_class(tmp_path):
    """-100 is 156 in a byte."""
    task, logits = TASKS["classification"], torch.randn(2, 200)
    targets = task.targets({"labels": torch.tensor([156, 3], dtype=torch.uint8)})
    expected = nn.functional.cross_entropy(logits, torch.tensor([156, 3]), reduction="sum")
    assert task.hard_loss_sum(logits, targets).item() == pytest.approx(expected.item())
    assert int(task.labelled(targets)) == 2
    shifted = TASKS["causal_lm"].targets({"labels": torch.tensor([[1, 2, 3]], dtype=torch.uint8)})
    assert shifted.tolist() == [[2, 3, IGNORED]]


@pytest.mark.parametrize("name", ["start_positions", "end_positions"])
def test_positions_of_answers(name, tmp_path):
    task = "question_answering"
    data = changed(task, 3, lambda row: {**row, name: -1})
    with pytest.raises(ValueError, match=rf"`{name}` is -1 in row 3 of the batch; expected a position from 0 on"):
        tiny.trainer(task, tmp_path, data=data).train()
    data = [{**row, name: float(row[name])} for row in tiny.rows(task)]
    with pytest.raises(TypeError, match=rf"`{name}` is of dtype torch.float32; expected integer positions"):
        tiny.trainer(task, tmp_path, data=data).train()
    for value in (IGNORED, 400):  # no label, as upstream has it
        tiny.trainer(task, tmp_path, data=changed(task, 3, lambda row, v=value: {**row, name: v}), max_steps=1).train()


def test_a_label_in_the_padding_of_a_vocabulary_is_a_class(tmp_path):
    data = tiny.rows("causal_lm")
    for row in data:
        row["labels"][-1] = tiny.VOCAB - 1
    tiny.trainer("causal_lm", tmp_path, data=data, max_steps=1).train()
    data[3]["labels"][-1] = tiny.VOCAB
    with pytest.raises(ValueError, match=rf"`labels` is {tiny.VOCAB} at .*expected 0 to {tiny.VOCAB - 1}"):
        tiny.trainer("causal_lm", tmp_path, data=data, max_steps=1).train()


@pytest.mark.parametrize("task", [MULTI, NUMBERS, "question_answering", "classification"])
def test_check_names_them_in_the_row_of_the_labels(task, tmp_path):
    change = {
        MULTI: with_labels([7.0] * 5),
        NUMBERS: with_labels(math.inf),
        "question_answering": lambda row: {**row, "start_positions": -2},
        "classification": with_labels(9),
    }[task]
    run = tiny.trainer(task, tmp_path, data=changed(task, 3, change), kd_run="check")
    errors = [row for row in run.check(evaluate=False) if row.status == "error"]
    assert [row.what for row in errors] == ["labels"]


# ---- later batches ----


LATER = {
    MULTI: (with_labels([7.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([[0.0, 1.0], [7.0, 0.0], [1.0, IGNORED]])),
    NUMBERS: (with_labels(math.inf), torch.tensor([[0.0], [math.inf], [math.inf]])),
}


@pytest.mark.parametrize("task", LATER)
def test_a_later_batch_is_named_too(task, tmp_path):
    run = tiny.trainer(task, tmp_path, data=changed(task, 19, LATER[task][0]), max_steps=4)
    with pytest.raises(ValueError, match=r"`labels` is .* in row 3 of the batch"):
        run.train()


@pytest.mark.parametrize("task", LATER)
@pytest.mark.parametrize("mode", ["step", "log"])
def test_where_nothing_looks_the_row_is_nan_and_the_finite_check_names_labels(task, mode, monkeypatch):
    task, targets = TASKS[task], LATER[task][1]
    logits = torch.zeros(targets.shape, requires_grad=True)
    monkeypatch.setattr(type(task), "check_labels", lambda *_: None)  # as on an accelerator, where looking waits
    loss = task.hard_loss_sum(logits, targets)
    assert loss.isnan()
    loss.backward()
    assert logits.grad[0].isfinite().all()
    watch = FiniteWatch(mode, 0)

    def see():
        watch.see(loss, logits, None, 3, fault=lambda: task.fault({"labels": targets}, targets.shape[-1]))
        watch.raise_noted()

    with pytest.raises(RuntimeError, match=r"`labels` is another number in rows \[1.* of the batch; expected .*Corr"):
        see()


class OnAnotherDevice(torch.Tensor):
    """Labels that say they are not on the CPU."""

    @property
    def device(self):
        return torch.device("cuda")


def test_a_class_id_out_of_range_is_nan_where_looking_would_wait():
    task, logits = TASKS["classification"], torch.randn(3, 5, requires_grad=True)
    targets = torch.tensor([1, 5, IGNORED])
    with pytest.raises(ValueError, match="`labels` is 5 at position 1"):
        task.hard_loss_sum(logits, targets)
    total = task.hard_loss_sum(logits, targets.as_subclass(OnAnotherDevice))
    assert total.isnan()
    right = task.hard_loss_sum(logits, torch.tensor([1, 4, IGNORED]).as_subclass(OnAnotherDevice))
    assert right.item() == pytest.approx(task.hard_loss_sum(logits, torch.tensor([1, 4, IGNORED])).item())


# ---- the logits decide, not the config ----


class OwnConfig(PreTrainedConfig):
    model_type = "own_count"
    n_classes: int = 5


class OwnCount(PreTrainedModel):
    """Counts its classes in `n_classes`; upstream's `num_labels` stays at its default of 2."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(6, config.n_classes)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, features, labels=None):
        logits = self.linear(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_logits_decide_how_many_classes_there_are(count, tmp_path):
    pair = tuple(OwnCount(OwnConfig(n_classes=5, num_labels=count)) for _ in range(2))
    run = tiny.trainer("plain", tmp_path, pair=pair, max_steps=2, kd_task="classification")
    assert not [row for row in run.check() if row.status == "error"]
    run.train()
    assert len(tiny.logged(run, "hard_loss")) == 2
    data = changed("plain", 3, with_labels(5))
    run = tiny.trainer("plain", tmp_path, pair=pair, data=data, kd_task="classification")
    with pytest.raises(ValueError, match=r"expected 0 to 4 \(the logits have 5 classes\)"):
        run.train()
    (row,) = [row for row in run.check() if row.status == "error"]
    assert "expected 0 to 4 (the logits have 5 classes)" in row.found


def test_one_label_in_the_config_is_no_softmax_of_one_class(tmp_path):
    pair = tuple(OwnCount(OwnConfig(n_classes=5, num_labels=1)) for _ in range(2))
    tiny.trainer("plain", tmp_path, pair=pair, max_steps=1, kd_task="classification").train()
    pair = tuple(OwnCount(OwnConfig(n_classes=1)) for _ in range(2))
    with pytest.raises(ValueError, match="`num_labels` is 1; expected 2 classes or more, or regression"):
        tiny.trainer("plain", tmp_path, pair=pair, max_steps=1, kd_task="classification").train()


def test_a_vocabulary_that_only_the_config_counts_refuses_nothing(tmp_path):
    class Reads(OwnCount):
        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Embedding(50, config.n_classes)

        def get_input_embeddings(self):
            raise NotImplementedError

        def forward(self, input_ids):
            return SequenceClassifierOutput(logits=self.linear(input_ids).mean(1))

    configs = [OwnConfig(vocab_size=size) for size in (40, 3)]
    data = [{"input_ids": torch.tensor([7, 41 + i % 5]), "labels": i % 5} for i in range(16)]
    run = DistillationTrainer(
        model=Reads(configs[0]), teacher_model=Reads(configs[1]), train_dataset=data, data_collator=tiny.pad,
        args=tiny.arguments(tmp_path, max_steps=1, kd_task="classification"),
    )  # fmt: skip
    assert not [row for row in run.check() if row.status == "error"]
    run.train()


def test_a_classifier_whose_head_was_replaced(tmp_path):
    student, teacher = (BertForSequenceClassification(tiny.bert_config(id2label={0: "a", 1: "b"})) for _ in range(2))
    for model in (student, teacher):
        model.classifier = nn.Linear(16, 5)
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), max_steps=1)
    run.train()
    assert len(tiny.logged(run, "hard_loss")) == 1


class IgnoresMinusOne(BertForSequenceClassification):
    """Its own loss ignores another value."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, ignore_index=-1)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_loss_of_the_models_own_may_read_other_labels(tmp_path):
    data = changed("classification", 3, with_labels(-1))
    torch.manual_seed(0)
    pair = tuple(IgnoresMinusOne(tiny.bert_config()) for _ in range(2))
    batch = tiny.pad(data[:8])
    with torch.no_grad():
        expected = float(pair[0](**batch).loss)
    with pytest.raises(ValueError, match="`labels` is -1 at position 3"):
        tiny.trainer("classification", tmp_path, data=data, pair=pair).train()
    run = tiny.trainer("classification", tmp_path, data=data, pair=pair, kd_hard_loss="model", max_steps=1)
    run.train()
    assert tiny.logged(run, "hard_loss")[0] == pytest.approx(expected, rel=1e-5)

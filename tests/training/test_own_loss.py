"""The hard loss is the model's own: `kd_alpha=0` is the stock Trainer for models that compute a loss of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from kd_trainer import DistillationTrainer
from tests.helpers import tiny


class Weighted(BertForSequenceClassification):
    """Class weights."""

    def own(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=torch.tensor([20.0, 1.0, 1.0, 1.0, 1.0]))

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, token_type_ids)
        loss = None if labels is None else self.own(outputs.logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=outputs.logits)


class Focal(Weighted):
    """Focal loss."""

    def own(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class Penalised(Weighted):
    """A penalty on the logits, in training alone."""

    def own(self, logits, labels):
        penalty = 0.1 * logits.square().mean() if self.training else 0.0
        return F.cross_entropy(logits, labels) + penalty


class Plain(Weighted):
    """The task's formula, written out once more."""

    def own(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Summed(Weighted):
    """A sum where the formula is a mean."""

    def own(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum")


class TwoTasks(BertForSequenceClassification):
    """Two heads and two columns of labels."""

    def __init__(self, config):
        super().__init__(config)
        self.topic = nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids=None, attention_mask=None, labels=None, topic_labels=None):
        hidden = self.bert(input_ids, attention_mask).pooler_output
        logits, loss = self.classifier(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits, labels) + F.cross_entropy(self.topic(hidden), topic_labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class RowWeights(BertForSequenceClassification):
    """A weight for each row, in a column."""

    def forward(self, input_ids=None, attention_mask=None, weights=None, labels=None):
        logits = super().forward(input_ids, attention_mask).logits
        if labels is None:
            return {"logits": logits}
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": (losses * weights).mean(), "logits": logits}


class Huber(BertForSequenceClassification):
    """A regression."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids, attention_mask).logits
        loss = None if labels is None else F.huber_loss(logits.squeeze(-1), labels, delta=0.3)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Rare(BertForSequenceClassification):
    """Several labels, of which the positive ones weigh more."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits, loss = super().forward(input_ids, attention_mask).logits, None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.full((tiny.CLASSES,), 3.0))
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TwiceTheSpan(BertForQuestionAnswering):
    """By its name upstream does not see that start_positions are labels."""

    def forward(self, input_ids=None, attention_mask=None, start_positions=None, end_positions=None):
        ends = {"start_positions": start_positions, "end_positions": end_positions}
        outputs = super().forward(input_ids, attention_mask, **ends)
        if outputs.loss is not None:
            outputs.loss = 2 * outputs.loss
        return outputs


class WeightedTags(BertForTokenClassification):
    """Class weights of a token classification; a dict without a class."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids, attention_mask).logits
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0]))
        return {"loss": loss, "logits": logits}


class Unshifted(LlamaForCausalLM):
    """A causal model whose labels are shifted already."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
        return outputs


class ByItems(LlamaForCausalLM):
    """A loss of its own that divides by upstream's num_items_in_batch."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            logits, targets = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)
            outputs.loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return outputs


class TupleOut(nn.Module):
    """A module without a config: (loss, logits), the margin loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, tiny.CLASSES)

    def forward(self, features, labels=None):
        logits = self.linear(features)
        return logits if labels is None else (F.multi_margin_loss(logits, labels), logits)


class Noisy(nn.Module):
    """A training forward that draws numbers and changes buffers; twice the usual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, tiny.CLASSES)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)

    def forward(self, features, labels=None):
        logits = self.linear(self.drop(self.norm(features)))
        return {"logits": logits} if labels is None else {"loss": 2 * F.cross_entropy(logits, labels), "logits": logits}


def bart_lm(hidden: int = 16) -> BartForCausalLM:
    config = BartConfig(
        vocab_size=tiny.VOCAB, d_model=hidden, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=32, dropout=0.0, init_std=0.5, pad_token_id=0, is_decoder=True,
        is_encoder_decoder=False,
    )  # fmt: skip
    model = BartForCausalLM(config)
    model.config.bos_token_id = model.config.eos_token_id = None  # the special ids of the tiny vocabulary
    return model


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=tiny.VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(cls: type, **config: Any) -> Any:
    return lambda: cls(tiny.bert_config(initializer_range=0.5, **config))


def names(*classes: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


# name -> (builder, task of the rows, whether the model's own loss has to be taken)
MODELS: dict[str, tuple[Any, str, bool]] = {
    "weighted": (bert(Weighted), "classification", True),
    "focal": (bert(Focal), "classification", True),
    "penalised": (bert(Penalised), "classification", True),
    "plain": (bert(Plain), "classification", False),
    "weighted tags": (bert(WeightedTags), "token_classification", True),
    "unshifted": (lambda: Unshifted(tiny.llama_config()), "causal_lm", False),
    "gpt2": (gpt2, "causal_lm", False),
    "bart": (bart_lm, "causal_lm", False),
    "translator": (lambda: Translator(), "causal_lm", False),
    "by items": (lambda: ByItems(tiny.llama_config()), "causal_lm", True),
    "tuple": (TupleOut, "plain", True),
    "batch norm and dropout": (Noisy, "plain", True),
}


# The same, one kind of label or loss each: tried without accumulation alone.
KINDS: dict[str, tuple[Any, str, bool]] = {
    "sum": (bert(Summed), "classification", True),
    "two tasks": (bert(TwoTasks), "classification", True),
    "row weights": (bert(RowWeights), "classification", True),
    "huber": (bert(Huber, **names("score")), "regression", True),
    "rare": (bert(Rare, problem_type="multi_label_classification"), "multi_label_classification", True),
    "spans": (bert(TwiceTheSpan, **names("start", "end")), "question_answering", True),
}
MODELS |= KINDS


def data_of(name: str, count: int = 24) -> list[dict[str, Any]]:
    rows = tiny.rows(MODELS[name][1], count)
    if name == "two tasks":
        return [row | {"topic_labels": i % 3} for i, row in enumerate(rows)]
    return [row | {"weights": float(i % 3)} for i, row in enumerate(rows)] if name == "row weights" else rows


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def run(name: str, folder: Any, *, stock: bool = False, teacher: Any = None, data: Any = None, batch: int = 4,
        train: bool = True, loss_func: Any = None, **fields: Any) -> Any:  # fmt: skip
    """A trainer of the model after three steps: the stock one, or the one that distils."""
    data = data_of(name) if data is None else data
    fields = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "max_steps": 3, **fields}
    given: dict[str, Any] = {
        "model": built(name), "train_dataset": data, "eval_dataset": data, "data_collator": tiny.pad,
        "compute_loss_func": loss_func,
    }  # fmt: skip
    torch.manual_seed(1)
    if stock:
        trainer: Any = Trainer(args=tiny.stock_arguments(folder, **fields), **given)
    else:
        args = tiny.arguments(folder, **{"kd_alpha": 0.0, "kd_reduction": "tokenmean", **fields})
        trainer = DistillationTrainer(args=args, teacher_model=teacher, **given)
    if train:
        trainer.train()
    return trainer


def assert_same(distilled: Any, stock: Any) -> None:
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(stock.model), rtol=1e-5, atol=1e-6)
    assert tiny.logged(distilled, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "accumulate"), [(name, n) for name in MODELS for n in ((1,) if name in KINDS else (1, 2))]
)
def test_kd_alpha_0_is_the_stock_trainer(name, accumulate, tmp_path, capsys):
    if (name, accumulate) == ("bart", 2):
        accumulate = 1  # upstream adds its micro-batches up: the model takes num_items_in_batch and ignores it
    fields: dict[str, Any] = {"gradient_accumulation_steps": accumulate}
    if name == "translator":
        fields["kd_task"] = "token_classification"
    data = None
    if accumulate > 1 and not MODELS[name][2]:  # the formula divides by all labels of the step: equal micro-batches
        data = [row for row in tiny.rows(MODELS[name][1], 600) if len(row.get("input_ids", [0] * 9)) == 9][:24]
        assert len(data) == 24
        for row in data:
            if MODELS[name][1] == "causal_lm":
                row["labels"] = list(row["input_ids"])
    stock = run(name, tmp_path / "stock", stock=True, data=data, gradient_accumulation_steps=accumulate)
    distilled = run(name, tmp_path / "distilled", data=data, **fields)
    assert_same(distilled, stock)
    if name != "spans":  # upstream evaluates it without a loss
        assert distilled.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    assert distilled._plan.own_loss is MODELS[name][2]
    line = next(line for line in capsys.readouterr().out.splitlines() if "hard loss: " in line)
    assert ("the model's own" in line) is MODELS[name][2]


@pytest.mark.parametrize("name", ["weighted", "tuple", "unshifted", "by items", "penalised"])
def test_an_evaluation_that_comes_first_is_the_stock_trainers(name, tmp_path):
    distilled, stock = (run(name, tmp_path, stock=stock, train=False) for stock in (False, True))
    assert distilled.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    distilled.train()
    stock.train()
    assert_same(distilled, stock)


def test_a_first_batch_that_hides_the_difference_does_not_mislead(tmp_path):
    data = tiny.rows("classification", 24)
    for row in data[:8]:
        row["labels"] = 3  # of one class alone, weights change nothing
    distilled, stock = (run("weighted", tmp_path, stock=stock, data=data, max_steps=6) for stock in (False, True))
    assert_same(distilled, stock)
    single = [run("weighted", tmp_path, stock=stock, data=data, batch=1) for stock in (False, True)]
    assert_same(*single)
    assert single[0]._plan.own_loss


def test_the_parts_weigh_the_models_own_loss(tmp_path):
    teacher = tiny.models("classification", seed=5)[1]
    trainer = run("weighted", tmp_path, teacher=teacher, kd_alpha=0.3)
    assert trainer._plan.own_loss
    for loss, soft, hard in zip(
        *(tiny.logged(trainer, key) for key in ("loss", "soft_loss", "hard_loss")), strict=True
    ):
        assert loss == pytest.approx(0.3 * soft + 0.7 * hard, rel=1e-5)
    batch = tiny.pad(tiny.rows("classification", 4))
    model = built("weighted").train()
    assert tiny.logged(trainer, "hard_loss")[0] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_the_choice_can_be_made_by_hand(tmp_path, capsys):
    task = run("weighted", tmp_path, kd_hard_loss="task")
    assert not task._plan.own_loss
    plain = run("plain", tmp_path, kd_hard_loss="model")
    assert plain._plan.own_loss
    assert_same(plain, run("plain", tmp_path, stock=True))
    assert "as kd_hard_loss sets it" in capsys.readouterr().out
    args = tiny.arguments(tmp_path, kd_hard_loss="model", kd_alpha=0.0)
    data = tiny.rows("plain")
    without = DistillationTrainer(model=tiny.Plain(), args=args, train_dataset=data, data_collator=tiny.pad)
    with pytest.raises(ValueError, match="`kd_hard_loss` is 'model'; expected 'auto' or 'task'"):
        without.train()
    with pytest.raises(ValueError, match="`kd_hard_loss` is 'own'"):
        tiny.arguments(tmp_path, kd_hard_loss="own")


def test_the_shift_is_read_off_the_model(tmp_path):
    """The soft loss compares the positions that the model's own loss reads."""
    teacher = bart_lm(24)
    for name, shifted in (("bart", False), ("unshifted", False), ("by items", True)):
        trainer = run(name, tmp_path, teacher=teacher, kd_alpha=1.0, kd_temperature=1.0, max_steps=1)
        assert trainer._plan.task.shifted is shifted
        batch = tiny.pad(tiny.rows("causal_lm", 4))
        labels = batch["labels"]
        if shifted:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p = teacher.eval()(**ids).logits.double().log_softmax(-1)
            q = built(name).train()(**ids).logits.double().log_softmax(-1)
        nats = (p.exp() * (p - q)).sum(-1)[labels != -100]
        assert tiny.logged(trainer, "soft_loss")[0] == pytest.approx(nats.mean().item(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compute_loss_func_is_the_hard_loss(accumulate, tmp_path):
    def func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=0.3)
        return losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    fields: dict[str, Any] = {"loss_func": func, "gradient_accumulation_steps": accumulate}
    distilled, stock = (run("plain", tmp_path, stock=stock, **fields) for stock in (False, True))
    assert_same(distilled, stock)
    assert distilled.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="`kd_hard_loss` is 'task'; expected 'auto' with a compute_loss_func"):
        run("plain", tmp_path, kd_hard_loss="task", loss_func=func)


def test_comparing_changes_nothing_of_the_student(tmp_path):
    trainer = run("batch norm and dropout", tmp_path, train=False)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    drawn = torch.get_rng_state()
    trainer._plan_of(tiny.pad(tiny.rows("plain", 4)))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_rows_without_labels_have_no_hard_loss(tmp_path):
    teacher = tiny.models("classification", seed=5)[1]
    data = tiny.rows("classification", 24)
    for row in data[4:8]:
        row["labels"] = -100
    trainer = run("weighted", tmp_path, teacher=teacher, data=data, kd_alpha=0.5)
    assert trainer._plan.own_loss
    assert tiny.logged(trainer, "loss")[1] == pytest.approx(0.5 * tiny.logged(trainer, "soft_loss")[1], rel=1e-5)


class Translator(nn.Module):
    """Teacher forcing inside the forward: its logits depend on the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(tiny.VOCAB, 8), nn.Embedding(tiny.VOCAB, 8)
        self.head = nn.Linear(8, tiny.VOCAB)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.source(input_ids).mean(1, keepdim=True) * torch.ones_like(input_ids).unsqueeze(-1)
        if labels is None:
            return {"logits": self.head(hidden)}
        logits = self.head(hidden + self.target(F.pad(labels.clamp(min=0), (1, 0))[:, :-1]))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_labels_that_change_the_logits_reach_the_model(tmp_path):
    torch.manual_seed(3)
    teacher = Translator()
    trainer = run("translator", tmp_path, teacher=teacher, kd_alpha=0.5, kd_task="token_classification")
    assert not trainer._plan.own_loss
    hard = built("translator")(**tiny.pad(tiny.rows("causal_lm", 4)))["loss"]
    assert tiny.logged(trainer, "hard_loss")[0] == pytest.approx(hard.item(), rel=1e-5)


def test_a_loss_of_its_own_needs_logits(tmp_path, capsys):
    teacher = LlamaForCausalLM(tiny.llama_config(24))
    fused = {"teacher": teacher, "kd_alpha": 0.5, "kd_loss_implementation": "fused"}
    with pytest.raises(ValueError, match=r"`kd_loss_implementation` is 'fused'.*because the hard loss is the model's"):
        run("by items", tmp_path, **fused)
    trainer = run("by items", tmp_path, kd_hard_loss="task", **fused)
    assert trainer._plan.heads is not None


def test_a_teacher_cache_serves_a_loss_of_its_own(tmp_path):
    teacher = tiny.models("classification", seed=5)[1]
    fields: dict[str, Any] = {"teacher": teacher, "kd_alpha": 0.5}
    live = run("weighted", tmp_path, **fields)
    cached = run("weighted", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **fields)
    assert cached._plan.own_loss
    assert tiny.logs(cached) == {key: pytest.approx(values, rel=1e-5) for key, values in tiny.logs(live).items()}


def test_check_has_a_row_on_the_hard_loss(tmp_path):
    teacher = tiny.models("classification", seed=5)[1]
    trainer = run("weighted", tmp_path, teacher=teacher, train=False, kd_alpha=0.5)
    rows = {row.what: row for row in trainer.check()}
    assert "the model's own: Weighted gives" in rows["hard loss"].found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_labels_that_upstream_counts_otherwise(accumulate, tmp_path):
    """Upstream's num_items_in_batch counts GPT-2's labels as if they did not shift, and GPT-2 divides by it."""
    fields: dict[str, Any] = {"gradient_accumulation_steps": accumulate}
    stock, own = (run("gpt2", tmp_path, stock=stock, **fields) for stock in (True, False))
    assert_same(own, stock)
    assert own._plan.by_num_items
    assert not own._plan.own_loss
    evaluated, expected = own.evaluate(), stock.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    batches = [tiny.pad(tiny.rows("causal_lm", 24)[i : i + 4]) for i in range(0, 24, 4)]
    with torch.no_grad():
        sums = [(own.model(**b).loss * (b["labels"][:, 1:] != -100).sum()).item() for b in batches]
    counted = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert evaluated["eval_perplexity"] == pytest.approx(math.exp(sum(sums) / counted), rel=1e-5)


def test_a_student_that_writes_into_its_inputs_does_not_change_the_batch(tmp_path):
    class Writes(Weighted):
        def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None):
            outputs = super().forward(input_ids.clone(), attention_mask.clone(), labels=labels)
            input_ids.zero_()
            return outputs

    torch.manual_seed(0)
    batch = tiny.pad(tiny.rows("classification", 4))
    before = batch["input_ids"].clone()
    args = tiny.arguments(tmp_path, kd_alpha=0.0)
    model = Writes(tiny.bert_config(initializer_range=0.5))
    DistillationTrainer(model=model, args=args, train_dataset=[], data_collator=tiny.pad)._plan_of(batch)
    assert torch.equal(batch["input_ids"], before)

"""The MLP pair against plain nn.Sequential and plain torch losses; saving and loading; messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from kd_trainer import MLPConfig, MLPForImageClassification

SMALL = {"num_features": 6, "hidden_sizes": [5], "num_labels": 3}


def test_parameter_counts() -> None:
    teacher = MLPForImageClassification(MLPConfig(hidden_sizes=(256, 256, 256)))
    student = MLPForImageClassification(MLPConfig())
    assert teacher.num_parameters() == 335_114
    assert student.num_parameters() == 50_890
    assert round(335_114 / 50_890, 1) == 6.6


def test_weights_are_those_of_the_plain_module_and_follow_the_seed() -> None:
    set_seed(42)
    model = MLPForImageClassification(MLPConfig(hidden_sizes=[32, 16]))
    after = torch.rand(1)
    set_seed(42)
    plain = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
    assert torch.equal(after, torch.rand(1)), "the model drew more random numbers than its layers need"
    rows = torch.randn(4, 784)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert torch.equal(model(rows).logits, plain(rows))
    assert not torch.equal(model.layers[0].weight, MLPForImageClassification(model.config).layers[0].weight)


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(hidden_sizes=(8, 4), activation="gelu", dropout=0.1, num_labels=2),
        MLPConfig(hidden_sizes=[], num_labels=3),
        MLPConfig(id2label={0: "cat", 1: "dog", 2: "cow"}),
    ],
)
def test_save_and_load_bit_for_bit(config: MLPConfig, tmp_path) -> None:
    model = MLPForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is MLPForImageClassification
    assert not loaded.training
    rows = torch.randn(3, 784)
    assert torch.equal(loaded(rows).logits, model(rows).logits)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(config.hidden_sizes) is type(again.hidden_sizes) is list
    for name in ("num_features", "hidden_sizes", "activation", "dropout", "id2label", "label2id", "num_labels"):
        assert getattr(again, name) == getattr(config, name), name


def test_a_missing_head_is_drawn_as_torch_draws_it(tmp_path) -> None:
    model = MLPForImageClassification(MLPConfig(hidden_sizes=[50]))
    model.save_pretrained(tmp_path)
    wider = MLPConfig(hidden_sizes=[50], num_labels=2000)
    loaded = MLPForImageClassification.from_pretrained(tmp_path, config=wider, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.layers[0].weight, model.layers[0].weight)
    bound = 50**-0.5  # nn.Linear: uniform in +- 1 / sqrt(inputs)
    head = loaded.layers[-1].weight
    assert 0.99 * bound < head.abs().max() <= bound
    torch.testing.assert_close(head.std().item(), bound / 3**0.5, rtol=0.02, atol=0)


def test_class_names_are_digits_unless_given() -> None:
    assert MLPConfig().id2label == {index: str(index) for index in range(10)}
    assert MLPConfig().label2id == {str(index): index for index in range(10)}
    assert MLPConfig(num_labels=3).num_labels == 3
    named = MLPConfig(id2label={"0": "no", "1": "yes"})
    assert named.id2label == {0: "no", 1: "yes"}
    assert named.label2id == {"no": 0, "yes": 1}


def test_loss_is_cross_entropy_and_honours_the_item_count() -> None:
    model = MLPForImageClassification(MLPConfig(**SMALL))
    rows, labels = torch.randn(8, 6), torch.tensor([0, 1, 2, -100, 0, 1, -100, 2])
    logits = model(rows).logits
    assert model(rows).loss is None
    torch.testing.assert_close(model(rows, labels=labels).loss, F.cross_entropy(logits, labels))
    total = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(model(rows, labels=labels, num_items_in_batch=torch.tensor(24)).loss, total / 24)


def test_forward_flattens_and_returns_tuples_on_request() -> None:
    model = MLPForImageClassification(MLPConfig(**SMALL))
    rows = torch.randn(4, 6)
    assert torch.equal(model(rows.view(4, 1, 2, 3)).logits, model(rows).logits)
    loss, logits = model(rows, labels=torch.zeros(4, dtype=torch.int64), return_dict=False)
    assert loss.dim() == 0
    assert logits.shape == (4, 3)


def test_dropout_acts_in_training_only() -> None:
    model = MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[500], dropout=0.5))
    rows = torch.randn(2, 6)
    assert not torch.equal(model.train()(rows).logits, model(rows).logits)
    assert torch.equal(model.eval()(rows).logits, model(rows).logits)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_features": 0}, ValueError, "`num_features` is 0; expected a finite number >= 1"),
        ({"num_features": 7.5}, TypeError, "`num_features` is 7.5; expected a whole number >= 1"),
        (
            {"hidden_sizes": 64},
            TypeError,
            r"`hidden_sizes` is 64; expected a list of widths. Write one width as \[64\]",
        ),
        ({"hidden_sizes": [64, -1]}, ValueError, r"`hidden_sizes\[1\]` is -1; expected a finite number >= 1"),
        ({"hidden_sizes": [True]}, TypeError, r"`hidden_sizes\[0\]` is True; expected a whole number"),
        ({"hidden_sizes": ["64"]}, TypeError, r"`hidden_sizes\[0\]` is '64'"),
        ({"activation": "relo"}, ValueError, "`activation` is 'relo'; expected one of .* Did you mean `relu`?"),
        ({"dropout": 1.0}, ValueError, r"`dropout` is 1.0; expected a number in \[0, 1\)"),
        ({"num_labels": 1}, ValueError, "`num_labels` is 1; expected a whole number >= 2"),
        ({"num_labels": 0}, ValueError, "`num_labels` is 0"),
    ],
)
def test_bad_configs(settings: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MLPConfig(**settings)


def test_bad_features() -> None:
    model = MLPForImageClassification(MLPConfig(**SMALL))
    with pytest.raises(
        ValueError, match=r"`features` is 7 numbers per row; expected 6 \(`num_features` of the config\)"
    ):
        model(torch.zeros(2, 7))
    with pytest.raises(TypeError, match=r"`features` is of dtype torch.uint8; .* `features.float\(\) / 255`"):
        model(torch.zeros(2, 6, dtype=torch.uint8))

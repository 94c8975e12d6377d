"""A multilayer perceptron as a `PreTrainedModel`: the teacher and the student of the 784-feature examples.

A real `transformers` model (config, save, load, Auto classes) at the cost of an `nn.Sequential`. Importing this file
registers it with AutoConfig and AutoModelForImageClassification. Shapes: B rows, F features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from ..validation import check_choice, check_number, fail
from .tensor_rows import check_count

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLPConfig(PreTrainedConfig):
    """Sizes of an `MLPForImageClassification`.

    Args:
        num_features: numbers per row, F >= 1; default 784 (28 x 28 pixels).
        hidden_sizes: widths of the hidden layers, each >= 1; default [64]; [] is a linear model.
        activation: after every hidden layer: "relu" (default), "gelu", "silu" or "tanh".
        dropout: probability after every hidden activation, in [0, 1); default 0.
        num_labels: classes, C >= 2; default 10.
        id2label: names of the classes; default the digits "0", "1", ..., so that teacher and student can be compared
            by name (not possible with transformers' default `LABEL_i`).
        kwargs: whatever `PreTrainedConfig` takes.

    Raises:
        ValueError, TypeError: sizes that are not whole numbers >= 1, an unknown activation, a dropout out of range.

    Example:
        >>> MLPConfig(hidden_sizes=(256, 256, 256)).hidden_sizes
        [256, 256, 256]
    """

    model_type = "kd_mlp"

    num_features: int = 784
    hidden_sizes: list[int] | tuple[int, ...] = (64,)
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is None:
            num_labels = kwargs.pop("num_labels", None)
            num_labels = 10 if num_labels is None else num_labels
            check_count("num_labels", num_labels)
            self.id2label = {index: str(index) for index in range(num_labels)}
        if self.label2id is None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        if len(self.id2label) < 2:
            because = "a single class always has probability 1"
            fix = "Count the negative class as well."
            fail("num_labels", len(self.id2label), "a whole number >= 2", fix, because=because)
        check_count("num_features", self.num_features)
        if not isinstance(self.hidden_sizes, (list, tuple)):
            fix = "Write one width as [64]."
            fail("hidden_sizes", repr(self.hidden_sizes), "a list of widths", fix, error=TypeError)
        for index, width in enumerate(self.hidden_sizes):
            check_count(f"hidden_sizes[{index}]", width)
        self.hidden_sizes = list(self.hidden_sizes)  # JSON has no tuples: saved and loaded configs compare equal
        check_choice("activation", self.activation, ACTIVATIONS)
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)
        super().__post_init__(**kwargs)


class MLPForImageClassification(PreTrainedModel):
    """logits = W_n act(... act(W_1 x + b_1) ...) + b_n: a fully connected classifier of flat feature rows.

    Weights are drawn as `torch.nn.Linear` draws them: after `set_seed(s)` they equal those of the same `nn.Sequential`.

    Example:
        >>> teacher = MLPForImageClassification(MLPConfig(hidden_sizes=[256, 256, 256]))
        >>> student = MLPForImageClassification(MLPConfig(hidden_sizes=[64]))
        >>> teacher.num_parameters(), student.num_parameters()
        (335114, 50890)
        >>> student(torch.zeros(2, 28, 28)).logits.shape
        torch.Size([2, 10])
    """

    config_class = MLPConfig
    config: MLPConfig
    main_input_name = "features"
    base_model_prefix = ""
    _no_split_modules = ["Linear"]  # noqa: RUF012 (upstream's declaration): the unit that FSDP and device maps place

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        width = config.num_features
        for hidden in config.hidden_sizes:
            layers += [nn.Linear(width, hidden), ACTIVATIONS[config.activation]()]
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            width = hidden
        layers.append(nn.Linear(width, len(config.id2label or {})))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
                # nn.Linear has drawn its weights just now; a second draw in post_init would only shift the seed.
                setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (upstream's flag, unknown to torch's types)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """For weights that a checkpoint lacks (built on the meta device, so never drawn): torch's own draw."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    @can_return_tuple
    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classifies rows of features.

        Args:
            features: [B, F], or [B, ...] that flattens to it; floating point.
            labels: [B] int64 class ids, -100 = unlabelled; default None (no loss).
            kwargs: `num_items_in_batch` (the loss is then the sum over the batch divided by it), `return_dict=False`
                (a tuple instead of an output object), as everywhere in transformers.

        Returns:
            `ImageClassifierOutput` with `logits` [B, C] and, where labels are given, `loss` (nats, a scalar).

        Raises:
            ValueError: another number of features than `config.num_features`.
            TypeError: features that are no floating point numbers.
        """
        if features.dim() != 2:
            features = features.flatten(1)
        if features.shape[1] != self.config.num_features:
            expected = f"{self.config.num_features} (`num_features` of the config)"
            fix = "Flatten or crop the rows to that size, or build the model with `MLPConfig(num_features=...)`."
            fail("features", f"{features.shape[1]} numbers per row", expected, fix)
        if not features.is_floating_point():
            fix = "Scale integer pixels first: `features.float() / 255`."
            fail("features", f"of dtype {features.dtype}", "floating point numbers", fix, error=TypeError)
        logits = self.layers(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("kd_mlp", MLPConfig, exist_ok=True)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification, exist_ok=True)

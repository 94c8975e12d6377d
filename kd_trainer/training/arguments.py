"""Settings of a distillation run: the `kd_*` and `teacher_*` fields.

For: users' scripts; `parse.py` reads JSON files and command lines. Leaves the meaning of the numbers to `objective.py`
and the loading of the teacher to `teachers/live.py`.
"""

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, cast, get_args, get_type_hints

import torch
import transformers
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..cache import DTYPES, FORMATS, check_server_settings
from ..files import as_json
from ..losses import DIVERGENCES, EMBEDDING_LOSSES, FEATURES, POOLINGS
from ..redaction import SecretiveDict, hidden, is_secret_name
from ..tasks import TASKS
from ..teachers.sequences import MAX_NEW_TOKENS, check_student_fields
from ..validation import (
    are_pairs,
    as_declared,
    check_choice,
    check_number,
    check_temperature,
    fail,
    quoted,
    read_json_value,
)

REDUCTIONS = ("batchmean", "tokenmean")
POSITIONS = ("labels", "attended")
SCHEDULES = ("constant", "linear", "cosine")
CHECK_FINITE = ("step", "log", "off")
IMPLEMENTATIONS = ("auto", "full", "fused")
RUNS = ("train", "check", "cache", "compare")
CHUNKS = "chunks"
CROSS_TOKENIZERS = ("error", CHUNKS)
HARD_LOSSES = ("auto", "task", "model")
FEATURE_LAYERS = ("last", "uniform")


class Unset(float):
    """The default of a field, by which it is known that nobody has set it."""


UNSET_ALPHA = Unset(0.7)


def is_unset(value: Any) -> bool:
    """Whether the field has its default, which nobody wrote."""
    return isinstance(value, Unset)


# The names that a well-known textbook's class of the same purpose uses, where alpha weighs the HARD loss.
_BORROWED = {
    "alpha": "`kd_alpha`, which weighs the SOFT loss: total = kd_alpha * soft + (1 - kd_alpha) * hard",
    "temperature": "`kd_temperature`",
}


def refuse_borrowed_names(kwargs: dict[str, Any], known: Any = ()) -> None:
    """Raises TypeError for `alpha` and `temperature`: elsewhere they mean the opposite, so they are never guessed."""
    for name, meaning in _BORROWED.items():
        if name in kwargs and name not in known:
            fix = "Rename it in the training arguments."
            fail(name, quoted(kwargs[name]), f"the argument {meaning}", fix, error=TypeError)


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU that `TrainingArguments` would take."""
    if os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu") != "cpu":
        return True
    kinds = ("cuda", "mps", "xpu", "mlu", "musa", "npu", "hpu", "neuron", "tpu", "xla")
    checks = (getattr(transformers.utils, f"is_torch_{kind}_available", None) for kind in kinds)
    known = getattr(torch, "accelerator", None)
    return any(check is not None and check() for check in checks) or (known is not None and known.is_available())


@dataclass(repr=False)
class DistillationArguments:
    """The distillation settings alone, to put in front of any `TrainingArguments` class.

    total = kd_alpha * soft + (1 - kd_alpha) * hard, where soft = T^2 * D(teacher, student) at temperature T and hard is
    the task's own loss on the labels. Every field stands with its default and its reason in the README's table.

    Raises:
        ValueError, TypeError: a value out of its range or of another type; the message names field, value and fix.

    Example:
        >>> DistillationArguments(kd_alpha=0.5).kd_temperature
        3.0

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.
    """

    kd_alpha: float = field(
        default=UNSET_ALPHA, metadata={"help": "Weight of the SOFT loss, in [0, 1]; unset: 0.7, of embeddings 1."}
    )
    kd_temperature: float = field(default=3.0, metadata={"help": "Temperature of both distributions, > 0."})
    kd_divergence: str = field(default="forward_kl", metadata={"help": "One of: " + ", ".join(DIVERGENCES) + "."})
    kd_beta: float | None = field(
        default=None,
        metadata={
            "help": "Parameter of the divergence, its own default if unset: "
            + "; ".join(
                f"{name}: {entry.parameter} ({entry.default:g})"
                for name, entry in DIVERGENCES.items()
                if entry.parameter is not None
            )
            + "."
        },
    )
    kd_standardize_logits: bool = field(
        default=False,
        metadata={"help": "Both models' logits become (z - mean) / std over the classes before the temperature."},
    )
    kd_reduction: str = field(
        default="batchmean",
        metadata={"help": "Denominator of both losses: batchmean (rows) or tokenmean (counted positions)."},
    )
    kd_positions: str = field(
        default="labels",
        metadata={"help": "Token-level tasks: soft loss where there are labels, or at every attended position."},
    )
    kd_position_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of a row's positions that the soft loss counts: those of highest student entropy."},
    )
    kd_schedule: str = field(
        default="constant", metadata={"help": "How alpha and temperature move to kd_*_end: constant, linear, cosine."}
    )
    kd_alpha_end: float | None = field(default=None, metadata={"help": "kd_alpha at the last step of a schedule."})
    kd_temperature_end: float | None = field(
        default=None, metadata={"help": "kd_temperature at the last step of a schedule."}
    )
    kd_task: str | None = field(
        default=None,
        metadata={"help": "Name the task where the model's class does not show it: " + ", ".join(TASKS) + "."},
    )
    kd_hard_loss: str = field(
        default="auto",
        metadata={
            "help": "The hard loss: task (the task's formula), model (the model's own loss), or auto: the model's own "
            "where it differs from the formula on the first batch."
        },
    )
    kd_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Embeddings: mean, cls (first attended token) or last; unset: that of a sentence-transformers "
            "folder, or mean."
        },
    )
    kd_embedding_loss: str = field(
        default="cosine", metadata={"help": "Embeddings: the soft loss of a row, cosine (1 - cosine) or mse."}
    )
    kd_remap_labels: bool = field(
        default=False,
        metadata={"help": "Reorder the teacher's classes where its id2label is a permutation of the student's."},
    )
    kd_check_finite: str | None = field(
        default=None,
        metadata={"help": "Stop on NaN or inf: step (default on CPU), log (default on accelerators) or off."},
    )
    kd_loss_implementation: str = field(
        default="auto",
        metadata={"help": "Language models: fused (no logits are held), full, or auto: fused where it is possible."},
    )
    kd_features: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Weights of feature losses, e.g. {"relation": 1}: ' + ", ".join(FEATURES) + ". A live teacher only."
        },
    )
    kd_feature_layers: list | str | None = field(
        default="last",
        metadata={"help": "The layers compared: last, uniform, or pairs [[student, teacher], ...] counted from 0."},
    )
    kd_relation_heads: int | None = field(
        default=None,
        metadata={"help": "Relation heads; unset: the most up to 48 that divide the widths of both models."},
    )
    kd_cross_tokenizer: str = field(
        default="error",
        metadata={
            "help": "A causal LM whose teacher has another tokenizer: error, or chunks: the likelihoods of text chunks "
            "(columns of align_teacher_tokens) are compared in place of the soft loss."
        },
    )
    kd_chunk_temperature: float = field(
        default=1.0, metadata={"help": "tau > 0, which divides the log-likelihoods of chunks."}
    )
    kd_student_fraction: float = field(
        default=0.0, metadata={"help": "Causal LMs: share of the rows whose completion the student generates."}
    )
    kd_max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Most tokens of such a completion; unset: {MAX_NEW_TOKENS}."}
    )
    kd_generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'How it is sampled, e.g. {"temperature": 0.9}.'}
    )
    kd_run: str = field(
        default="train",
        metadata={
            "help": "What trainer.train() does: train; or, and then end: check (print a table of results), cache (the "
            "teacher cache), compare (baseline and distilled student over kd_compare_seeds seeds, and a report)."
        },
    )
    kd_compare_seeds: int = field(
        default=3, metadata={"help": "kd_run compare: number of seeds, from `seed` upwards; more can be added later."}
    )
    teacher_model_name_or_path: list | str | None = field(
        default=None,
        metadata={"help": "The teacher, if it is not given to the trainer: a folder or a hub name, or a list."},
    )
    teacher_model_init_kwargs: dict | str | list | None = field(
        default=None,
        metadata={
            "help": 'Arguments of the teacher\'s from_pretrained, e.g. {"dtype": "bfloat16"}; of several one for all '
            "that are given by path, or a list."
        },
    )
    teacher_weights: list | str | None = field(
        default=None, metadata={"help": "Several teachers: the weight of each in the mixture, >= 0; unset: equal."}
    )
    teacher_names: list | str | None = field(
        default=None,
        metadata={"help": "Several teachers: a name of each, for the column teacher_id; equal names are one mixture."},
    )
    teacher_compile: bool = field(default=False, metadata={"help": "Run the teacher's forward through torch.compile."})
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Ask the teacher once about all data, keep its outputs in this folder and train from them."},
    )
    teacher_cache_format: str = field(
        default="auto",
        metadata={
            "help": "What is kept: logits, hidden, topk, sampled; auto: hidden for large vocabularies, or logits; "
            "log-probabilities of the teacher's tokens with kd_cross_tokenizer chunks."
        },
    )
    teacher_cache_k: int | None = field(
        default=None, metadata={"help": "Classes kept of each position (topk: 64) or draws (sampled: 50)."}
    )
    teacher_cache_dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16 (topk: not bfloat16); unset: the teacher's, topk float16."},
    )
    teacher_server_url: str | None = field(default=None, metadata={"help": "vLLM-compatible server with the teacher."})
    teacher_server_model: str | None = field(default=None, metadata={"help": "The teacher's name on that server."})
    teacher_server_top_k: int = field(default=64, metadata={"help": "Log-probabilities kept of each position."})
    teacher_server_timeout: float = field(default=120.0, metadata={"help": "Seconds that a request may take."})
    teacher_server_retries: int = field(default=5, metadata={"help": "Further attempts after a time-out or 5xx."})
    teacher_server_concurrency: int = field(default=8, metadata={"help": "Requests under way at once."})

    def __new__(cls, *args: Any, **kwargs: Any) -> "DistillationArguments":
        """Rejects borrowed names before the dataclass raises 'unexpected keyword argument'."""
        refuse_borrowed_names(kwargs, {f.name for f in dataclasses.fields(cls)})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(DistillationArguments):
            setattr(self, entry.name, as_declared(entry, _KINDS[entry.name], getattr(self, entry.name)))
        self._read_teacher_kwargs()
        self._read_several()
        check_number("kd_alpha", self.kd_alpha, low=0, high=1)
        check_temperature("kd_temperature", self.kd_temperature)
        check_choice("kd_divergence", self.kd_divergence, DIVERGENCES)
        check_choice("kd_reduction", self.kd_reduction, REDUCTIONS)
        check_choice("kd_positions", self.kd_positions, POSITIONS)
        check_number("kd_position_fraction", self.kd_position_fraction, low=0, high=1, open_low=True)
        check_choice("kd_loss_implementation", self.kd_loss_implementation, IMPLEMENTATIONS)
        check_choice("kd_schedule", self.kd_schedule, SCHEDULES)
        check_choice("kd_run", self.kd_run, RUNS)
        check_number("kd_compare_seeds", self.kd_compare_seeds, low=1)
        check_choice("kd_hard_loss", self.kd_hard_loss, HARD_LOSSES)
        check_choice("kd_embedding_loss", self.kd_embedding_loss, EMBEDDING_LOSSES)
        if self.kd_pooling is not None:
            check_choice("kd_pooling", self.kd_pooling, POOLINGS)
        self._check_cache()
        self._check_features()
        self._check_chunks()
        check_server_settings(self)
        given = self.kd_generation_kwargs
        self.kd_generation_kwargs = read_json_value("kd_generation_kwargs", given, '{"temperature": 0.9}')
        check_student_fields(self)
        self._check_beta()
        if self.kd_task is not None:
            check_choice("kd_task", self.kd_task, TASKS)
        if self.kd_check_finite is not None:
            check_choice("kd_check_finite", self.kd_check_finite, CHECK_FINITE)
        self._check_schedule()
        # Without it the processes of a launcher would not find each other on the CPU, and each would train alone.
        if getattr(self, "use_cpu", None) is False and not has_accelerator():
            self.use_cpu: bool = True
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]

    def _check_beta(self) -> None:
        entry = DIVERGENCES[self.kd_divergence]
        if self.kd_beta is not None and entry.parameter is None:
            *others, last = (name for name, other in DIVERGENCES.items() if other.parameter is not None)
            expected = f"no value with kd_divergence {self.kd_divergence!r}, which has no beta"
            fix = f"Leave it out, or choose kd_divergence {', '.join(others)} or {last}."
            fail("kd_beta", repr(self.kd_beta), expected, fix)
        entry.check(self.kd_beta, "kd_beta")

    def _check_chunks(self) -> None:
        check_choice("kd_cross_tokenizer", self.kd_cross_tokenizer, CROSS_TOKENIZERS)
        check_temperature("kd_chunk_temperature", self.kd_chunk_temperature)
        if self.kd_cross_tokenizer != CHUNKS:
            if self.kd_chunk_temperature != 1:
                expected = f"1 with kd_cross_tokenizer {self.kd_cross_tokenizer!r}"
                fail("kd_chunk_temperature", self.kd_chunk_temperature, expected, "Set kd_cross_tokenizer to 'chunks'.")
            return
        unread = ["kd_temperature", "kd_temperature_end", "kd_divergence", "kd_beta", "kd_standardize_logits"]
        unread += ["kd_features", "kd_position_fraction", "teacher_server_url"]
        unread += ["teacher_cache_format", "teacher_cache_k", "teacher_cache_dtype"]
        for entry in dataclasses.fields(DistillationArguments):
            value = getattr(self, entry.name)
            if entry.name in unread and value != entry.default:
                because = "the tokens of the models differ, and chunks are compared by their likelihoods alone"
                expected = f"{entry.default!r} (the default) with kd_cross_tokenizer 'chunks'"
                fail(entry.name, quoted(value), expected, "Leave it out.", because=because)

    def _check_cache(self) -> None:
        check_choice("teacher_cache_format", self.teacher_cache_format, ("auto", *FORMATS))
        if self.teacher_cache_dtype is not None:
            check_choice("teacher_cache_dtype", self.teacher_cache_dtype, DTYPES)
        k = self.teacher_cache_k
        if k is not None and k < 1:
            fix = "Leave it out for 64 (topk) or 50 draws (sampled)."
            fail("teacher_cache_k", repr(k), "a whole number, at least 1", fix)
        if self.kd_run == "cache" and self.teacher_cache_dir is None:
            fail("teacher_cache_dir", None, "a folder with kd_run 'cache'", "Set it to the folder for the cache.")
        if self.teacher_cache_dir is None:
            given = {
                "teacher_cache_format": None if self.teacher_cache_format == "auto" else self.teacher_cache_format,
                "teacher_cache_k": self.teacher_cache_k,
                "teacher_cache_dtype": self.teacher_cache_dtype,
            }
            for name, value in given.items():
                if value is not None:
                    fix = "Set teacher_cache_dir, or leave it out."
                    fail(name, quoted(value), "no value without teacher_cache_dir", fix)

    def _check_features(self) -> None:
        given = self.kd_features = read_json_value("kd_features", self.kd_features, '{"relation": 1}')
        if given is not None and not isinstance(given, dict):
            fix = 'Write it as {"relation": 1}.'
            fail("kd_features", quoted(given), "a JSON object: names and weights", fix, error=TypeError)
        for name, weight in self.features.items():
            check_choice("kd_features", name, FEATURES)
            check_number(f"kd_features[{name}]", weight, low=0)
        layers = self.kd_feature_layers = read_json_value("kd_feature_layers", self.kd_feature_layers, "[[0, 1]]")
        if layers not in FEATURE_LAYERS and not are_pairs(layers):
            expected = "'last', 'uniform', or pairs [[student layer, teacher layer], ...] of whole numbers"
            fail("kd_feature_layers", quoted(layers), expected, "Pairs are written as [[0, 1], [1, 3]].")
        if self.kd_relation_heads is not None:
            check_number("kd_relation_heads", self.kd_relation_heads, low=1)
            if not any(FEATURES[name].has_heads for name in self.features):
                fix = "Leave it out, or add 'relation' to kd_features."
                fail("kd_relation_heads", self.kd_relation_heads, "no value without relations in kd_features", fix)
        if layers != "last" and not self.features:
            fail("kd_feature_layers", quoted(layers), "no value without kd_features", "Set kd_features.")
        if self.features and self.teacher_cache_dir is not None:
            because = "a cache holds a teacher's final outputs, no features of its layers"
            fix = "Leave teacher_cache_dir out: the teacher is run in every step."
            fail("teacher_cache_dir", quoted(self.teacher_cache_dir), "None with kd_features", fix, because=because)

    def _check_schedule(self) -> None:
        ends = {name: getattr(self, name) for name in ("kd_alpha_end", "kd_temperature_end")}
        given = {name: value for name, value in ends.items() if value is not None}
        if "kd_alpha_end" in given:
            check_number("kd_alpha_end", self.kd_alpha_end, low=0, high=1)
        if "kd_temperature_end" in given:
            check_temperature("kd_temperature_end", self.kd_temperature_end)
        if given and self.kd_schedule == "constant":
            name, value = next(iter(given.items()))
            fail(name, quoted(value), "no value with kd_schedule 'constant'", "Set kd_schedule to linear or cosine.")
        if not given and self.kd_schedule != "constant":
            fix = "Set kd_alpha_end or kd_temperature_end."
            fail("kd_schedule", repr(self.kd_schedule), "'constant' without an end", fix)

    def _read_teacher_kwargs(self) -> None:
        name, fix = "teacher_model_init_kwargs", 'Write it as {"dtype": "bfloat16"}.'
        given = read_json_value(name, self.teacher_model_init_kwargs, '{"dtype": "bfloat16"}')

        def read(each: Any) -> SecretiveDict:
            if not (isinstance(each, dict) and all(isinstance(key, str) for key in each)):
                fail(name, quoted(given), "a JSON object: names and values", fix, error=TypeError)
            return SecretiveDict(each)

        if isinstance(given, list) and len(given) > 1:
            self.teacher_model_init_kwargs = [read(each or {}) for each in given]
        else:
            self.teacher_model_init_kwargs = None if given is None else read(given)

    def _read_several(self) -> None:
        """The lists of several teachers; of those that the trainer is given it compares the lengths."""
        paths = self.teacher_model_name_or_path
        for name, kind, example in (
            ("teacher_weights", "numbers", "[0.7, 0.3]"),
            ("teacher_names", "texts", '["english", "german"]'),
        ):
            given = read_json_value(name, getattr(self, name), example)
            if given is None:
                continue
            given = list(given) if isinstance(given, tuple) else given
            if (
                not isinstance(given, list)
                or not given
                or (kind == "texts" and not all(isinstance(each, str) for each in given))
            ):
                expected = f"a list of {kind}, one for each teacher"
                fail(name, quoted(given), expected, f"Write it as {example}.", error=TypeError)
            if isinstance(paths, list) and len(given) != len(paths):
                expected = f"{len(paths)} {kind}, one for each of teacher_model_name_or_path"
                fail(name, quoted(given), expected, "Give one for each.")
            setattr(self, name, given)
        weights = [1.0] if self.teacher_weights is None else cast(list, self.teacher_weights)
        for weight in weights:
            check_number("teacher_weights", weight, low=0)
        if not sum(weights) > 0:
            fail("teacher_weights", quoted(weights), "a weight above 0", "Leave it out for equal weights.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as upstream's arguments have it: what is no JSON value (a `BitsAndBytesConfig`, a
        torch.dtype) is written as one."""
        above: Any = super()
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        made: dict[str, Any] = above.to_dict() if hasattr(above, "to_dict") else own
        return {**made, "teacher_model_init_kwargs": hidden(as_json(self.teacher_model_init_kwargs))}

    def __repr__(self) -> str:
        shown = {entry.name: getattr(self, entry.name, None) for entry in dataclasses.fields(self)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in hidden(shown).items())})"

    def __str__(self) -> str:
        shown = {entry.name: getattr(self, entry.name, None) for entry in dataclasses.fields(self)}
        lines = [f"{name}={value},\n" for name, value in sorted(hidden(shown).items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    def __getstate__(self) -> dict[str, Any]:
        """For training_args.bin, which is saved and uploaded with every model: secrets stay behind."""
        return {name: None if is_secret_name(name) else value for name, value in self.__dict__.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = made = object.__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    @property
    def features(self) -> dict[str, float]:
        """`kd_features` as a dict, empty where unset."""
        return cast(dict, self.kd_features or {})

    @property
    def teacher_kwargs(self) -> dict[str, Any]:
        """`teacher_model_init_kwargs` of a single teacher as a dict, empty where unset."""
        return self.teacher_kwargs_of(0)

    def teacher_kwargs_of(self, index: int) -> dict[str, Any]:
        """The same of one of several teachers."""
        given = self.teacher_model_init_kwargs
        return cast(dict, (given[index] if isinstance(given, list) else given) or {})

    @classmethod
    def of(cls, args: Any) -> "DistillationArguments":
        """The distillation settings inside `args`; a plain `TrainingArguments` has none and gets the defaults."""
        names = [f.name for f in dataclasses.fields(DistillationArguments)]
        return DistillationArguments(**{name: getattr(args, name) for name in names if hasattr(args, name)})


# By the class, since upstream's parser writes other types into the fields.
_KINDS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(DistillationArguments).items()}


@dataclass(repr=False)
class DistillationTrainingArguments(DistillationArguments, TrainingArguments):
    """`TrainingArguments` with the distillation settings of `DistillationArguments` in front."""


@dataclass(repr=False)
class Seq2SeqDistillationTrainingArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` (generation in evaluation) with the settings of `DistillationArguments` in front."""

"""Which classes and options of upstream the mixin works with, and the names of upstream that the package relies on.

For: `trainer.py`. Refusals name the class or the option, and what to write instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn
from transformers import Seq2SeqTrainingArguments, Trainer
from transformers.utils import is_sagemaker_mp_enabled

from ..validation import fail, message
from .arguments import has_accelerator, refuse_borrowed_names

# Upstream names without a promise of stability that the package relies on; a test looks each of them up.
UPSTREAM_NAMES = {
    "transformers.Trainer": (
        "get_batch_samples",
        "_get_num_items_in_batch",
        "_prepare_inputs",
        "_remove_unused_columns",
        "_get_collator_with_removed_columns",
        "_set_signature_columns_if_needed",
        "_hp_search_setup",
        "get_tp_size",
        "get_cp_size",
        "get_sp_size",
        "loss_is_scaled_for_ga",
        "prediction_step",
        "evaluation_loop",
        "_save_checkpoint",
        "_load_best_model",
        "_get_output_dir",
    ),
    "transformers.Seq2SeqTrainer": ("prediction_step",),
    "transformers.AutoModelForCausalLM": ("_model_mapping",),
    "transformers.utils.generic.TransformersKwargs": ("__annotations__",),
    "accelerate.utils.fsdp_utils": ("fsdp2_prepare_model",),
    "peft.tuners.tuners_utils.BaseTunerLayer": ("_disable_adapters", "adapter_layer_names"),
}
# Attributes that upstream's constructor sets and the trainer reads.
UPSTREAM_ATTRIBUTES = (
    "gather_function",
    "label_names",
    "label_smoother",
    "_loss_shifts_labels",
    "_signature_columns",
    "_train_batch_size",
    "accelerator",
)
# Trainers whose own compute_loss the mixin replaces on purpose, since what they compute is its hard loss; and what
# they log no longer.
REPLACED = {
    "trl.trainer.sft_trainer.SFTTrainer": "SFTTrainer's entropy, mean_token_accuracy and num_tokens are not logged; "
    "include_num_input_tokens_seen counts tokens, teacher_agreement and eval_perplexity measure the student",
}

# Variables in which a launcher puts the number of processes that it started, as accelerate reads them.
_LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# What helps with the trainers of other libraries, whose losses are not a task's loss on logits.
_LIBRARIES = {
    "sentence_transformers": "Put the mixin in front of transformers' Trainer: a SentenceTransformer may be its "
    "model. Or take that library's own distillation losses (MSELoss, MarginMSELoss, ...) with its own trainer.",
    "setfit": "SetFit has a DistillationTrainer of its own.",
    "trl": "Take TRL's SFTTrainer; the losses of its other trainers are no task's loss on labels.",
}


def check_bases(cls: type, mixin: type) -> None:
    """Raises TypeError unless `cls` has `mixin` in front of `Trainer` classes whose compute_loss it may replace."""
    place = cls.__mro__.index(mixin)
    before, behind = cls.__mro__[:place], cls.__mro__[place + 1 :]
    others = [c for c in cls.__mro__ if _is_another_trainer(c, mixin)]
    if others and not issubclass(cls, Trainer):
        refuse_no_trainer(cls, others[0])
    wrong = [c for c in before if issubclass(c, Trainer) and not issubclass(c, mixin)]
    if wrong:
        name = wrong[0].__name__
        _refuse(
            cls,
            f"with {name} before DistillationMixin",
            "DistillationMixin (or DistillationTrainer) first",
            f"Write class {cls.__name__}(DistillationMixin, {name}).",
            f"the loss of {name} would be used and the teacher never run",
        )
    lost = [c for c in behind if "compute_loss" in vars(c) and c is not Trainer and _full_name(c) not in REPLACED]
    if lost:
        fix = f"Move it into {cls.__name__}, where super().compute_loss(...) is the distillation loss."
        _refuse(
            cls,
            f"with {lost[0].__name__}, which has a compute_loss of its own",
            "a Trainer class without one behind DistillationMixin",
            _advice(lost, fix),
            "DistillationMixin's would be used and this one never called",
        )


def check_call(trainer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises for a mixin without a `Trainer`, a borrowed name, or processes that would train alone."""
    if not isinstance(trainer, Trainer):
        refuse_no_trainer(type(trainer))
    refuse_borrowed_names(kwargs)
    if args is not None:
        refuse_lone_processes(args)


def refuse_no_trainer(cls: type, other: type | None = None) -> NoReturn:
    """Raises TypeError for a class without `transformers.Trainer`; `other`: the trainer of another library in it."""
    shown = "without transformers.Trainer"
    if other is not None:
        shown = f"with {_full_name(other)}, which is no transformers.Trainer"
    fix = f"Write class {cls.__name__}(DistillationMixin, Trainer); elsewhere use the losses alone: SoftTargetLoss."
    expected = "DistillationMixin in front of a transformers.Trainer"
    _refuse(cls, shown, expected, _advice(cls.__mro__, fix), "it overrides what that class calls")


@contextmanager
def room_for_fields(cls: type, mixin: type, args: Any) -> Iterator[None]:
    """Raises TypeError where the trainer behind the mixin makes the arguments into a class without these fields.

    `SFTTrainer` builds its own class of arguments from the fields of the given ones.
    """
    try:
        yield
    except TypeError as error:
        if "'kd_" not in str(error) and "'teacher_" not in str(error):
            raise
        behind = next(c for c in cls.__mro__ if issubclass(c, Trainer) and not issubclass(c, mixin))
        fix = "Write a dataclass Args(DistillationArguments, TheOtherArguments) and build the args of it."
        expected = f"the arguments of {behind.__name__} with DistillationArguments in front"
        raise TypeError(message("args", f"of type {type(args).__name__}", expected, fix)) from error


def check_options(args: Any, hard_loss: str, compute_loss_func: Any, accelerator: Any) -> None:
    """Raises ValueError for options of upstream that the loss of the distillation cannot honour."""
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        expected = "'nll' (the default), the hard loss of the distillation"
        fail("loss_type", repr(loss_type), expected, "Leave it out; kd_alpha weighs the losses.")
    if args.n_gpu > 1:
        fix = "Start the script with `accelerate launch`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
        fail("n_gpu", args.n_gpu, "1 GPU for each process, not nn.DataParallel", fix)
    if compute_loss_func is not None and hard_loss == "task":
        expected = "'auto' with a compute_loss_func, which is the hard loss then"
        fail("kd_hard_loss", "'task'", expected, "Leave out one of the two.")
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.sp_backend == "deepspeed" and parallel.sp_enabled:
        fail("parallelism_config", "Ulysses sequence parallelism", "none", "Switch sequence parallelism off.")


def check_smoothing(factor: float, label_names: Sequence[str]) -> None:
    """Raises ValueError where upstream would not smooth the labels, which have other names."""
    if factor > 0 and {"labels", "start_positions"}.isdisjoint(label_names):
        expected = f"0 with the labels in {', '.join(map(repr, label_names))}"
        fix = "Rename the column to 'labels', or set it to 0."
        fail("label_smoothing_factor", factor, expected, fix, because="upstream smooths a column 'labels' alone")


def check_generation_arguments(args: Any) -> None:
    """Raises TypeError for arguments without those of `Seq2SeqTrainer`."""
    if not isinstance(args, Seq2SeqTrainingArguments):
        fix = "Build the arguments with that class; it has the same fields and those of generation."
        shown, expected = f"of type {type(args).__name__}", "Seq2SeqDistillationTrainingArguments"
        fail("args", shown, expected, fix, error=TypeError)


def unwrapped(model: nn.Module, accelerator: Any) -> nn.Module:
    """A model without what processes and compilers put around it."""
    # accelerate's own search reads the metadata of installed packages first, which costs more than a small step.
    wrapped = hasattr(model, "module") or hasattr(model, "_orig_mod")
    return accelerator.unwrap_model(model) if wrapped else model


def refuse_lone_processes(args: Any) -> None:
    """Raises ValueError where a launcher started several processes and each would train the whole job alone."""
    started = {name: int(value) for name in _LAUNCHED if (value := os.environ.get(name, "")).isdigit()}
    name = max(started, key=lambda each: started[each], default="")
    if not name or started[name] < 2 or args.world_size > 1 or is_sagemaker_mp_enabled():
        return
    because = f"{name} is {started[name]} and the arguments see one process: each would train the whole job alone "
    because += "and write over the files of the others"
    if has_accelerator() and args.device.type != "mps":
        fix = f"Start the script with accelerate launch or torchrun, or unset {name}; on the CPU set use_cpu."
        fail(name, started[name], "1, the number of processes that the arguments see", fix, because=because)
    fix = "Set use_cpu to true in the arguments (those of kd_trainer have it where there is no accelerator)."
    fail("use_cpu", args.use_cpu, "true for several processes on the CPU", fix, because=because)


def not_logged(cls: type) -> list[str]:
    """Notes on what the replaced bases of a class log no longer."""
    return [REPLACED[name] for name in map(_full_name, cls.__mro__) if name in REPLACED]


def _refuse(cls: type, shown: str, expected: str, fix: str, because: str) -> NoReturn:
    fail("bases", f"of {cls.__name__} {shown}", expected, fix, because=because, error=TypeError)


def _advice(classes: Iterable[type], otherwise: str) -> str:
    """What helps with the first of `classes` that comes from a known library."""
    return next((_LIBRARIES[root] for root in map(_library, classes) if root in _LIBRARIES), otherwise)


def _is_another_trainer(cls: type, mixin: type) -> bool:
    """Whether a class trains models without being a `Trainer` of transformers."""
    own = _library(cls) == __name__.partition(".")[0] or issubclass(cls, (Trainer, mixin))
    return not own and any(callable(vars(cls).get(name)) for name in ("train", "fit", "training_step", "compute_loss"))


def _library(cls: type) -> str:
    """The package that a class comes from."""
    return cls.__module__.partition(".")[0]


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

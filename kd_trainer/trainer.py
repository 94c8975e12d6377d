"""`DistillationTrainer`: a `Trainer` whose loss is the mixture of the labels' and a teacher's.

For: any script that builds a `Trainer`. The mixin overrides where upstream computes, counts and logs the loss, and
nothing else; formulas stand in the files below. Imports: everything below in the house's order, transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import nested_detach

from .checks import Shown, fail
from .compatibility import check_same_tokens, check_separate, check_teacher_columns, class_order
from .describe import card_section, count_parameters, name_of, start_block
from .files import write_atomically
from .finite import FiniteWatch, bad_rows
from .heads import (
    TEACHER_PREFIX,
    Head,
    accepted_inputs,
    check_batch,
    check_label_range,
    head_for,
    head_from_logits,
    logits_of,
    model_inputs,
)
from .interrupt import ResumableInterrupt
from .losses import SoftTargetLoss
from .objective import Counts, Objective, Parts, scheduled
from .teacher import LiveTeacher, load_teacher
from .training_args import DistillationArguments, refuse_borrowed_names
from .window import Window, as_tensor, named

if TYPE_CHECKING:  # at run time the mixin has no base of its own, so that it fits in front of any Trainer class
    _InFrontOf = Trainer
else:
    _InFrontOf = object

# Upstream names without a promise of stability that this file and `heads.py` rely on; a test looks each of them up.
UPSTREAM_NAMES = {
    "transformers.Trainer": (
        "get_batch_samples",
        "_get_num_items_in_batch",
        "_prepare_inputs",
        "_remove_unused_columns",
        "_set_signature_columns_if_needed",
        "_hp_search_setup",
        "get_tp_size",
        "get_cp_size",
        "get_sp_size",
        "loss_is_scaled_for_ga",
        "prediction_step",
        "evaluation_loop",
    ),
    "transformers.AutoModelForCausalLM": ("_model_mapping",),
    "transformers.utils.generic.TransformersKwargs": ("__annotations__",),
}
# Attributes that upstream's constructor sets and this file reads.
UPSTREAM_ATTRIBUTES = ("gather_function", "label_names", "_loss_shifts_labels", "_signature_columns", "accelerator")


class Fit(NamedTuple):
    """What the first batch told about the models; made once for a student."""

    model: nn.Module  # `trainer.model` as it was when looked at: model_init makes a new one
    student: nn.Module  # the same, unwrapped
    head: Head
    accepted: frozenset[str] | None  # names of the student's inputs


class DistillationMixin(_InFrontOf):
    """Puts distillation in front of any `Trainer` class: `class MyKD(DistillationMixin, MyTrainer)`.

    Args:
        teacher_model: a module, a folder or a hub name; None takes `args.teacher_model_name_or_path`. Needed unless
            `kd_alpha` is constantly 0.
        everything else: as the `Trainer` class behind it.

    Raises:
        TypeError: the mixin stands behind a `Trainer` class in the bases, or `alpha`/`temperature` are passed.
        ValueError: teacher and student do not fit (see `compatibility`), or an option of upstream that this loss
            cannot honour (`compute_loss_func`, DataParallel, DeepSpeed ZeRO-3, Ulysses sequence parallelism).
    """

    # The loss is divided once by the counts of the whole optimizer step: upstream must not divide again.
    loss_is_scaled_for_ga: bool | None = True
    _signature_columns: Any  # upstream declares it as None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(DistillationMixin)]
        wrong = [c for c in before if issubclass(c, Trainer) and not issubclass(c, DistillationMixin)]
        if wrong:
            fail(
                "bases",
                Shown(f"of {cls.__name__} with {wrong[0].__name__} before DistillationMixin"),
                "DistillationMixin (or DistillationTrainer) first",
                f"Write class {cls.__name__}(DistillationMixin, {wrong[0].__name__}).",
                because=f"the loss of {wrong[0].__name__} would be used and the teacher never asked",
                error=TypeError,
            )

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *trainer_args: Any,
        teacher_model: nn.Module | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_borrowed_names(kwargs)
        if kwargs.get("compute_loss_func") is not None:
            mend = "Leave it out; the hard loss is the task's own, kd_alpha weighs it."
            fail("compute_loss_func", kwargs["compute_loss_func"], "None with distillation", mend)
        super().__init__(model, args, *trainer_args, **kwargs)
        self._read_settings()
        self._refuse_what_cannot_work()
        if not self.label_names:  # a plain module's forward names no labels; the batch still has them
            self.label_names = ["labels"]
        self.teacher = self._load_teacher(teacher_model)
        self._fit: Fit | None = None
        self._started = False
        self._window = Window(self.args.device)
        self._eval_rows: list[Tensor] | None = None
        mode = self.kd_args.kd_check_finite or ("step" if self.args.device.type == "cpu" else "log")
        self._finite = FiniteWatch(mode, self.args.process_index)
        if not any(isinstance(c, ResumableInterrupt) for c in self.callback_handler.callbacks):
            self.add_callback(ResumableInterrupt())

    # ---- before the first step ----

    def _read_settings(self) -> None:
        """Reads the arguments as they stand now: a script or a hyperparameter search may have changed them."""
        self.kd_args = DistillationArguments.of(self.args)
        self._always_hard = self.kd_args.kd_alpha == 0 and self.kd_args.kd_schedule == "constant"
        self._objectives: dict[tuple[float, float], tuple[Objective, SoftTargetLoss]] = {}

    def _hp_search_setup(self, trial: Any) -> None:
        """Upstream calls this first in every training, with a trial or without."""
        super()._hp_search_setup(trial)
        self._read_settings()
        self._require_teacher(self.teacher)

    def _require_teacher(self, given: Any) -> None:
        if given is None and not self._always_hard:
            mend = "Pass teacher_model= to the trainer, set teacher_model_name_or_path, or set kd_alpha to 0."
            fail("teacher_model", None, f"a teacher, with kd_alpha {self.kd_args.kd_alpha:g}", mend)

    def _refuse_what_cannot_work(self) -> None:
        if self.args.n_gpu > 1:
            mend = "Start the script with `accelerate launch`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
            fail("n_gpu", self.args.n_gpu, "1 GPU for each process, not nn.DataParallel", mend)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            fail("deepspeed", "ZeRO stage 3", "stage 0, 1 or 2 in this version", "Set zero_stage to 2.")
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.sp_backend == "deepspeed" and parallel.sp_enabled:
            fail("parallelism_config", "Ulysses sequence parallelism", "none", "Switch sequence parallelism off.")

    def _load_teacher(self, given: nn.Module | str | Path | None) -> LiveTeacher | None:
        kd, named = self.kd_args, self.kd_args.teacher_model_name_or_path
        if given is not None and named is not None and str(given) != named:
            expected = "nothing beside the argument teacher_model of the trainer"
            fail("teacher_model_name_or_path", named, expected, "Give the teacher once.")
        given = named if given is None else given
        self._require_teacher(given)
        if given is None:
            return None
        student = self.accelerator.unwrap_model(self.model)
        teacher = load_teacher(given, student, kd.teacher_kwargs)
        check_separate(student, teacher)
        live = LiveTeacher(teacher)
        head = head_for(student, kd.kd_task, self._loss_shifts_labels)
        if head is None or head.name in ("classification", "token_classification"):
            live.class_order = class_order(student, teacher, remap=kd.kd_remap_labels)
        return live

    def _look_at(self, batch: Mapping[str, Any]) -> Fit:
        """Fits teacher, student and head together on the first batch; afterwards returns what it found."""
        if self._fit is not None and self._fit.model is self.model:
            return self._fit
        check_batch(batch)
        student = self.accelerator.unwrap_model(self.model)
        head = head_for(student, self.kd_args.kd_task, self._loss_shifts_labels)
        teacher_logits = None
        if self.teacher is not None:
            self.teacher.prepare(self.args.device)
            check_teacher_columns(batch)
            if "input_ids" in batch and f"{TEACHER_PREFIX}input_ids" not in batch:
                check_same_tokens(student, self.teacher.model, self.processing_class, self.kd_args.teacher_kwargs)
        if head is None or self.teacher is not None:
            batch = self._with_decoder_inputs(head, self._prepare_inputs(dict(batch)))
            teacher_logits = self._probe(batch)
        if head is None and teacher_logits is None:
            dims = getattr(batch.get("labels"), "dim", lambda: 1)()
            head = head_for(student, "classification" if dims == 1 else "token_classification", False)
        head = head_from_logits(teacher_logits) if head is None else head  # type: ignore[arg-type]
        self._note_problem_type(student, head, batch)
        targets, config = head.targets(batch), getattr(student, "config", None)
        classes = getattr(config, "vocab_size" if head.name.endswith("_lm") else "num_labels", None)
        if teacher_logits is not None:  # as many as the student's, or `check_shapes` says so
            classes = teacher_logits.shape[-1] if not isinstance(classes, int) else classes
        if targets is not None and isinstance(classes, int):
            check_label_range(targets, classes)
        self._fit = Fit(cast(nn.Module, self.model), student, head, accepted_inputs(student))
        return self._fit

    def _probe(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The teacher's logits on the first batch: their shape tells the head, their values whether it is alive."""
        if self.teacher is None:
            return None
        logits = self.teacher(batch, self.accelerator)
        bad = bad_rows(logits)
        if bad and (self._finite.mode != "off" or len(bad) == logits.shape[0]):
            fail(
                "teacher_model",
                Shown(f"giving NaN or inf on rows {bad[:8]} of the first batch"),
                "finite logits",
                "Check its weights, its dtype (float16 overflows where bfloat16 does not) and the inputs.",
            )
        return logits

    @staticmethod
    def _note_problem_type(student: nn.Module, head: Head, batch: Mapping[str, Any]) -> None:
        """Models write this into their config when they see labels; here labels never reach them."""
        config: Any = getattr(student, "config", None)
        if head.name != "classification" or not hasattr(config, "problem_type"):
            return
        if config.problem_type not in (None, "single_label_classification") or config.num_labels == 1:
            shown = config.problem_type or "regression (num_labels is 1)"
            mend = "Use a model with num_labels >= 2 and integer labels; other tasks fit no head of this version."
            fail("problem_type", shown, "single_label_classification", mend)
        config.problem_type = "single_label_classification"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; writes `distillation.json` (formula and teacher, for the report) beside the results."""
        self._started, self._window = False, Window(self.args.device)
        self._finite = FiniteWatch(self._finite.mode, self._finite.process)
        try:
            result = super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ResumableInterrupt):
                    callback.restore()
        self._finite.raise_noted()
        if self.teacher is not None and not self._always_hard and self.is_world_process_zero():
            write_atomically(
                Path(str(self.args.output_dir)) / "distillation.json", json.dumps(self.summary(), indent=2)
            )
        return result

    def summary(self) -> dict[str, Any]:
        """Teacher, formula and the numbers in it, as JSON values: for the report and the model card."""
        kd = self.kd_args
        token_level = self._fit.head.token_level if self._fit else False
        teacher = None if self.teacher is None else self.teacher.model
        formulas = [self._objective_at(progress)[0].formula(token_level=token_level) for progress in (0.0, 1.0)]
        if kd.kd_schedule != "constant":
            formulas[0] += f"; {kd.kd_schedule} schedule to {formulas[1]}"
        return {
            "formula": formulas[0],
            "teacher": None if teacher is None else name_of(teacher),
            "teacher_parameters": None if teacher is None else count_parameters(teacher),
            "student_parameters": count_parameters(self.accelerator.unwrap_model(self.model)),
            **{f.name.removeprefix("kd_"): getattr(kd, f.name) for f in dataclasses.fields(kd) if f.name[:3] == "kd_"},
        }

    @staticmethod
    def _refuse_packed(batch: Mapping[str, Any]) -> None:
        positions = batch.get("position_ids")
        packed = any(key in batch for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
        if not packed and isinstance(positions, Tensor) and positions.dim() == 2:
            packed = bool((positions.diff(dim=-1) < 0).any())
        if packed:
            because = "rows of a packed batch are no longer sequences"
            fail(
                "kd_reduction",
                "batchmean",
                "'tokenmean' with packed batches",
                "Set kd_reduction to tokenmean.",
                because=because,
            )

    # ---- counting: once for each optimizer step ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Upstream's batches of one optimizer step, with the denominators of its losses instead of one number."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        fit = self._look_at(batches[0])
        objective, _ = self._objective(training=True)
        each = [objective.count(fit.head, batch) for batch in batches]
        counts = Counts(*(sum(column) for column in zip(*(c[:3] for c in each), strict=True)))
        if not self._started:
            self._started = True
            if fit.head.token_level and self.kd_args.kd_reduction == "batchmean":
                self._refuse_packed(batches[0])
            if self.is_world_process_zero():
                teacher = None if self.teacher is None else self.teacher.model
                last, _ = self._objective(training=False)
                labelled = fit.head.targets(batches[0]) is not None
                block = start_block(fit.student, teacher, fit.head, objective, last, counts, labelled=labelled)
                print(block, flush=True)
        self._window.steps += 1
        return batches, self._over_processes(counts, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """None: `get_batch_samples` counts for training, and evaluation counts its own batch without a collective."""
        return None

    def _over_processes(self, counts: Counts, device: torch.device) -> Counts:
        """The counts summed over the processes: one reduce a step."""
        if not self.args.average_tokens_across_devices or self.args.world_size == 1:
            return counts
        local = torch.stack([torch.as_tensor(c, dtype=torch.float64, device=device) for c in counts[:3]])
        same_batch = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        hard, soft, rows = self.accelerator.reduce(local.float(), reduction="sum").div(same_batch).unbind()
        # Gradients are averaged over processes: the scale makes it a sum again.
        return Counts(hard, soft, rows, scale=self.accelerator.num_processes // self.get_tp_size())

    # ---- the loss ----

    def _objective(self, *, training: bool, steps_ago: int = 0) -> tuple[Objective, SoftTargetLoss]:
        """The mixture at this step; evaluation uses the end of a schedule, so that its losses can be compared."""
        done = (self.state.global_step - steps_ago) / max(self.state.max_steps - 1, 1) if training else 1.0
        return self._objective_at(min(done, 1.0))

    def _objective_at(self, progress: float) -> tuple[Objective, SoftTargetLoss]:
        kd = self.kd_args
        alpha = scheduled(kd.kd_alpha, kd.kd_alpha_end, kd.kd_schedule, progress)
        temperature = scheduled(kd.kd_temperature, kd.kd_temperature_end, kd.kd_schedule, progress)
        if (alpha, temperature) not in self._objectives:
            smoothing = self.args.label_smoothing_factor
            objective = Objective(
                alpha, temperature, kd.kd_divergence, kd.kd_beta, kd.kd_reduction, kd.kd_positions, smoothing
            )
            soft_loss = SoftTargetLoss(
                temperature=temperature, divergence=kd.kd_divergence, beta=kd.kd_beta, reduction="sum"
            )
            self._objectives = {(alpha, temperature): (objective, soft_loss)}
        return self._objectives[alpha, temperature]

    def _with_decoder_inputs(self, head: Head | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders build their decoder's inputs from labels: built once here, for both models."""
        if head is None or head.name != "seq2seq_lm" or "decoder_input_ids" in inputs or inputs.get("labels") is None:
            return inputs
        student = self.accelerator.unwrap_model(self.model)
        build = getattr(student, "prepare_decoder_input_ids_from_labels", None)
        return inputs if build is None else {**inputs, "decoder_input_ids": build(labels=inputs["labels"])}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """alpha * soft + (1 - alpha) * hard of a micro-batch, divided by the counts of the whole optimizer step.

        Args:
            model: the student as the accelerator wrapped it.
            inputs: a prepared batch; it is not changed.
            num_items_in_batch: the `Counts` that `get_batch_samples` made; None counts this batch alone.

        Returns:
            The loss, or the loss and a mapping with the keys that the student returns for a batch with labels.
        """
        fit = self._look_at(inputs)
        objective, soft_loss = self._objective(training=model.training)
        counts = num_items_in_batch if num_items_in_batch is not None else objective.count(fit.head, inputs)
        if not isinstance(counts, Counts):
            mend = "Call super().get_batch_samples(...), or pass num_items_in_batch=None to count this batch alone."
            fail("num_items_in_batch", counts, "the Counts of get_batch_samples, or None", mend, error=TypeError)
        inputs = self._with_decoder_inputs(fit.head, inputs)
        teacher_logits = None
        if self.teacher is not None and not (self._always_hard and model.training):
            teacher_logits = self.teacher(inputs, self.accelerator)
        outputs = model(**model_inputs(inputs, fit.accepted))
        logits = logits_of(outputs, "model")
        if teacher_logits is not None:
            teacher_logits = teacher_logits.to(logits.device)
        parts = objective(fit.head, soft_loss, logits, teacher_logits, inputs, counts)
        self._finite.see(parts.total, logits, teacher_logits, self.state.global_step)
        self._collect(parts, counts, model.training)
        return (parts.total, _as_mapping(outputs, parts.total)) if return_outputs else parts.total

    def _collect(self, parts: Parts, counts: Counts, training: bool) -> None:
        """Keeps the parts on the device: summed for the training log, gathered row by row as `eval_loss` is."""
        if not training and self._eval_rows is None:
            return
        hard, soft, agreement = (v.detach() if isinstance(v, Tensor) else v for v in parts[1:])
        row = (hard, soft, agreement, counts.hard)
        if training:
            self._window.add(row)
        elif self._eval_rows is not None:
            values = as_tensor([row], parts.total.device)
            self._eval_rows.append(self.gather_function(values.repeat(self.args.eval_batch_size, 1)))

    # ---- evaluation and logs ----

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Upstream's, and a loss for batches without labels too: the soft loss needs none."""
        if self.teacher is None or all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        logits = nested_detach(tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"]))
        return loss.detach(), logits[0] if len(logits) == 1 else logits, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with hard_loss, soft_loss and teacher_agreement beside the loss, weighed as the loss is."""
        outer, self._eval_rows = self._eval_rows, []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            if self._eval_rows and output.metrics is not None:
                output.metrics.update(named(torch.cat(self._eval_rows).mean(0).tolist(), f"{prefix}_"))
        finally:
            self._eval_rows = outer
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`; the window's own log (it has `loss` and `learning_rate`) gets the parts of that loss.

        Only that log is gathered over the processes, so a script may log by itself on one process.
        """
        sums = self._window.sums() if "loss" in logs and "learning_rate" in logs else None
        if sums is not None:
            self._finite.raise_noted()
            mean = self.accelerator.reduce(sums, reduction="mean") / max(self._window.steps, 1)
            logs.update(named(mean.tolist(), ""))
            if self.kd_args.kd_schedule != "constant":
                objective, _ = self._objective(training=True, steps_ago=1)  # of the step that has just ended
                logs.update(kd_alpha=objective.alpha, kd_temperature=objective.temperature)
            self._window = Window(self.args.device)
        super().log(logs, start_time)

    # ---- columns and the model card ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        taken = () if self.teacher is None or self.teacher.accepted is None else self.teacher.accepted
        self._keep_columns([*taken, *(TEACHER_PREFIX + name for name in taken)])

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        self._keep_columns(name for name in dataset.column_names if name.startswith(TEACHER_PREFIX))
        return super()._remove_unused_columns(dataset, description=description)

    def _keep_columns(self, names: Iterable[str]) -> None:
        """Upstream removes what the student's forward does not take; the teacher may need it."""
        kept: list[str] = self._signature_columns or []
        self._signature_columns = [*kept, *sorted(set(names) - set(kept))]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card` with a section on the distillation: teacher, formula and the last results."""
        super().create_model_card(*args, **kwargs)
        path = Path(str(self.args.output_dir)) / "README.md"
        if self.teacher is None or not self.is_world_process_zero() or not os.path.exists(path):
            return
        text = path.read_text(encoding="utf-8")
        section = card_section(self.summary(), self.state.log_history)
        write_atomically(path, text.split("\n## Distillation\n")[0].rstrip() + "\n\n" + section)


class DistillationTrainer(DistillationMixin, Trainer):
    """A `Trainer` that distils: everything as `Trainer`, plus `teacher_model`.

    Example::

        trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=data)
        trainer.train()
    """


def _as_mapping(outputs: Any, loss: Tensor) -> Any:
    """Upstream's `prediction_step` takes the values of a mapping, less "loss": so every kind of output becomes one."""
    if isinstance(outputs, Tensor):
        return {"loss": loss, "logits": outputs}
    if isinstance(outputs, Mapping):
        outputs["loss"] = loss  # type: ignore[index]
        return outputs
    scalars_dropped = [v for v in outputs if not (isinstance(v, Tensor) and v.dim() == 0)]
    return {"loss": loss, **{f"output_{i}": v for i, v in enumerate(scalars_dropped)}}

"""`DistillationTrainer`: a `Trainer` whose loss is the mixture of the labels' and a teacher's.

For: any script that builds a `Trainer`. The mixin overrides where upstream computes, counts and logs the loss, and
nothing else; formulas stand in the files below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from .cache import CachedCollator, CachedTeacher
from .diagnostics.check import Inspection, LossOfPlan, examine
from .diagnostics.results import CheckResult, has_errors
from .losses.fused_linear import release_memory
from .losses.modules import SoftTargetLoss
from .report.seeds import Compared, compare_over_seeds
from .tasks import PackingWatch, Task, accepted_inputs, changed_attributes, model_inputs, unchanged_attributes
from .tasks.inputs import Accepted, WithTeacherColumns, student_columns, teacher_columns
from .tasks.predictions import as_mapping, generated_with_loss, kept_outputs, kept_tensors
from .teachers import Teacher, routed
from .teachers.sequences import StudentRows
from .training import Counts, DistillationArguments, MetricsBuffer, Objective, Plan, Settings, Setup, is_sharded
from .training import bases as bases
from .training.checkpoints import Checkpoints, ResumableInterrupt
from .training.logs import Evaluation, FiniteWatch, logged_row
from .training.own_loss import OwnHardLoss
from .training.projectors import TermModules
from .training.start_block import print_start, put_card_section, summary_of, write_summary
from .training.step_loss import MicroBatch, TeacherOutputs, counts_of, counts_of_step, own_rows
from .training.teacher_cache import TeacherCache

if TYPE_CHECKING:  # at run time the mixin has no base, so that it can stand in front of any Trainer class
    _InFrontOf = Trainer
else:
    _InFrontOf = object


class DistillationMixin(_InFrontOf):
    """Puts distillation in front of any `Trainer` class: `class MyKD(DistillationMixin, MyTrainer)`.

    Args:
        teacher_model: a module, a folder or a hub name, or "adapter_off": the student's own base, with the student's
            adapters switched off; or a `CachedTeacher`; or a list of these: see `SeveralTeachers`. None takes
            `args.teacher_model_name_or_path`. Needed unless `kd_alpha` is constantly 0.

    Raises:
        TypeError: the bases are in the wrong order, hold no `Trainer`, or one whose own `compute_loss` would never be
            called; or `alpha`/`temperature` are passed.
        ValueError: teacher and student do not fit (see `compatibility`); or an option of upstream that the loss does
            not support (DataParallel, Ulysses sequence parallelism).
    """

    # The loss is divided once by the counts of the whole optimizer step: upstream must not divide again.
    loss_is_scaled_for_ga: bool | None = True
    _signature_columns: Any  # upstream declares it as None
    _student_columns: frozenset[str]  # those that upstream keeps

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases.check_bases(cls, DistillationMixin)

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *trainer_args: Any,
        teacher_model: nn.Module | CachedTeacher | str | Path | Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        bases.check_call(self, args, kwargs)
        with bases.room_for_fields(type(self), DistillationMixin, args):
            super().__init__(model, args, *trainer_args, **kwargs)
        bases.refuse_lone_processes(self.args)  # which upstream makes where none are given
        self.label_smoother = None  # the hard loss is smoothed already: `Seq2SeqTrainer` would do it again
        self._run_settings = Settings(self.args)
        self._setup = Setup(self, self._run_settings, self._is_training_step)
        with self._setup.refusals_wait():
            bases.check_options(self.args, self.kd_args.kd_hard_loss, self.compute_loss_func, self.accelerator)
        if not self.label_names:  # a plain module's forward names no labels; the batch still has them
            self.label_names = ["labels"]
        bases.check_smoothing(self.args.label_smoothing_factor, self.label_names)
        self.teacher: Teacher | None = None
        self._teacher_cache = cache = TeacherCache(self, self._setup, self._run_settings)
        with self._setup.refusals_wait():
            cache.given = self._setup.named_teacher(teacher_model)
            self.teacher = self._setup.load(cache.given, cache.finished)
        if cache.can_build:
            cache.identity()
        self._plan: Plan | None = None
        self._started, self._term_modules = False, TermModules()
        self._teacher_outputs = TeacherOutputs(cache.at_hand)
        self._predicting = self._loss_only = False  # in a `prediction_step`; in one whose outputs are dropped
        self._metrics_buffer, self._student_rows = MetricsBuffer(self.args.device), StudentRows()
        self._evaluation: Evaluation | None = None
        finite_mode = self._run_settings.finite_mode(self.args.device.type)
        self._finite, self._packing = FiniteWatch(finite_mode, self.args.process_index), PackingWatch()
        ResumableInterrupt.add_to(self)

    @property
    def kd_args(self) -> DistillationArguments:
        """The `kd_*` and `teacher_*` arguments as they were last read."""
        return self._run_settings.kd

    def unwrapped_student(self) -> nn.Module:
        """The student without what processes and compilers put around it."""
        return bases.unwrapped(cast(nn.Module, self.model), self.accelerator)

    @property
    def _task(self) -> Task | None:
        """The student's task, as far as it is known."""
        return self._plan.task if self._plan else self._setup.task(self.teacher)

    def _is_training_step(self, student: nn.Module) -> bool:
        """Whether a loss is for a training step, whatever mode the student is in: it may stay in eval mode."""
        # Outside of `train` and `evaluate` only the mode is known; that of a DeepSpeed engine is always True.
        return self._evaluation is None and not self._predicting and (self.is_in_train or student.training)

    # ---- before the first step ----

    def _plan_of(self, batch: Mapping[str, Any]) -> Plan:
        """The plan of the loss: made on the first batch, then returned as it is."""
        self._plan = self._setup.plan(batch, self.teacher, self._plan)
        self.teacher = self._plan.teacher
        return self._plan

    def build_teacher_cache(self, dataset: Any = None, *, name: str | None = None) -> CachedTeacher:
        """Runs the teacher once on all training and evaluation data and writes its outputs to `teacher_cache_dir`.

        `train()` does it where `teacher_cache_dir` is set, and `kd_run` "cache" from any script. Finished parts are
        checked and kept; an interrupted build goes on. Every process must call it: they share the work.

        It returns the cached teacher, which replaces the trainer's. Arguments and errors: see `TeacherCache.build`.
        """
        self.teacher, self._plan = (cached := self._teacher_cache.build(self.teacher, dataset, name)), None
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        return cached

    def _follow_settings(self) -> None:
        """Reads the arguments again where a script or a callback has changed them since."""
        other_plan = self._run_settings.follow(self.args, self.teacher)
        if other_plan is not None:
            self._finite.mode = self._run_settings.finite_mode(self.args.device.type)
            self._plan = None if other_plan else self._plan

    def _hp_search_setup(self, trial: Any) -> None:
        """Upstream calls this first in every training, with a trial or without."""
        super()._hp_search_setup(trial)
        self._follow_settings()
        self._run_settings.require_teacher(self.teacher)

    def check(self, *, evaluate: bool = True, batch: Mapping[str, Any] | None = None) -> list[CheckResult]:
        """Checks the setup, runs one batch through both models, and prints a table.

        `kd_run` "check" does it from any script. Nothing is trained: weights, random numbers and trainer are afterwards
        what they were. Every process must call it; the first one prints.

        Args:
            evaluate: whether teacher and untrained student are compared on up to 50 evaluation batches.
            batch: used instead of the first one of the training data.

        Returns:
            The rows: `status` ("ok", "warning" or "error"), `what` was checked, what was `found`, how to `fix` it.
        """

        def compute_loss(model: nn.Module, batch: dict, counts: Counts | None, plan: Plan) -> LossOfPlan:
            self._plan, self._metrics_buffer = plan, MetricsBuffer(self.args.device)
            loss = self.compute_loss(model, batch, num_items_in_batch=counts)
            return LossOfPlan(loss, self._metrics_buffer, self._plan)

        setup, mode = self._setup, "off" if self._finite.mode == "off" else "step"
        inspection = Inspection(self, self._run_settings, setup, self._loss_shifts_labels, compute_loss)
        unchanged = unchanged_attributes(self, "teacher", "_plan", "_metrics_buffer", "_finite")
        with unchanged, unchanged_attributes(setup, "each_alone"), self._with_term_modules():
            self._finite, setup.each_alone = FiniteWatch(mode, self.args.process_index), not is_sharded(self)
            return examine(inspection, evaluate=evaluate, batch=batch)

    def _with_term_modules(self) -> AbstractContextManager[None]:
        student, task = self.unwrapped_student(), self._task
        return self._term_modules.on(student, self.teacher, self._run_settings, self.args.seed, task)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, which creates the optimizer; before, the terms add their modules (projectors) to the student."""
        with self._with_term_modules():
            if kwargs.get("resume_from_checkpoint") and not is_sharded(self):
                self._term_modules.load(Path(kwargs["resume_from_checkpoint"]))
            return super()._inner_training_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; writes `distillation.json` (formula and teacher, for the report) beside the results.

        It resumes from whole checkpoints alone: True takes the newest; a named one that is not whole is a ValueError.
        With `kd_run` "check" it runs `check` instead, with "cache" `build_teacher_cache`, with "compare" the comparison
        of `report/seeds.py`, and raises SystemExit.
        """
        kd_run = DistillationArguments.of(self.args).kd_run
        if kd_run == "check":
            if not is_sharded(self):
                raise SystemExit(int(has_errors(self.check())))
            self.callback_handler.callbacks = []  # `get_batch_samples` checks, after training's own preparation
        if kd_run == "compare":
            compare_over_seeds(Compared(self, self._changed, lambda: self._plan, self._loss_shifts_labels))
            raise SystemExit(0)
        if self._teacher_cache.can_build and (not self._run_settings.always_hard or kd_run == "cache"):
            self.build_teacher_cache()
        elif self.teacher is not None:
            self._teacher_cache.check(self.teacher)
        if kd_run == "cache":
            self.accelerator.wait_for_everyone()  # a launcher ends the others when one has ended
            raise SystemExit(0)
        self._started, self._metrics_buffer = False, MetricsBuffer(self.args.device)
        self._finite = FiniteWatch(self._finite.mode, self._finite.process)
        try:
            result = super().train(self._checkpoints.resume_from(resume_from_checkpoint), *args, **kwargs)
        finally:
            release_memory()
            ResumableInterrupt.restore_all(self.callback_handler.callbacks)
        self._raise_noted()
        if self.teacher is not None and not self._run_settings.always_hard and self.is_world_process_zero():
            write_summary(self.args.output_dir, self.summary())
        return result

    @contextmanager
    def _changed(self, arguments: Mapping[str, Any], **attributes: Any) -> Iterator[None]:
        """The trainer with other arguments and attributes; a teacher that it is without leaves the device."""
        if self.teacher is not None and attributes.get("teacher", self) is None:
            self.teacher.release(self.unwrapped_student())
        try:
            with changed_attributes(self.args, **arguments), changed_attributes(self, _plan=None, **attributes):
                self._run_settings.read(self.args)
                yield
        finally:
            self._run_settings.read(self.args)

    def summary(self) -> dict[str, Any]:
        """Teacher, formula and the numbers in it, as JSON values: for the report and the model card."""
        teacher = None if self.teacher is None else self.teacher.identity()
        task = self._plan.task if self._plan else None
        formulas = [self._run_settings.objective_at(progress)[0].formula(task) for progress in (0.0, 1.0)]
        return summary_of(self.kd_args, task, formulas, teacher, self.unwrapped_student())

    # ---- checkpoints ----

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.args, self.accelerator)  # a hyperparameter search replaces the accelerator

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._get_output_dir(trial=trial)
        with self._checkpoints.saving(folder, self.state):
            super()._save_checkpoint(model, trial)
            if self.args.should_save and not self.args.save_only_model and not is_sharded(self):
                self._term_modules.save(Path(folder, f"checkpoint-{self.state.global_step}"))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        self._checkpoints.check_best(best)
        if not self._loaded(best):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._loaded(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _loaded(self, folder: str) -> bool:
        """Whether the task has loaded the student from a folder that upstream cannot read."""
        return self._task is not None and self._task.load(self.unwrapped_student(), folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=self._term_modules.left_out(self.unwrapped_student(), state_dict))
        if self._task is not None and self.args.should_save:
            self._task.save(self.unwrapped_student(), output_dir or str(self.args.output_dir))

    # ---- counting: once for each optimizer step ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Upstream's batches of one optimizer step, with the denominators of its losses instead of one number."""
        if self.is_in_train and 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True  # resumed at its end: upstream would take one step more
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._follow_settings()
        if self.kd_args.kd_run == "check":
            raise SystemExit(int(has_errors(self.check(batch=batches[0]))))
        plan = self._plan_of(batches[0])
        objective, _ = self._objective(training=True)
        if self.kd_args.kd_student_fraction > 0:
            batches, num_items = self._student_rows.written(batches, self, plan, self._same_batch()), None
        for batch in batches:
            self._packing.look(plan.task, batch, objective.reduction)
        if num_items is None and plan.takes_num_items(self._run_settings.always_hard):
            num_items = super()._get_num_items_in_batch(batches, device)
        counts = counts_of_step(plan, objective, batches, num_items, always_hard=self._run_settings.always_hard)
        if not self._started:
            self._started = True
            self._packing.look(plan.task, batches[0], objective.reduction, now=True)
            if self.is_world_process_zero():
                last, notes = self._objective(training=False)[0], bases.not_logged(type(self))
                print_start(plan, objective, last, batches[0], counts, self.label_names, notes)
        self._metrics_buffer.steps += 1
        if not self.args.average_tokens_across_devices or self.args.world_size == 1:
            return batches, counts
        return batches, counts.over_processes(self.accelerator, device, self._same_batch(), self._scale())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Upstream's where the hard loss is divided by it; else None, without a collective."""
        needed = self._plan is not None and self._plan.takes_num_items(self._run_settings.always_hard)
        return super()._get_num_items_in_batch(batch_samples, device) if needed else None

    def _same_batch(self) -> int:  # processes that share each batch
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _scale(self) -> int:
        """Gradients are averaged over processes: times this they are a sum again, where the counts are global."""
        return self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1

    # ---- the loss ----

    def _objective(self, *, training: bool, steps_ago: int = 0) -> tuple[Objective, SoftTargetLoss]:
        return self._run_settings.objective(self.state, training=training, steps_ago=steps_ago)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """alpha * soft + (1 - alpha) * hard of a micro-batch, divided by the counts of the whole optimizer step.

        Args:
            model: the student as the accelerator wrapped it.
            inputs: a prepared batch; it is not changed.
            num_items_in_batch: the `Counts` that `get_batch_samples` made; None counts this batch alone.
            return_outputs: whether a mapping with the keys that the student returns for labels is returned too.
        """
        plan = self._plan_of(inputs)
        training = self._is_training_step(plan.student)
        objective, soft_loss = self._objective(training=training)
        if not isinstance(num_items_in_batch, Counts):
            self._packing.look(plan.task, inputs, objective.reduction)
        takes_items = plan.takes_num_items(self._run_settings.always_hard)
        counts = counts_of(num_items_in_batch, plan, objective, inputs, self._scale() if takes_items else None)
        inputs = plan.task.with_decoder_inputs(plan.student, inputs)
        evaluates = not training and self._evaluation is not None and not plan.own_loss
        own = own_rows(self.accelerator, objective, plan, inputs, counts, self._same_batch()) if evaluates else None
        function, takes_items = self.compute_loss_func, self.model_accepts_loss_kwargs
        own_loss = OwnHardLoss(function, takes_items, self._scale()) if plan.own_loss else None
        teacher = None if self._run_settings.always_hard and training else plan.teacher
        batch = MicroBatch(plan, objective, soft_loss, model, teacher, inputs, counts, training, own)
        needs_logits = return_outputs and not self._loss_only
        result = batch.loss(self._teacher_outputs, self.accelerator, own_loss, needs_logits=needs_logits)
        self._plan, total = batch.plan, result.parts.total
        self._finite.see(
            total, result.student, result.teacher, self.state.global_step, of=result.of,
            fault=lambda: plan.task.fault(inputs, result.classes),
        )  # fmt: skip
        if training:
            self._metrics_buffer.add(logged_row(result.parts, result.counts))
            self._student_rows.agreed += [] if result.parts.generated is None else [result.parts.generated]
        elif self._evaluation is not None:
            self._evaluation.add(batch, result, self.gather_function, self.args.eval_batch_size)
        return (total, as_mapping(result.outputs, total)) if return_outputs else total

    # ---- evaluation and logs ----

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None, **gen_kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Upstream's, with the loss of `compute_loss` where it generates and for batches without labels too."""
        with changed_attributes(self, _loss_only=prediction_loss_only, _predicting=True):
            step = (model, inputs, prediction_loss_only, ignore_keys)
            loss, outputs, labels = self._prediction_step(*step, **gen_kwargs)
        return loss, kept_tensors(outputs), labels

    def _prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any, **gen_kwargs: Any
    ) -> tuple[Any, Any, Any]:
        generates = isinstance(self, Seq2SeqTrainer) and getattr(self.args, "predict_with_generate", False)
        if generates and not prediction_loss_only:
            stock = partial(super().prediction_step, prediction_loss_only=False, ignore_keys=ignore_keys, **gen_kwargs)
            taken = {*model_inputs(inputs, self._accepted()), *self.label_names}
            return generated_with_loss(
                stock, partial(self.compute_loss, model), self._prepare_inputs(inputs), taken, self.teacher is not None
            )
        labelled = all(inputs.get(name) is not None for name in self.label_names)
        if labelled:
            self._plan_of(inputs)  # upstream counts the items of the batch for a loss of the model's own
        if self.teacher is None or labelled:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.detach(), None if prediction_loss_only else kept_outputs(outputs, self.model, ignore_keys), None

    def _accepted(self) -> Accepted:
        """The inputs that the student's forward takes; without a plan slow where DeepSpeed is installed."""
        if self._plan is not None and self._plan.model is self.model:
            return self._plan.accepted
        return accepted_inputs(self.unwrapped_student(), label_names=self.label_names)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with the terms, teacher_agreement and perplexity beside the loss: see `Evaluation`."""
        self._follow_settings()
        evaluation = Evaluation(self.args.device)
        try:
            with changed_attributes(self, _evaluation=evaluation), self._with_term_modules():
                output = super().evaluation_loop(*args, **kwargs)
            self._packing.raise_noted()
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            if self._plan is not None and output.metrics is not None:
                objective, _ = self._objective(training=False)
                evaluation.add_to(output.metrics, f"{prefix}_", self.accelerator, self._plan, objective)
        finally:
            self._teacher_cache.release_at_hand()
            if not self.is_in_train:
                release_memory()
        return output

    def _raise_noted(self) -> None:
        self._finite.raise_noted()
        self._packing.raise_noted()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`; only the log of training is gathered over the processes and gets the parts of the loss."""
        if "loss" in logs and "learning_rate" in logs:
            self._raise_noted()
            objective, _ = self._objective(training=True, steps_ago=1)  # of the step that has just ended
            means = self._metrics_buffer.means(self.accelerator, cast(Plan, self._plan).task, objective)
            if means and self.kd_args.kd_schedule != "constant":
                means.update(kd_alpha=objective.alpha, kd_temperature=objective.temperature)
            logs.update(means | self._student_rows.means(self.accelerator, self.args.device))
            self._metrics_buffer = MetricsBuffer(self.args.device)
        super().log(logs, start_time)

    # ---- columns and the model card ----

    def columns_for_teacher(self) -> set[str]:
        """Columns that upstream would remove and that stay for the teacher."""
        self._set_signature_columns_if_needed()
        return set(self._signature_columns or ()) - self._student_columns

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; where the teacher is read from disk, its outputs join the batches."""
        stores, rows, collator = self._teacher_cache.stores(dataset, self.teacher), dataset, self.data_collator
        collator = routed(collator, self.teacher)
        if stores:
            collator = CachedCollator(collator, stores)
            rows, kwargs = self._teacher_cache.numbered(dataset, description, kwargs)
        with changed_attributes(self, data_collator=collator):
            return super()._get_dataloader(rows, description, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = student_columns(self._signature_columns, self.unwrapped_student())
            self._student_columns = frozenset(self._signature_columns)
        taken = () if self.teacher is None else self.teacher.accepted
        self._signature_columns = teacher_columns(self._signature_columns, taken)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        self._signature_columns = teacher_columns(self._signature_columns, of=dataset.column_names)
        return super()._remove_unused_columns(dataset, description=description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Upstream's, for streams: what columns they have is known row by row."""
        if isinstance(data_collator, CachedCollator):  # outermost: what it takes is no list of rows
            return data_collator.around(lambda own: self._get_collator_with_removed_columns(own, description))
        collator = super()._get_collator_with_removed_columns(data_collator, description=description)
        if isinstance(collator, RemoveColumnsCollator):
            collator.signature_columns = WithTeacherColumns(collator.signature_columns)
        return collator

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card` with a section on the distillation: teacher, formula and the last results."""
        super().create_model_card(*args, **kwargs)
        if self.teacher is not None and self.is_world_process_zero():
            put_card_section(self.args.output_dir, self.summary(), self.state.log_history)


class DistillationTrainer(DistillationMixin, Trainer):
    """A `Trainer` with distillation: `DistillationTrainer(student, args, teacher_model=teacher, ...)`."""


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` with distillation: its arguments (else a TypeError), and `teacher_model`.

    With `predict_with_generate` the predictions are the generated tokens; `eval_loss` is the distillation loss still.
    """

    def __init__(self, model: Any = None, args: Any = None, *trainer_args: Any, **kwargs: Any) -> None:
        bases.check_generation_arguments(args)
        super().__init__(model, args, *trainer_args, **kwargs)

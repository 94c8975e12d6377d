"""Breaks the line that guards each trap of the Trainer contract, and runs the tests that must fail then.

`python tests/helpers/traps.py` does so in a copy of the project, one trap after the other, and prints which test
noticed; `python tests/helpers/traps.py 7 41` those two. It ends with 1 where one went unnoticed. Of traps that the
tests themselves must not fall into (30, 31, 35) a line of the tests is broken.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Trap(NamedTuple):
    """A statement, the line that makes it true, that line broken, and the tests that notice."""

    statement: str
    file: str
    line: str
    broken: str
    tests: str  # arguments of pytest


TRAPS = {
    1: Trap(
        "batch 8 = 4 x 2 accumulation, BERT family",
        "kd_trainer/trainer.py",
        "loss_is_scaled_for_ga: bool | None = True",
        "loss_is_scaled_for_ga: bool | None = False",
        "tests/distributed/test_denominators.py -k accumulation",
    ),
    2: Trap(
        "the same with unequal tokens in each micro-batch",
        "kd_trainer/training/step_loss.py",
        "counts = given if given is not None else objective.count(plan.task, inputs)",
        "counts = objective.count(plan.task, inputs)",
        "tests/distributed/test_denominators.py -k accumulation",
    ),
    3: Trap(
        "W multiplies hard and soft exactly once",
        "kd_trainer/trainer.py",
        "return self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1",
        "return 1",
        "tests/distributed/test_denominators.py -k two_processes_change",
    ),
    4: Trap(
        "average_tokens_across_devices=False runs with local counts",
        "kd_trainer/trainer.py",
        "if not self.args.average_tokens_across_devices or self.args.world_size == 1:",
        "if self.args.world_size == 1:",
        "tests/distributed/test_denominators.py -k local_counts",
    ),
    5: Trap(
        "an incomplete last window is invariant",
        "kd_trainer/training/objective.py",
        "each = [self.count(task, batch) for batch in batches]",
        "each = [self.count(task, batches[0])] * len(batches)",
        "tests/distributed/test_denominators.py -k incomplete",
    ),
    6: Trap(
        "an all-masked micro-batch is finite",
        "kd_trainer/losses/reductions.py",
        "return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))",
        "return total / count",
        "tests/training/test_trainer.py -k without_any_label",
    ),
    7: Trap(
        "a causal count uses labels[..., 1:]",
        "kd_trainer/tasks/task.py",
        "[..., 1:] if self.shifted else column",
        "[..., :-1] if self.shifted else column",
        "tests/training/test_trainer.py -k first_loss",
    ),
    8: Trap(
        "T5 never shifts",
        "kd_trainer/tasks/kinds.py",
        '"seq2seq_lm",\n            token_level=True,',
        '"seq2seq_lm",\n            token_level=True,\n            shifted=True,',
        "tests/training/test_trainer.py tests/tasks/test_seq2seq.py -k never_shift",
    ),
    9: Trap(
        "shift_labels are used as they stand",
        "kd_trainer/tasks/task.py",
        'return signed(inputs["shift_labels"])',
        'return F.pad(inputs["shift_labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]',
        "tests/training/test_trainer.py -k shift_labels",
    ),
    10: Trap(
        "training and evaluation without labels give a loss",
        "kd_trainer/trainer.py",
        "if self.teacher is None or labelled:",
        "if True:",
        "tests/training/test_trainer.py -k label_free",
    ),
    11: Trap(
        "inputs are not changed",
        "kd_trainer/tasks/task.py",
        'return inputs if ids is None else {**inputs, "decoder_input_ids": ids}',
        "inputs.update(decoder_input_ids=ids)\n        return inputs",
        "tests/tasks/test_seq2seq.py -k inputs_are_not_changed",
    ),
    12: Trap(
        "predictions are the stock Trainer's",
        "kd_trainer/tasks/predictions.py",
        'outputs["loss"] = loss  # type: ignore[index]\n        return outputs',
        'return {"loss": loss, "logits": outputs["logits"], "again": outputs["logits"]}',
        "tests/training/test_trainer.py -k predictions",
    ),
    13: Trap(
        "tensor, tuple and dict outputs work in predict",
        "kd_trainer/tasks/predictions.py",
        "if isinstance(outputs, Tensor):\n        return",
        "if False:\n        return",
        "tests/training/test_trainer.py -k plain_modules",
    ),
    14: Trap(
        "a teacher with dropout gives the same outputs twice",
        "kd_trainer/teachers/live.py",
        "if any(module.training for module in self._modules):",
        "if False:",
        "tests/training/test_trainer.py -k dropout",
    ),
    15: Trap(
        "the teacher is not the student",
        "kd_trainer/training/setup.py",
        "        check_separate(student, teacher)\n",
        "",
        "tests/training/test_bad_input.py -k teacher",
    ),
    16: Trap(
        "checkpoints and the optimizer hold the student alone",
        "kd_trainer/trainer.py",
        "        self._plan: Plan | None = None\n",
        "        self._plan: Plan | None = None\n"
        "        self.model.taught_by = self.teacher.model if self.teacher else None\n",
        "tests/training/test_trainer.py -k checkpoints_and_optimizer",
    ),
    17: Trap(
        "evaluate before train leaves the student its autocast",
        "kd_trainer/teachers/sharding.py",
        "    if plugin is None:\n        return model.to(device)",
        "    if plugin is None:\n        return accelerator.prepare_model(model, evaluation_mode=True)",
        "tests/distributed/test_backends.py -k evaluation_first",
    ),
    18: Trap(
        "a bf16 run's teacher computes in bf16",
        "kd_trainer/teachers/live.py",
        'autocast = nullcontext() if accelerator.mixed_precision == "no" else accelerator.autocast()',
        "autocast = nullcontext()",
        "tests/training/test_trainer.py -k bf16_teacher",
    ),
    19: Trap(
        "use_cache is off for every call of the teacher",
        "kd_trainer/teachers/live.py",
        "self._off = {name: False for name in costly if name in self.accepted}",
        "self._off = {}",
        "tests/training/test_trainer.py -k use_cache",
    ),
    20: Trap(
        "token_type_ids reach only the model that takes them",
        "kd_trainer/tasks/inputs.py",
        "return {k: v for k, v in inputs.items() if accepted.take(k)}",
        "return {k: v for k, v in inputs.items() if k not in NOT_INPUTS and not k.startswith(TEACHER_PREFIX)}",
        "tests/training/test_trainer.py -k columns_reach",
    ),
    21: Trap(
        "teacher_* columns survive for every kind of dataset",
        "kd_trainer/trainer.py",
        "teacher_columns(self._signature_columns, of=dataset.column_names)",
        "self._signature_columns",
        "tests/teachers/test_live.py tests/teachers/test_columns.py -k columns",
    ),
    22: Trap(
        "packing's columns reach both models",
        "kd_trainer/tasks/inputs.py",
        "names |= set(TransformersKwargs.__annotations__) | _documented(open_ended[0].annotation)",
        "pass",
        "tests/tasks/test_packing.py -k both_models",
    ),
    23: Trap(
        "with predict_with_generate eval_loss has the soft loss",
        "kd_trainer/tasks/predictions.py",
        "stock(distilled, own)",
        "stock(getattr(compute_loss, 'args')[0], own)",
        "tests/tasks/test_seq2seq.py -k generation_leaves",
    ),
    24: Trap(
        "arguments of upstream's constructor pass untouched",
        "kd_trainer/trainer.py",
        "            super().__init__(model, args, *trainer_args, **kwargs)\n        bases",
        '            kwargs.setdefault("optimizer_cls_and_kwargs", None)\n'
        "            super().__init__(model, args, *trainer_args, **kwargs)\n        bases",
        "tests/tasks/test_seq2seq.py -k upstreams_constructor",
    ),
    25: Trap(
        "a wrong order of bases raises",
        "kd_trainer/training/bases.py",
        "    if wrong:\n",
        "    if False:\n",
        "tests/training/test_trainer.py -k wrong_order",
    ),
    26: Trap(
        "one process may log by itself",
        "kd_trainer/trainer.py",
        'if "loss" in logs and "learning_rate" in logs:',
        "if logs:",
        "tests/training/test_trainer.py -k users_own_log",
    ),
    27: Trap(
        "the weighted parts are the logged loss",
        "kd_trainer/training/logs.py",
        "(mean / max(self.steps, 1)).tolist()",
        "(mean / 3).tolist()",
        "tests/training/test_trainer.py -k resuming_inside",
    ),
    28: Trap(
        "parts weigh in evaluation as eval_loss does",
        "kd_trainer/training/logs.py",
        ".repeat(repeats, 1)))",
        "))",
        "tests/training/test_trainer.py -k weighted_parts",
    ),
    29: Trap(
        "an FSDP2 teacher with other layers is sharded by them",
        "kd_trainer/teachers/sharding.py",
        "plugin.transformer_cls_names_to_wrap = layer_classes(model)",
        "pass",
        "tests/distributed/test_backends.py -k wrap_policy_is",
    ),
    30: Trap(
        "tests assert the world size and FSDPModule",
        "tests/helpers/backend_run.py",
        "self.distributed_type = DistributedType.FSDP",
        "pass",
        "tests/distributed/test_backends.py -k 'wrapped_and_left_alone and fsdp2 and same_layers'",
    ),
    31: Trap(
        "tests of ZeRO-3 set the persistence threshold to 0",
        "tests/helpers/backend_run.py",
        '"stage3_param_persistence_threshold": 0,',
        '"stage3_param_persistence_threshold": 1000000,',
        "tests/distributed/test_backends.py -k 'every_parameter and zero3'",
    ),
    32: Trap(
        "DeepSpeed casts the batch: a whole teacher has its dtype",
        "kd_trainer/teachers/sharding.py",
        "parameter.data = parameter.data.to(dtypes[accelerator.mixed_precision])",
        "pass",
        "tests/distributed/test_backends.py -k whole_teacher_under",
    ),
    33: Trap(
        "the parity probe sees what a head does besides",
        "kd_trainer/tasks/output_head.py",
        "if _alike(logits, cap_and_scale(known.float(), *way), 0.0 if exact else room):",
        "if True:",
        "tests/tasks/test_fused_architectures.py",
    ),
    34: Trap(
        "patched forwards get no labels",
        "kd_trainer/tasks/inputs.py",
        '        "labels",\n        "label",',
        '        "label",',
        "tests/training/test_trainer.py -k patched",
    ),
    35: Trap(
        "tests of resuming under FSDP2 use AdamW",
        "tests/helpers/backend_run.py",
        '"resumed": Case("llama", {"optim": "adamw_torch", ',
        '"resumed": Case("llama", {',
        "tests/distributed/test_backends.py -k 'resumed and fsdp2'",
    ),
    36: Trap(
        "perplexity is that of the hard loss",
        "kd_trainer/training/logs.py",
        'zip((term.name for term in terms), sums, strict=True))["hard"]',
        'zip((term.name for term in terms), sums, strict=True))["soft"]',
        "tests/training/test_perplexity.py",
    ),
    37: Trap(
        "question answering: no number of items, two logits, start and end",
        "kd_trainer/tasks/kinds.py",
        "return divide(super().labelled(targets), 2)",
        "return super().labelled(targets)",
        "tests/tasks/test_row_tasks.py -k question_answering",
    ),
    38: Trap(
        "label smoothing is the stock smoother's",
        "kd_trainer/tasks/task.py",
        "label_smoothing=label_smoothing,\n            )",
        "label_smoothing=0.0,\n            )",
        "tests/training/test_trainer.py -k label_smoothing",
    ),
    39: Trap(
        "plain modules train, evaluate, predict and save",
        "kd_trainer/trainer.py",
        'self.label_names = ["labels"]',
        "pass",
        "tests/training/test_trainer.py -k plain_modules",
    ),
    40: Trap(
        "problem_type is in the saved config",
        "kd_trainer/tasks/resolve.py",
        "config.problem_type = next(problem for problem, task in PROBLEM_TYPES.items() if task == name)",
        "pass",
        "tests/training/test_trainer.py -k problem_type",
    ),
    41: Trap(
        "packed = unpacked",
        "kd_trainer/tasks/inputs.py",
        "found = found | (positions[..., 1:] <= positions[..., :-1])",
        "pass",
        "tests/training/test_trainer.py tests/tasks/test_packing.py -k packed_equals",
    ),
}


def break_one(trap: Trap, copy: Path) -> list[str]:
    """The tests that fail in `copy` of the project with the line broken; it is restored afterwards."""
    path = copy / trap.file
    whole = path.read_text(encoding="utf-8")
    assert whole.count(trap.line) == 1, f"{trap.file} has {whole.count(trap.line)} times {trap.line!r}"
    path.write_text(whole.replace(trap.line, trap.broken), encoding="utf-8")
    command = f"{sys.executable} -m pytest -q -x -m '' -p no:cacheprovider {trap.tests}"
    try:
        run = subprocess.run(
            command, shell=True, cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        path.write_text(whole, encoding="utf-8")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, flags=re.M)


def main(numbers: list[int]) -> int:
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=shutil.ignore_patterns(".git", "outputs")))
        for number in numbers:
            failed = break_one(TRAPS[number], copy)
            unnoticed += not failed
            print(f"{number:2} {TRAPS[number].statement}: {failed[0] if failed else 'NOT NOTICED'}", flush=True)
    return min(unnoticed, 1)


if __name__ == "__main__":
    raise SystemExit(main([int(number) for number in sys.argv[1:]] or list(TRAPS)))

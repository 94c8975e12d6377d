"""Rows with text of the student's own (on-policy): drawn, generated, and put into the batch before anything is counted.

For: `trainer.py`, once for each optimizer step. Which rows are drawn and which tokens are sampled depends on the seed,
the step, the number of the row in the step and the student alone, not on how the step is split.
Shapes: B rows, S positions, V token ids, N rows that are generated, W columns of the longest prompt, M new tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as warpers

from ..losses import IGNORE_INDEX
from ..tasks import (
    STUDENT_TOKENS,
    TEACHER_PREFIX,
    Accepted,
    Task,
    is_packed,
    same_random_numbers,
    text_config,
    unchanged_modes,
)
from ..validation import check_number, fail, nearest, quoted
from .sharding import reshard
from .teacher import Teacher

MAX_NEW_TOKENS = 128  # where kd_max_new_tokens is unset
# Options of sampling, in the order in which `generate` applies them: here the draw comes behind them.
_SAMPLING: dict[str, Any] = {
    "temperature": warpers.TemperatureLogitsWarper,
    "top_k": warpers.TopKLogitsWarper,
    "top_p": warpers.TopPLogitsWarper,
    "min_p": warpers.MinPLogitsWarper,
    "typical_p": warpers.TypicalLogitsWarper,
    "epsilon_cutoff": warpers.EpsilonLogitsWarper,
}
# What else of `GenerationConfig` may be set; beams, lengths and the form of the result are not free.
_OPTIONS = (
    *("do_sample", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "eos_token_id", "pad_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "cache_implementation"),
)
# Set so that the model's own generation config does not change the distribution that is sampled.
_PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": 1.0, "top_p": 1.0}
_REBUILT = frozenset({"input_ids", "attention_mask", "labels", "position_ids"})


def check_student_fields(kd: Any) -> None:
    """Raises where kd_student_fraction, kd_max_new_tokens or kd_generation_kwargs has no meaning beside the others."""
    given = {name: getattr(kd, name) for name in ("kd_max_new_tokens", "kd_generation_kwargs")}
    if kd.kd_generation_kwargs is not None and not isinstance(kd.kd_generation_kwargs, dict):
        shown, fix = quoted(kd.kd_generation_kwargs), 'Write it as {"temperature": 0.9}.'
        fail("kd_generation_kwargs", shown, "a JSON object: names and values", fix, error=TypeError)
    check_number("kd_student_fraction", kd.kd_student_fraction, low=0, high=1)
    if kd.kd_max_new_tokens is not None:
        check_number("kd_max_new_tokens", kd.kd_max_new_tokens, low=1)
    _check_generation_kwargs(kd.kd_generation_kwargs or {})
    if kd.kd_student_fraction == 0:
        for name, value in given.items():
            if value is not None:
                fix = "Set kd_student_fraction, or leave it out."
                fail(name, quoted(value), "no value without kd_student_fraction", fix)
        return
    shown = f"{kd.kd_student_fraction:g}"
    if kd.teacher_cache_dir is not None:
        because = "a cache holds no outputs for text that the student generates"
        fix = "Leave teacher_cache_dir out: the teacher is run in every step."
        fail("kd_student_fraction", shown, "0 with teacher_cache_dir", fix, because=because)
    if kd.kd_cross_tokenizer != "error":
        because = "the text chunks of the columns are not those of text that the student generates"
        fail("kd_student_fraction", shown, f"0 with kd_cross_tokenizer {kd.kd_cross_tokenizer!r}",
             "Leave one of the two out.", because=because)  # fmt: skip
    if kd.kd_alpha == 0 and kd.kd_schedule == "constant":
        because = "the rows that the student writes have no hard loss"
        fail("kd_student_fraction", shown, "0 with kd_alpha 0", "Set kd_alpha above 0.", because=because)


def _check_generation_kwargs(given: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that generation cannot take here, or a value that it would not take."""
    known = {*_SAMPLING, *_OPTIONS}
    for name, value in given.items():
        if name not in known:
            fix = nearest(name, known) or f"Known are {', '.join(sorted(known))}."
            fail(f"kd_generation_kwargs[{name}]", quoted(value), "an option of sampling", fix)
        if name in _SAMPLING and value is not None:
            try:
                _SAMPLING[name](value)
            except (ValueError, TypeError) as error:
                fail(f"kd_generation_kwargs[{name}]", quoted(value), f"another value ({error})", "Correct it.")


def check_student_rows(kd: Any, student: Any, task: Task | None, teacher: Teacher | None, fsdp1: bool) -> str | None:
    """Raises ValueError where the student cannot write rows, or no teacher is run on them; a line on them."""
    fraction = kd.kd_student_fraction
    if not fraction:
        return None
    if task is None or not (task.over_tokens and task.left_to_right) or task.encoder_decoder:
        expected = "0 for the task" if task is None else f"0 for the task {task.name!r}"
        fail("kd_student_fraction", fraction, expected, "Leave it out.", because="only causal language models generate")
    if not hasattr(student, "generate"):
        expected, fix = f"0 with a {type(student).__name__}, which has no generate()", "Take a model of transformers."
        fail("kd_student_fraction", fraction, expected, fix)
    if teacher is not None and any(member.live is None for member in teacher.members):
        because = "a cache holds no outputs for text that the student generates"
        fix = "Give the live teacher, or leave kd_student_fraction out."
        fail("kd_student_fraction", fraction, "0 with a CachedTeacher", fix, because=because)
    if fsdp1:
        fail("fsdp_version", 1, "2 with kd_student_fraction", "Set fsdp_version to 2 in the accelerate config.")
    length = kd.kd_max_new_tokens or MAX_NEW_TOKENS
    return f"the student writes the completion of {fraction:g} of the rows, up to {length} tokens"


class RowNumbers:
    """The number of each row in its optimizer step, over micro-batches and processes.

    Args:
        seed, step: what else the draws depend on.
        batch_size: rows of a micro-batch; one that is not full is the last.
        processes: that have different rows. index: of this one.
    """

    def __init__(self, seed: int, step: int, batch_size: int, processes: int, index: int) -> None:
        self._key, self._size, self._processes, self._index = (seed, step), batch_size, processes, index

    def draws(self, micro_batch: int, rows: int, count: int) -> Tensor:
        """[rows, count] uniform in [0, 1), from a generator for each row."""
        first = (micro_batch * self._processes + self._index) * self._size
        drawn = []
        for row in range(first, first + rows):
            key = " ".join(map(str, (*self._key, row))).encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            drawn.append(torch.rand(count, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(drawn) if drawn else torch.zeros(0, count)


class InverseCDF(LogitsProcessor):
    """Leaves one id of each row: the first whose cumulative probability exceeds the row's draw for this step.

    Args:
        draws: [N, M] uniform in [0, 1).
        width: W, columns of the prompts.
    """

    def __init__(self, draws: Tensor, width: int) -> None:
        self._draws, self._width = draws, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.float().softmax(-1).to(wide).cumsum(-1)
        draw = self._draws[:, input_ids.shape[1] - self._width, None].to(wide) * cumulative[:, -1:]
        ids = (cumulative <= draw).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids.clamp(max=scores.shape[-1] - 1), 0.0)


class StudentRows:
    """Draws rows of the batches and has the student write their completions.

    Attributes:
        counts: since the last log: rows, rows that the student has written, their new tokens, and how many of these
            rows ended by EOS.
    """

    def __init__(self) -> None:
        self.counts = [0.0] * 4
        self.agreed: list[Tensor] = []  # of micro-batches: tokens at which the teacher agrees, and tokens

    def means(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """What is logged of the rows since the last call, {} without any; every process must call it."""
        if not self.counts[0]:  # of no process: each has rows in every step
            return {}
        agreed = torch.stack(self.agreed).sum(0) if self.agreed else torch.zeros(2)
        sums = torch.cat([torch.tensor(self.counts, device=device), agreed.to(device, torch.float32)])
        self.counts, self.agreed = [0.0] * 4, []
        rows, written, tokens, ended, same, compared = accelerator.reduce(sums, reduction="sum").tolist()
        logged = {"student_rows": written / max(rows, 1)}
        if not written:
            return logged
        logged |= {"student_length": tokens / written, "student_ended": ended / written}
        return logged | ({"student_agreement": same / compared} if compared else {})

    def written(self, batches: Sequence[Mapping[str, Any]], trainer: Any, plan: Any, same: int) -> list:
        """`write` for the optimizer step that the trainer is at; `same`: processes that share each batch."""
        accelerator, synced = trainer.accelerator, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        processes, index = accelerator.num_processes // same, accelerator.process_index // same
        step, size = trainer.state.global_step, trainer._train_batch_size
        numbers = RowNumbers(trainer.args.seed, step, size, processes, index)
        return self.write(
            batches, plan.student, plan.accepted, trainer.kd_args, accelerator, numbers, synced=synced
        )  # fmt: skip

    def write(
        self, batches: Sequence[Mapping[str, Any]], student: Any, accepted: Accepted, kd: Any, accelerator: Any,
        numbers: RowNumbers, *, synced: bool,
    ) -> list[Mapping[str, Any]]:  # fmt: skip
        """The batches of an optimizer step, of which some rows have a completion of the student's.

        Args:
            kd: the distillation arguments.
            synced: whether every process takes part in every forward of the student (FSDP2, ZeRO-3).

        Such a row keeps its prompt, the positions before its first label (at least its first token), and has no
        labels; its new tokens are in the column `STUDENT_TOKENS`. Rows without a label stay as they are.
        """
        written = []
        for index, batch in enumerate(batches):
            _check_columns(batch, accepted)
            ids, labels = batch["input_ids"], batch["labels"]
            longest = kd.kd_max_new_tokens or MAX_NEW_TOKENS
            draws = numbers.draws(index, len(ids), 1 + longest).to(ids.device)
            chosen = (draws[:, 0] < kd.kd_student_fraction) & (labels[:, 1:] != IGNORE_INDEX).any(1)
            rows = chosen.nonzero().flatten()
            self.counts[0] += len(ids)
            if len(rows) or synced:  # other processes may have rows, and need this one in every forward
                taken = rows if len(rows) else torch.arange(1, device=ids.device)
                prompts = _prompts(batch, taken)
                new = _generate(student, prompts, draws[taken, 1:], kd, accelerator, synced=synced)
            if len(rows):
                ends = _eos_ids(student, kd).to(ids.device)
                is_end = torch.isin(new, ends)
                kept = is_end.cumsum(1) - is_end.long() == 0  # up to the first EOS
                self._count(kept, is_end)
                batch = _rebuilt(batch, rows, prompts, [row[keep] for row, keep in zip(new, kept, strict=True)],
                                 _pad_id(student, kd))  # fmt: skip
            written.append(batch)
        return written

    def _count(self, kept: Tensor, is_end: Tensor) -> None:
        for place, value in enumerate((len(kept), int(kept.sum()), int(is_end.any(1).sum())), 1):
            self.counts[place] += value


def _check_columns(batch: Mapping[str, Any], accepted: Accepted) -> None:
    """Raises ValueError for a batch whose rows cannot be written again."""
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
        fix = "Give both columns, with -100 at the positions of the prompt."
        there, because = ", ".join(batch), "the prompt ends at the first label"
        fail("inputs", f"a batch with {there}", "input_ids and labels with kd_student_fraction", fix, because=because)
    if bool(is_packed(batch, ids.shape)) or batch.get("shift_labels") is not None:
        because = "a prompt of a packed row would hold the sequences before it"
        fail("inputs", "a packed batch", "one sequence in a row with kd_student_fraction", "Switch packing off.",
             because=because)  # fmt: skip
    if mask is not None and tuple(mask.shape) != tuple(ids.shape):
        shown = f"of shape {tuple(mask.shape)}"
        fail("attention_mask", shown, f"{tuple(ids.shape)} with kd_student_fraction", "Give a mask of tokens.")
    for name, value in batch.items():
        if name in _REBUILT or not isinstance(value, Tensor):
            continue
        of_teacher = name.startswith(TEACHER_PREFIX) and value.shape[:2] == ids.shape
        if accepted.take(name) or of_teacher:
            because = f"{'the teacher' if of_teacher else 'the student'} reads it beside the tokens, which are replaced"
            fail("inputs", f"a batch with {name}", "text alone with kd_student_fraction", "Leave it out.",
                 because=because)  # fmt: skip


def _mask(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _prompts(batch: Mapping[str, Any], rows: Tensor) -> list[Tensor]:
    """The real tokens of each row before its first label; at least the first one."""
    ids, real = batch["input_ids"][rows], _mask(batch)[rows] != 0
    first = (batch["labels"][rows] != IGNORE_INDEX).int().argmax(1)
    end = torch.maximum(first, real.int().argmax(1) + 1)
    before = real & (torch.arange(ids.shape[1], device=ids.device) < end[:, None])
    return [row[counted] for row, counted in zip(ids, before, strict=True)]


def _eos_ids(student: Any, kd: Any) -> Tensor:
    """The ids that end a sequence; of a model without any none."""
    found = (kd.kd_generation_kwargs or {}).get("eos_token_id", getattr(_generation(student), "eos_token_id", None))
    return torch.tensor([] if found is None else found, dtype=torch.long).flatten()


def _pad_id(student: Any, kd: Any) -> int:
    """The id of padding: of the options, the model, its EOS, or 0."""
    found = (kd.kd_generation_kwargs or {}).get("pad_token_id", getattr(_generation(student), "pad_token_id", None))
    ends = _eos_ids(student, kd).tolist()
    return found if found is not None else ends[0] if ends else 0


def _generation(student: Any) -> Any:
    return getattr(student, "generation_config", None)


def _generate(student: Any, prompts: list[Tensor], draws: Tensor, kd: Any, accelerator: Any, *, synced: bool) -> Tensor:
    """[N, at most M] new tokens."""
    width, longest = max(map(len, prompts)), draws.shape[1]
    limit = getattr(text_config(student), "max_position_embeddings", None) or 0
    if 0 < limit < width + longest:
        shown, expected = longest, f"at most {limit - width} for a prompt of {width} tokens"
        because = f"the student has {limit} positions"
        fail("kd_max_new_tokens", shown, expected, "Lower it, or shorten the prompts.", because=because)
    device = accelerator.device
    ids = torch.full((len(prompts), width), _pad_id(student, kd), device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt.to(device), 1
    options = {name: value for name, value in (kd.kd_generation_kwargs or {}).items() if value is not None}
    processors = LogitsProcessorList()
    if options.pop("do_sample", True):
        processors.extend(make(options[name]) for name, make in _SAMPLING.items() if name in options)
        processors.append(InverseCDF(draws.to(device), width))
    others = {name: value for name, value in options.items() if name not in _SAMPLING}
    settings = {**_PLAIN, "pad_token_id": _pad_id(student, kd), **others}
    config = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=longest, **settings)
    with _generating(student, accelerator):
        sequences = student.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors,
            synced_gpus=synced,
        )  # fmt: skip
    return sequences[:, width:].to(prompts[0].device)


@contextmanager
def _generating(student: nn.Module, accelerator: Any) -> Iterator[None]:
    """Eval mode without gradient and checkpointing; afterwards modes, flags and random numbers are what they were."""
    checkpointed = [module for module in student.modules() if getattr(module, "gradient_checkpointing", None) is True]
    with unchanged_modes(student), same_random_numbers(accelerator.device), torch.no_grad(), accelerator.autocast():
        student.eval()
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
            if accelerator.is_fsdp2:
                reshard(student)


def _rebuilt(
    batch: Mapping[str, Any], rows: Tensor, prompts: list[Tensor], completions: list[Tensor], pad_id: int
) -> dict[str, Any]:
    """The batch with these rows written again, on the side of its padding, widened where they are longer."""
    ids, mask = batch["input_ids"], _mask(batch)
    width = max(ids.shape[1], *(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)))
    more, left = width - ids.shape[1], bool((mask[:, 0] == 0).any())
    grow = (more, 0) if left else (0, more)
    made = {
        "input_ids": F.pad(ids, grow, value=pad_id),
        "attention_mask": F.pad(mask, grow),
        "labels": F.pad(batch["labels"], grow, value=IGNORE_INDEX),
        STUDENT_TOKENS: torch.zeros(len(ids), width, dtype=torch.bool, device=ids.device),
    }
    if batch.get("position_ids") is not None:
        made["position_ids"] = F.pad(batch["position_ids"].expand(ids.shape), grow)
    for row, prompt, completion in zip(rows.tolist(), prompts, completions, strict=True):
        length = len(prompt) + len(completion)
        place = slice(width - length, width) if left else slice(length)
        fresh: dict[str, Any] = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX, "position_ids": 0}
        for name in fresh.keys() & made.keys():
            made[name][row] = fresh[name]
        made["input_ids"][row, place] = torch.cat([prompt, completion])
        made["attention_mask"][row, place] = 1
        made[STUDENT_TOKENS][row, place] = torch.arange(length, device=ids.device) >= len(prompt)
        if "position_ids" in made:
            made["position_ids"][row, place] = torch.arange(length, device=ids.device)
    # Columns of the old tokens that no model reads.
    others = {k: v for k, v in batch.items() if not (isinstance(v, Tensor) and v.shape[:2] == ids.shape)}
    return {**others, **made}

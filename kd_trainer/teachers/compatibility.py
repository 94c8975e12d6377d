"""Do teacher and student fit? Refuses what would train wrongly in silence, before the first step.

For: `trainer.py`. Compares models, class names and vocabularies; shapes are compared in `tasks/task.py`, batch by
batch.
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..tasks import text_config, vocabulary_rows
from ..validation import fail, quoted, warn

logger = logging.getLogger(__name__)


class Classes(NamedTuple):
    """The class names of student and teacher, and the result of comparing them."""

    student: Mapping[int, str] | None
    teacher: Mapping[int, str] | None
    known: bool = False  # whether class i is known to mean the same in both
    order: Tensor | None = None  # the teacher's class of each of the student's; None where the places are the same

    @property
    def unnamed(self) -> bool:
        """Whether both models have the default names of transformers."""
        return all(names is not None and _unnamed(names) for names in (self.student, self.teacher))

    @property
    def comparable(self) -> bool:
        """False where a model has names, and they cannot be compared with those of the other."""
        return self.known or self.unnamed or self.student is None or self.teacher is None


def class_order(student: nn.Module, teacher: nn.Module, *, remap: bool) -> Tensor | None:
    """The order of `match_classes` of two models; warns where their names cannot be compared."""
    return warned(class_names(student), class_names(teacher), remap=remap).order


def warned(student_names: Mapping[int, str] | None, teacher_names: Mapping[int, str] | None, **options: Any) -> Classes:
    """`match_classes`, with a warning where the names cannot be compared."""
    found = match_classes(student_names, teacher_names, **options)
    if not found.comparable and student_names and teacher_names:
        text = (
            "The classes of teacher (%s) and student (%s) cannot be compared by name: training goes on as if class i "
            "meant the same in both. Set the same id2label in both configs to have it checked."
        )
        warn(logger, text, listed(teacher_names), listed(student_names))
    return found


def match_classes(
    student_names: Mapping[int, str] | None,
    teacher_names: Mapping[int, str] | None,
    *,
    remap: bool,
    argument: str = "teacher_model",
    what: str = "a model",
) -> Classes:
    """Compares the class names of student and teacher, up to case and separators (`normalised`).

    Args:
        student_names, teacher_names: id -> name; None: a model without names.
        remap: `kd_remap_labels`.
        argument, what: the teacher, as an error names it.

    Raises:
        ValueError: the numbers of classes differ; a name of both stands at different ids, and `remap` is False
            or the names are no permutation of each other; or `remap` is True and the names do not tell the order.
    """
    if student_names is None or teacher_names is None:
        if remap:
            side = "student" if student_names is None else "teacher"
            _fail_remap(f"names of the classes in both models (the {side} is a model without id2label)")
        return Classes(student_names, teacher_names)
    if len(student_names) != len(teacher_names):
        shown = f"{what} with {len(teacher_names)} classes ({listed(teacher_names)})"
        expected = f"{len(student_names)} classes as the student has ({listed(student_names)})"
        fail(argument, shown, expected, "Give both models the same num_labels and id2label.")
    a, b = _alike(student_names, teacher_names)
    both_named = not _unnamed(a) and not _unnamed(b) and sorted(a) == sorted(b) == list(range(len(a)))
    if both_named and a == b:
        return Classes(student_names, teacher_names, known=True)
    moved = [i for i in sorted(a) if a[i] in b.values() and b.get(i) != a[i]] if both_named else []
    permuted = len(set(a.values())) == len(a) and set(a.values()) == set(b.values())
    if moved and permuted and remap:
        order = torch.tensor([_id(b, a[i]) for i in range(len(a))])
        return Classes(student_names, teacher_names, known=True, order=order)
    if moved:
        place, because = _id(b, a[moved[0]]), "the student would learn one class as another"
        fix = "Set kd_remap_labels to true to reorder the teacher's classes by name."
        fix = fix if permuted else "Give both configs the same id2label."
        shown = f"{what} in which class {teacher_names[place]!r} has id {place}"
        expected = f"id {moved[0]} as in the student ({listed(student_names)}; the teacher has {listed(teacher_names)})"
        fail(argument, shown, expected, fix, because=because)
    if remap:
        lists = f"the student has {listed(student_names)}; the teacher has {listed(teacher_names)}"
        _fail_remap(f"the same names in both ({lists})")
    return Classes(student_names, teacher_names)


def _fail_remap(expected: str) -> NoReturn:
    fix = "Give both configs the same id2label, or set kd_remap_labels to false."
    fail("kd_remap_labels", True, expected, fix, because="the teacher's classes are reordered by name")


_SEPARATORS = re.compile(r"[\s_/.:\u00ad\u058a\u05be\u2010-\u2015\u2043\u2212-]+")
_NUMBER = re.compile(r"[-+\u2212]?\d+([.,]\d+)?")


def normalised(name: str) -> str:
    """A class name without case, separators and forms of the same Unicode letter.

    A separator between two digits stays as a space, and a number keeps its sign: 2-3 is not 23, -1 is not 1.
    """
    folded = _folded(name)
    if _NUMBER.fullmatch(folded):
        return folded.replace("\u2212", "-").replace(",", ".")

    def between(match: re.Match) -> str:
        around = folded[match.start() - 1 : match.start()] + folded[match.end() : match.end() + 1]
        return " " if len(around) == 2 and around.isdigit() else ""

    return _SEPARATORS.sub(between, folded) or folded  # a name may be nothing but separators


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def _alike(student_names: Mapping[int, str], teacher_names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, str]]:
    """Both with their names normalised as far as all names of a model stay different."""
    for change in (normalised, _folded, str):
        a, b = ({i: change(name) for i, name in names.items()} for names in (student_names, teacher_names))
        if all(len(set(names.values())) == len(names) for names in (a, b)):
            break
    return a, b


def class_names(model: Any) -> dict[int, str] | None:
    """id -> name by the config's id2label, which means nothing in a language model."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names:
        return None
    items = names.items() if isinstance(names, Mapping) else enumerate(names)
    try:
        return {int(i): str(name) for i, name in items}
    except (TypeError, ValueError):
        fail("id2label", quoted(names), "whole numbers as its keys", "Write it as {0: name, 1: name, ...}.")


def _unnamed(names: Mapping[int, str]) -> bool:
    """Whether they are the default names of transformers, LABEL_0 and so on."""
    return all(re.fullmatch(r"label_?\d+", name.lower()) for name in names.values())


def _id(names: Mapping[int, str], name: str) -> int:
    return next(i for i, other in names.items() if other == name)


def listed(names: Mapping[int, str]) -> str:
    """The names in the order of their ids, the first dozen of many."""
    shown = [names[i] for i in sorted(names)[:12]]
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > len(shown) else "")


# For models of other tokens; for a causal language model there is one way more.
OR_CHUNKS = "; or, for a causal language model, align_teacher_tokens with kd_cross_tokenizer 'chunks'."
_SAME_TOKENS = (
    f"Take a teacher with the student's tokenizer, or give the teacher its own inputs in teacher_* columns{OR_CHUNKS}"
)
_COMPARE = (
    "If the tokens are the same, pass processing_class: then they are compared instead of the configs. Else take a "
    f"teacher with the student's tokenizer, or give the teacher its own inputs in teacher_* columns{OR_CHUNKS}"
)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, also that of a processor for sound or images; None where there is none."""
    if hasattr(processing_class, "get_vocab"):
        return processing_class
    inner = getattr(processing_class, "tokenizer", None)
    return inner if hasattr(inner, "get_vocab") else None


def check_same_tokens(student: nn.Module, teacher: nn.Module, processing_class: Any, init_kwargs: dict) -> str | None:
    """For a teacher that reads the student's tokens: token -> id must be the same map.

    The tokenizers are compared where both are at hand (`processing_class`, and the one saved beside the teacher);
    otherwise the special ids and sizes in the configs.

    Returns:
        By what they were found equal, "tokenizers" or "special ids"; None where nothing could be compared.

    Raises:
        ValueError: a token has different ids, a special id differs, or the teacher has fewer ids than the student.
    """
    student_tokenizer = tokenizer_of(processing_class)
    teacher_tokenizer = _tokenizer_beside(teacher, init_kwargs) if student_tokenizer is not None else None
    if student_tokenizer is not None and teacher_tokenizer is not None:
        a, b = (vocabulary_rows(model, measured=True) for model in (student, teacher))
        _check_tokenizers(student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab(), a, b)
        return "tokenizers"
    compared = False
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        a, b = (_special_ids(model, name) for model in (student, teacher))
        if a is None or b is None:
            continue
        compared = True
        if not _ids(a) & _ids(b):
            because = "different special ids mean different tokenizers"
            shown = f"a model with {name} {b}"
            fail("teacher_model", shown, f"{a} as in the student", _COMPARE, because=because)
    a, b = (vocabulary_rows(model, measured=True) for model in (student, teacher))
    if a is not None and b is not None and b < a:
        _refuse_smaller(b, f"at least {a}, the student's", _COMPARE)
    return "special ids" if compared else None


def _check_tokenizers(
    student_ids: Mapping[str, int], teacher_ids: Mapping[str, int], a: int | None, b: int | None
) -> None:
    """Compares token -> id for all ids that both embeddings (of `a` and `b` rows) have.

    A token whose ids are all beyond the smaller embedding may differ: the student cannot read or write it, or the
    teacher's probability of it is left out of the soft loss. What the student can read and the teacher cannot may not.
    """
    common = min(a or sys.maxsize, b or sys.maxsize)
    moved = [t for t in {*student_ids, *teacher_ids} if student_ids.get(t) != teacher_ids.get(t)]
    moved = [t for t in moved if min(student_ids.get(t, common), teacher_ids.get(t, common)) < common]
    if moved:
        wrong = min(moved, key=lambda t: student_ids.get(t, teacher_ids.get(t, 0)))
        shown = f"a model whose tokenizer has {len(teacher_ids)} tokens, {wrong!r} with id {teacher_ids.get(wrong)}"
        expected = f"the tokens of processing_class ({len(student_ids)}, {wrong!r} with id {student_ids.get(wrong)})"
        because = "the teacher would read the student's input_ids as other words"
        fail("teacher_model", shown, expected, _SAME_TOKENS, because=because)
    if a is None or b is None:
        return
    unread = max((t for t, i in student_ids.items() if b <= i < a), key=lambda t: student_ids[t], default=None)
    if unread is not None:
        _refuse_smaller(b, f"at least {student_ids[unread] + 1}, for {unread!r} of processing_class", _SAME_TOKENS)


def _refuse_smaller(rows: int, expected: str, fix: str) -> NoReturn:
    because = "some of the student's input_ids would be outside its embedding"
    fail("teacher_model", f"a model with vocab_size {rows}", expected, fix, because=because)


def common_ids(student: int, teacher: int, known_by: str | None) -> int | None:
    """How many ids, from 0 on, two language models share whose vocabularies differ in size; None where they do not.

    Embeddings are padded to round numbers (Qwen2.5: 151,936 rows at 1.5B, 152,064 at 7B, for the same 151,665 tokens).

    Args:
        student, teacher: classes of their logits.
        known_by: what `check_same_tokens` returned.

    Raises:
        ValueError: nothing shows that the tokens are the same; or special ids alone do, and the larger vocabulary is
            no multiple of 8, so that it holds tokens of its own rather than padding (Whisper v3: 51,866 with a new
            token in the middle, v2: 51,865).
    """
    if student == teacher:
        return None
    if known_by == "tokenizers" or (known_by is not None and max(student, teacher) % 8 == 0):
        return min(student, teacher)
    because = "nothing shows that class i of one means class i of the other"
    fail("teacher_model", f"a model of {teacher} token ids", f"{student} as the student", _COMPARE, because=because)


def vocabulary_line(student: int, teacher: int, known_by: str | None) -> str:
    """Which ids of differing vocabularies have no soft loss, and by what the others were compared."""
    side, extra = ("student" if student > teacher else "teacher"), abs(student - teacher)
    alone = " and learn from the hard loss alone" if side == "student" else ""
    return (
        f"vocabularies of {student:,} (student) and {teacher:,} (teacher) ids, compared by their {known_by}: "
        f"soft loss and agreement are over the {min(student, teacher):,} common ids; "
        f"the {side}'s other {extra:,} are left out{alone}"
    )


def _special_ids(model: nn.Module, name: str) -> Any:
    """By the config, or by that of the language model within: those of a vision-language model stand there alone."""
    found = getattr(getattr(model, "config", None), name, None)
    return getattr(text_config(model), name, None) if found is None else found


def _ids(value: int | list[int]) -> set[int]:
    """A special id of a config as a set: chat models have several eos tokens."""
    return set(value) if isinstance(value, (list, tuple)) else {value}


def check_teacher_columns(batch: Mapping[str, Any]) -> None:
    """Raises ValueError where the teacher has tokens of its own and no mask of its own: it would attend to padding."""
    if "teacher_input_ids" in batch and "attention_mask" in batch and "teacher_attention_mask" not in batch:
        fix = "Keep the attention_mask of the teacher's tokenizer as teacher_attention_mask."
        because = "the student's mask does not fit the teacher's tokens"
        fail("teacher_attention_mask", None, "a column beside teacher_input_ids", fix, because=because)


# By the field of a student's config with the id of a placeholder in the text: what stands there.
_PLACEHOLDERS = {
    "image_token_id": "pixel_values", "image_token_index": "pixel_values", "video_token_id": "pixel_values_videos",
    "audio_token_id": "input_features", "audio_token_index": "input_features",
}  # fmt: skip


def check_placeholders(student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any], taken: Iterable[str]) -> None:
    """Raises ValueError where the student sees images or sounds in place of tokens that the teacher takes for text.

    Args:
        taken: names of the inputs that the teacher takes of the batch.
    """
    ids, config = batch.get("input_ids"), getattr(student, "config", None)
    for field, name in _PLACEHOLDERS.items():
        token = getattr(config, field, None)
        if not isinstance(token, int) or not isinstance(ids, Tensor) or name not in batch or name in taken:
            continue
        if "teacher_input_ids" not in batch and bool((ids == token).any()):
            shown, expected = f"a {type(teacher).__name__}, which takes no {name}", f"a teacher that takes {name} too"
            because = f"it would read the {field} {token} as text, without what stands in its place"
            fail("teacher_model", shown, expected, "Take a teacher of the student's kind.", because=because)


def _tokenizer_beside(teacher: nn.Module, init_kwargs: dict) -> Any:
    """The tokenizer saved with the teacher, from local files only; None where there is none."""
    from transformers import AutoTokenizer

    path = getattr(getattr(teacher, "config", None), "_name_or_path", "")
    if not path:
        return None
    folder = Path(path)  # where a folder has no tokenizer, transformers builds one of its special tokens
    files = ("tokenizer*", "vocab*", "*.model", "*.vocab")
    if folder.is_dir() and not any(match for pattern in files for match in folder.rglob(pattern)):
        return None
    keep = {k: v for k, v in init_kwargs.items() if k in ("revision", "cache_dir", "subfolder", "trust_remote_code")}
    try:
        return AutoTokenizer.from_pretrained(path, **{"local_files_only": True, "trust_remote_code": False, **keep})
    except Exception:  # upstream raises many kinds where a folder has no tokenizer: then the configs are compared
        return None

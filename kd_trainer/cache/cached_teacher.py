"""Cached teacher: reads precomputed outputs from disk and joins them to each batch by row id.

Letters: B rows, S positions, N kept positions of a batch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import DIVERGENCES
from ..tasks import TEACHER_PREFIX, Task
from ..teachers import (
    COLUMN_PREFIX,
    Classes,
    Routes,
    Teacher,
    TeacherOutput,
    check_mixed,
    class_names,
    match_classes,
)
from ..validation import fail, message
from .formats import SPARSE, Format, format_of, output
from .manifest import check_links, check_settings
from .store import (
    BUILDING,
    HEAD,
    MANIFEST,
    CacheError,
    Store,
    damage_message,
    foreign_message,
    is_finished,
    read_manifest,
)

# Parts of a cache: the train data, the evaluation data (eval-NAME of several) and further data such as that of predict.
TRAIN, EVAL, TEST = "train", "eval", "test"


def part_of(kind: str, name: Any) -> str:
    """The folder of a named part: `kind`-name. Characters other than a-z, 0-9, "_", "." and "-" become "_", and a hash
    keeps such names distinct, also on file systems that ignore case.

    Example:
        >>> part_of("eval", "matched"), part_of("eval", "glue/dev")
        ('eval-matched', 'eval-glue_dev-5412a25e')
    """
    text = name if isinstance(name, str) else f"{type(name).__name__} {name!r}"
    plain = re.sub(r"[^a-z0-9_.-]", "_", text.lower())[:80].strip(".")
    if plain and plain == name and not re.search(r"-[0-9a-f]{8}$", plain):
        return f"{kind}-{plain}"
    return f"{kind}-{plain}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def open_part(folder: Path, root: Path | None = None) -> Store:
    """A finished part of a cache, with every setting checked.

    Args:
        root: the folder above it that the user named: no link in the part may lead out of the part.

    Raises:
        CacheError: see `Store` and `check_settings`.
    """
    store = Store(folder, root)
    check_settings(folder / MANIFEST, store.manifest, complete=True)
    return store


def check_objective(kept: Format, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
    """Raises ValueError where the loss needs what the format does not hold."""
    other = "Or build a cache of format hidden or logits of one teacher, which serve every setting."
    wrong = [t for t in temperatures if kept.temperature is not None and t != kept.temperature]
    if wrong:
        expected = f"{kept.temperature:g}, for which the teacher cache was built (format {kept.name})"
        fail("kd_temperature", wrong[0], expected, f"Set kd_temperature to {kept.temperature:g}. {other}")
    sparse, mixed = kept.name in SPARSE, kept.name == "logits" and kept.temperature is not None
    if mixed:
        check_mixed(divergence, standardize)
    if sparse and standardize:
        because = "it holds log-probabilities, and no logits to standardise"
        expected = f"False with a teacher cache of format {kept.name}"
        fail("kd_standardize_logits", True, expected, f"Leave it out. {other}", because=because)
    if kept.name == "sampled" and divergence != "forward_kl":
        because = "samples are unbiased only where the loss is linear in the teacher's probabilities"
        expected = "'forward_kl' with a teacher cache of format sampled"
        fail("kd_divergence", repr(divergence), expected, f"Set it to forward_kl. {other}", because=because)
    if sparse and not DIVERGENCES[divergence].sparse:
        having = ", ".join(name for name, entry in DIVERGENCES.items() if entry.sparse)
        because = "it needs every class of the teacher"
        expected = f"one of {having} with a teacher cache of format {kept.name}"
        fail("kd_divergence", repr(divergence), expected, f"Choose one of them. {other}", because=because)


def check_tokens_kept(kept: Format, *, chunks: bool) -> None:
    """Raises ValueError where a cache holds what the loss of chunks does not read, or the loss of positions."""
    if kept.of_teacher_tokens != chunks:
        shown = repr("chunks" if chunks else "error")
        expected = f"{'error' if chunks else 'chunks'!r} with a teacher cache of format {kept.name}"
        because = f"it holds {'no' if chunks else 'nothing but'} log-probabilities of the tokens of the teacher's text"
        fix = "Set it so, or build another cache in an empty folder."
        fail("kd_cross_tokenizer", shown, expected, fix, because=because)


class CachedTeacher:
    """A teacher whose outputs are read from disk: `DistillationTrainer(teacher_model=CachedTeacher(path), ...)`.

    When to use: to train, any number of times, without the teacher in memory. With `teacher_cache_dir` the trainer
    makes one by itself.

    Args:
        path: the folder of `trainer.build_teacher_cache()` (or of one of its parts), or the name of a dataset of the
            hub that holds such a folder.

    Attributes:
        parts: by name ("train", "eval", "eval-NAME"), the `Store` of that data.

    Raises:
        CacheError: nothing finished is there, a manifest was changed, or a part is of another teacher or format.

    Example::

        teacher = CachedTeacher("cache")
        trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=data)
    """

    live: None = None
    model: None = None
    compiled = is_student = has_own_weights = False
    note = ""
    start_tokens: None = None

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, (str, Path)) or not str(path).strip():
            shown = path if path is None or isinstance(path, str) else f"of type {type(path).__name__}"
            expected, fix = "the folder of a finished teacher cache, or a dataset of the hub", "Pass its path."
            fail("path", shown, expected, fix, error=ValueError if isinstance(path, str) else TypeError)
        self.path = _local(path)
        alone = is_finished(self.path)  # a part alone: evaluation data by its name, else train data
        inside = sorted(self.path.iterdir()) if self.path.is_dir() else []
        folders = [self.path] if alone else [folder for folder in inside if is_finished(folder)]
        if not folders:
            begun = [folder for folder in inside if (folder / BUILDING).exists()]
            read_manifest((begun or [self.path])[0])  # raises: it is unfinished, or there is none
        named = not alone or re.match(rf"({EVAL}|{TEST})(-|$)", self.path.name)
        names = [folder.name if named else TRAIN for folder in folders]
        root = None if alone else self.path
        self.parts = {name: open_part(folder, root) for name, folder in zip(names, folders, strict=True)}
        self._check_alike()
        self._head: dict[str, Any] | None = None
        self._head_device: torch.device | None = None

    def _check_alike(self) -> None:
        """Raises CacheError where the parts differ in teacher or format: one head and one format serve all."""
        first, *others = (self.parts[name] for name in sorted(self.parts, key=lambda name: name != TRAIN))
        for store in others:
            for what in ("format", "classes", "temperature", "dtype", "task", "head_sha256", "teacher"):
                one, other = (m["teacher"]["weights"] if what == "teacher" else m.get(what)
                              for m in (store.manifest, first.manifest))  # fmt: skip
                if one != other:
                    shown = f"one whose part {str(store.folder)!r} has {what} {one}"
                    fix = "Build one of them again in an empty folder, with the teacher and settings of the other."
                    raise CacheError(message("teacher_cache", shown, f"{other}, as {str(first.folder)!r} has", fix))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the train data, or of the first part."""
        return next(self.parts[name].manifest for name in (TRAIN, *self.parts) if name in self.parts)

    @property
    def members(self) -> tuple[Teacher, ...]:
        return (self,)

    @property
    def routes(self) -> Routes | None:
        teachers = self.manifest["teacher"].get("teachers")
        if teachers is None:
            return None
        names = [one["teacher_id"] for one in teachers if "teacher_id" in one]
        return Routes([one["weight"] for one in teachers], names)

    @property
    def format(self) -> Format:
        return format_of(self.manifest)

    @property
    def accepted(self) -> frozenset[str]:
        """Columns that the teacher read; the signatures of the rows are made of them."""
        return frozenset(name.removeprefix(TEACHER_PREFIX) for name in self.manifest["columns_read"])

    def describe(self) -> str:
        """One line for the start block."""
        kept, rows = self.format, {name: len(store) for name, store in self.parts.items()}
        shown = kept.name + "".join(
            f", {n} {v:g}" for n, v in (("k", kept.k), ("T", kept.temperature)) if v is not None
        )
        counted = ", ".join(f"{name} {count:,} rows" for name, count in rows.items())
        return f"{self.manifest['teacher']['name']}, read from {str(self.path)!r} ({shown}; {counted})"

    def identity(self) -> dict[str, Any]:
        """`name`, `parameters` and hashes of the teacher, see `teacher_identity`."""
        return self.manifest["teacher"]

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Nothing to do: no model is run."""

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> CachedTeacher:
        """Itself: it depends on no student."""
        return self

    def release(self, student: nn.Module) -> None:
        """Nothing to do: only an output head is on the device."""

    def compare_classes(
        self, student: nn.Module, task: Task | None = None, *, remap: bool, compare: Any = match_classes
    ) -> Classes | None:
        """`match_classes` with the student; None for tasks whose classes are tokens or numbers."""
        if not self.manifest["labels"]:
            return None
        names = {int(i): str(name) for i, name in self.manifest["labels"].items()}
        return compare(class_names(student), names, remap=remap, argument="teacher_cache", what="one")

    def check_objective(self, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
        """See the function of this name."""
        check_objective(self.format, divergence, temperatures, standardize)

    def output(
        self,
        batch: Mapping[str, Any],
        accelerator: Any = None,
        student: nn.Module | None = None,
        *,
        read: Callable[[Any, str], Tensor] | None = None,
        **mixing: Any,
    ) -> TeacherOutput | None:
        """The cached outputs of the batch's rows; None where the batch has no cached columns."""
        columns = {k[len(COLUMN_PREFIX) :]: v for k, v in batch.items() if k.startswith(COLUMN_PREFIX)}
        if not columns:
            return None
        device = next(iter(columns.values())).device
        return output(self.format, columns, self.head(device) if self.format.name == "hidden" else {})

    def head(self, device: torch.device) -> dict[str, Any]:
        """The teacher's output head by the argument names of `fused_linear_distillation`; read once for each device."""
        if self._head is None or self._head_device != device:
            self._head, self._head_device = self._read_head(device), device
        return self._head

    def _read_head(self, device: torch.device) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        store = next(iter(self.parts.values()))
        path, manifest = store.folder / HEAD, store.manifest
        if not store.head_is_whole():
            reason = "its content has changed since it was written" if path.is_file() else "the file is missing"
            raise CacheError(damage_message(str(path), reason))
        try:
            tensors = load_file(path, device=str(device))
        except SafetensorError as error:
            raise CacheError(foreign_message(str(path), f"it is no safetensors file ({error})")) from error
        rows, bias = [manifest["vocabulary"]], tensors.get("bias")
        weight = tensors["weight"] if "weight" in tensors else torch.empty(0)
        if list(weight.shape) != [*rows, manifest["hidden_size"]] or (bias is not None and list(bias.shape) != rows):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            expected = f"{[*rows, manifest['hidden_size']]}, the weight of the manifest's vocabulary and hidden size"
            raise CacheError(foreign_message(str(path), f"it has {shapes or 'no tensors'} instead of {expected}"))
        return {
            "teacher_weight": tensors["weight"],
            "teacher_bias": tensors.get("bias"),
            "teacher_scale": manifest["head_scale"],
            "teacher_softcap": manifest["head_softcap"],
        }

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads the folder as a dataset of the hub; `options` as huggingface_hub's `upload_folder`.

        Raises:
            CacheError: a symbolic link in the folder leads out of it: the file there would be uploaded.
        """
        from huggingface_hub import HfApi

        check_links(self.path)
        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, repo_type="dataset", private=options.pop("private", None), exist_ok=True)
        hidden = ["**/.*", ".*", "*.lock"]
        return api.upload_folder(
            repo_id=repo_id, folder_path=str(self.path), repo_type="dataset", ignore_patterns=hidden, **options
        )


def as_cached_teacher(given: Any) -> CachedTeacher | None:
    """The given teacher where it is a cached one, else None."""
    return given if isinstance(given, CachedTeacher) else None


def _local(path: str | Path) -> Path:
    """The folder, or the local snapshot of the hub's dataset of this name."""
    folder = Path(path)
    if folder.exists() or str(path).count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), repo_type="dataset"))
    except Exception as error:  # huggingface_hub raises many kinds, also offline
        fix = "Check the path for a typing error."
        reason = (str(error).splitlines() or [""])[0]
        expected = f"a folder, or a dataset of the hub ({type(error).__name__}: {reason})"
        raise CacheError(message("teacher_cache", repr(str(path)), expected, fix)) from error

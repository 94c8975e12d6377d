"""What a teacher cache was made of, as values that can be compared: teacher, tokenizer, collation, data.

For: `cache_build.py`, which notes them in the manifest and compares them before anything is read.
Imports: cache_store, checks, compatibility, describe, files, teacher; transformers (on use).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cache_store import CacheError
from .checks import Shown, message
from .compatibility import tokenizer_of
from .describe import name_of
from .files import digest
from .teacher import ADAPTER_OFF, adapter_parameters


def teacher_identity(given: Any, init_kwargs: Mapping[str, Any], student: nn.Module) -> dict[str, Any]:
    """Name and hashes of a teacher's weights and config, as it is given to the trainer: by path it is not loaded."""
    if isinstance(given, nn.Module):
        return {"given": "module", "name": name_of(given), **_of_module(given, set())}
    if given == ADAPTER_OFF:
        return {"given": ADAPTER_OFF, "name": name_of(student), **_of_module(student, adapter_parameters(student))}
    folder = _folder_of(str(given), init_kwargs)
    files = sorted(f for pattern in ("*.safetensors", "*.bin") for f in folder.glob(pattern))
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_digest_of_file, files))
    weights = [[file.name, found] for file, found in zip(files, digests, strict=True)]
    config = folder / "config.json"
    return {
        "given": "path",
        "name": str(given),
        "weights": _hash(weights),
        "config": digest(config) if config.is_file() else "",
        "init_kwargs": json.loads(json.dumps(dict(init_kwargs), default=str, sort_keys=True)),
    }


def _folder_of(path: str, init_kwargs: Mapping[str, Any]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        keep = {k: init_kwargs[k] for k in ("revision", "cache_dir", "subfolder", "token") if k in init_kwargs}
        found = cached_file(path, "config.json", **keep)
        return Path(str(found)).parent
    return folder / str(init_kwargs.get("subfolder", ""))


def _digest_of_file(file: Path) -> str:
    real = Path(os.path.realpath(file))
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub's own cache names a file by its SHA-256
    return digest(file)


def _of_module(model: nn.Module, without: set[int]) -> dict[str, Any]:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or id(tensor) in without:
            continue
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    config: Any = getattr(model, "config", None)
    kept = config.to_dict() if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        kept.pop(name, None)
    return {
        "weights": found.hexdigest(),
        "config": _hash(json.loads(json.dumps(kept, default=str, sort_keys=True))),
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def tokenizer_identity(processing_class: Any) -> str | None:
    """A hash of the map from tokens to ids; None where there is no tokenizer."""
    tokenizer = tokenizer_of(processing_class)
    return None if tokenizer is None else _hash(sorted(tokenizer.get_vocab().items()))


def collation(data_collator: Any, processing_class: Any) -> dict[str, Any]:
    """What of the collation changes the teacher's answer: on which side is padded, and where texts are cut."""
    tokenizer = tokenizer_of(processing_class) or tokenizer_of(getattr(data_collator, "tokenizer", None))
    length = getattr(tokenizer, "model_max_length", None)
    return {
        "padding_side": getattr(tokenizer, "padding_side", None),
        "max_length": length if isinstance(length, int) and length < 10**9 else None,
        "packed": bool(getattr(data_collator, "padding_free", False)),
    }


def compare(where: Path, kept: Mapping[str, Any], asked: Mapping[str, tuple[str, str, Any, str]]) -> None:
    """Raises CacheError for the first part of a cache that is not what is asked.

    Args:
        where: the cache; kept: its settings.
        asked: by path in the settings ("teacher.weights"): the argument to name, what of it is compared, its value
            now and how to mend it.
    """
    for place, (argument, what, now, mend) in asked.items():
        value: Any = kept
        for part in place.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value != now:
            shown = Shown(f"one with {what} {_short(now)}")
            expected = f"{what} {_short(value)}, of which the teacher cache {str(where)!r} was built"
            other = "Or name another teacher_cache_dir: one is built there."
            raise CacheError(message(argument, shown, expected, f"{mend} {other}"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

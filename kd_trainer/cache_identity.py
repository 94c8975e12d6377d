"""What a teacher cache was made of, as values that can be compared: teacher, tokenizer, collation, data.

For: `cache_build.py`, which notes them in the manifest and compares them before anything is read.
Imports: cache_store, checks, compatibility, describe, files, redaction, teacher, training_args; transformers (on use).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .cache_store import CacheError
from .checks import Shown, fail, message
from .compatibility import tokenizer_of
from .describe import name_of
from .files import digest
from .redaction import hidden, scrub
from .teacher import ADAPTER_OFF, adapter_parameters
from .training_args import as_json


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
        "name": scrub(str(given)),
        "weights": _hash(weights),
        "config": digest(config) if config.is_file() else "",
        "init_kwargs": output_kwargs(init_kwargs),
    }


# Arguments of from_pretrained that say where weights come from and go to, not what the teacher computes.
_NOT_OF_THE_OUTPUT = frozenset(
    [
        "token",
        "use_auth_token",
        "cache_dir",
        "force_download",
        "resume_download",
        "local_files_only",
        "proxies",
        "mirror",
        "user_agent",
        "low_cpu_mem_usage",
        "device",
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_state_dict",
        "offload_buffers",
        "weights_only",
        "output_loading_info",
        "tp_plan",
        "tp_size",
        "device_mesh",
        "distributed_config",
        "load_in_parallel",
        "_fast_init",
        "disable_mmap",
    ]
)


def output_kwargs(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of from_pretrained that can change what the teacher gives, as JSON values without secrets.

    dtype (also by its old name torch_dtype), quantization_config, revision, variant, subfolder, attn_implementation,
    trust_remote_code and whatever is not known to be without effect.

    Raises:
        ValueError: a value that cannot be written down, so that another one could not be told from it.
    """
    named = {"torch_dtype": "dtype"}
    kept = {named.get(name, name): value for name, value in init_kwargs.items() if name not in _NOT_OF_THE_OUTPUT}
    for name, value in kept.items():
        if opaque := _opaque(value):
            because = "a teacher cache could not tell it from another one"
            fix = "Give it as text, numbers, lists and objects of these."
            shown = Shown(f"one whose {name} has an object of type {opaque}")
            fail("teacher_model_init_kwargs", shown, "values that JSON can hold", fix, because=because)
    found = hidden(as_json(kept))
    if isinstance(found.get("dtype"), str):
        found["dtype"] = {"half": "float16", "float": "float32", "double": "float64"}.get(
            found["dtype"].removeprefix("torch."), found["dtype"].removeprefix("torch.")
        )
    for name, default in (("trust_remote_code", False), ("use_safetensors", True)):
        if found.get(name) is default:
            del found[name]
    return dict(sorted(found.items()))


def _opaque(value: Any) -> str | None:
    """The type of an object in a value that has no text of its own; None where there is none."""
    if isinstance(value, Mapping):
        return next(filter(None, map(_opaque, value.values())), None)
    if isinstance(value, (list, tuple, set, frozenset)):
        return next(filter(None, map(_opaque, value)), None)
    known = isinstance(value, (str, int, float, type(None), Path, Enum, torch.dtype, np.generic))
    return None if known or hasattr(value, "to_dict") else type(value).__name__


def _folder_of(path: str, init_kwargs: Mapping[str, Any]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        names = ("revision", "cache_dir", "subfolder", "token", "local_files_only", "proxies", "force_download")
        keep = {name: init_kwargs[name] for name in names if name in init_kwargs}
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

"""Hashes and settings that identify a cache's teacher, tokenizer and collation, and their comparison."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files import as_json, digest
from ..redaction import hidden, scrub
from ..tasks import name_of
from ..teachers import ADAPTER_OFF, adapter_modules, adapter_parameters, naming, tokenizer_of
from ..validation import fail, message
from .manifest import CacheError, json_sha256
from .server import ServerTeacher


def teacher_identity(given: Any, init_kwargs: Mapping[str, Any], student: nn.Module) -> dict[str, Any]:
    """Hashes and settings that identify a teacher as it is given to the trainer; a path is not loaded.

    Of a module: hashes of its weights, its config, the classes of its modules and their public attributes (numbers,
    texts, names of functions; one hash a name, without dropout). A hook, an unsaved buffer and the code of a forward
    are in none of these; the outputs, compared with the cache on some rows, show them.

    Of a path: hashes of the files of weights and of its config, of its adapter and that adapter's base, of its code
    where that runs (`trust_remote_code`; not of code from another repository, for which name a revision), and the
    arguments of from_pretrained that change the output. Weights and config are None where they are not on this machine.
    """
    if isinstance(given, ServerTeacher):
        return given.identity()
    if isinstance(given, nn.Module):
        return {"given": "module", "name": _printable(name_of(given)), **_of_module(given, set())}
    if given == ADAPTER_OFF:
        without = adapter_parameters(student)
        return {"given": ADAPTER_OFF, "name": _printable(name_of(student)), **_of_module(student, without)}
    named = {"given": "path", "name": _printable(scrub(str(given))), "init_kwargs": output_kwargs(init_kwargs)}
    return named | _of_path(str(given), init_kwargs)


def mixture_identity(each: Sequence[Mapping[str, Any]], weights: Any = None, names: Any = None) -> dict[str, Any]:
    """The same of several teachers: `teachers` has the `teacher_identity` of each, its share and its name."""
    shares = [1.0] * len(each) if weights is None else list(weights)
    total = math.fsum(shares)
    teachers = [{**one, "weight": share / total} for one, share in zip(each, shares, strict=True)]
    for one, name in zip(teachers, names or (), strict=False):
        one["teacher_id"] = name
    known = all(one["weights"] is not None for one in teachers)
    name = " + ".join(f"{one['weight']:.4g} * {one['name']}" for one in teachers)
    return {
        "given": "several",
        "name": name[:4096],
        "weights": json_sha256([one["weights"] for one in teachers]) if known else None,
        "teachers": teachers,
    }


def _printable(name: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in name)[:4096]


_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")


def _of_path(path: str, init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of the files of a teacher; None for those that are not on this machine."""
    folder = _folder_of(path, init_kwargs)
    if folder is None:
        return {"weights": None, "config": None}
    patterns = ["*.safetensors", "*.bin", *([str(init_kwargs["gguf_file"])] if init_kwargs.get("gguf_file") else [])]
    files = sorted({f for pattern in patterns for f in folder.glob(pattern) if f.name not in _NO_WEIGHTS})
    whole = bool(files) and all((folder / name).is_file() for index in folder.glob("*.index.json")
                                for name in _listed(index))  # fmt: skip
    adapter = folder / "adapter_config.json"
    if init_kwargs.get("trust_remote_code"):
        files += sorted(folder.glob("*.py"))
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_digest_of_file, files))
    weights: list[Any] = [[file.name, found] for file, found in zip(files, digests, strict=True)]
    if adapter.is_file():
        kept = json.loads(adapter.read_text(encoding="utf-8"))
        base = _of_path(str(kept.get("base_model_name_or_path", "")), {"revision": kept.get("revision")})
        weights, whole = [*weights, kept, base], whole and base["weights"] is not None
    config, found = folder / "config.json", ""
    if config.is_file():
        found = _of_config(json.loads(config.read_text(encoding="utf-8")))
    return {"weights": json_sha256(weights) if whole else None, "config": found}


def _listed(index: Path) -> set[str]:
    """The files that an index of weights names."""
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return set()


# Arguments of from_pretrained for where weights come from and go to: they do not change the outputs.
_NOT_OF_THE_OUTPUT = frozenset([
    "token", "use_auth_token", "cache_dir", "force_download", "resume_download", "local_files_only", "proxies",
    "mirror", "user_agent", "low_cpu_mem_usage", "device", "device_map", "max_memory", "offload_folder",
    "offload_state_dict", "offload_buffers", "weights_only", "output_loading_info", "tp_plan", "tp_size",
    "device_mesh", "distributed_config", "load_in_parallel", "_fast_init", "disable_mmap",
])  # fmt: skip


def output_kwargs(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of from_pretrained that can change the teacher's outputs, as JSON values without secrets.

    dtype (also by its old name torch_dtype), quantization_config, revision, variant, subfolder, attn_implementation,
    trust_remote_code, and all others that are not known to have no effect.

    Raises:
        ValueError: a value that JSON cannot hold: a change of it would not be noticed.
    """
    named = {"torch_dtype": "dtype"}
    kept = {named.get(name, name): value for name, value in init_kwargs.items() if name not in _NOT_OF_THE_OUTPUT}
    for name, value in kept.items():
        if opaque := _opaque(value):
            because = "a teacher cache could not notice a change of it"
            fix = "Give it as text, numbers, lists and objects of these."
            shown = f"one whose {name} has an object of type {opaque}"
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
    """The type of the first object in a value that JSON cannot hold; None where there is none."""
    if isinstance(value, Mapping):
        return next(filter(None, map(_opaque, value.values())), None)
    if isinstance(value, (list, tuple, set, frozenset)):
        return next(filter(None, map(_opaque, value)), None)
    known = isinstance(value, (str, int, float, type(None), Path, Enum, torch.dtype, np.generic))
    return None if known or hasattr(value, "to_dict") else type(value).__name__


def _folder_of(path: str, init_kwargs: Mapping[str, Any]) -> Path | None:
    """The folder of a teacher's files on this machine; None where there is none."""
    folder = Path(path)
    if folder.is_dir():
        return folder / str(init_kwargs.get("subfolder", ""))
    from transformers.utils.hub import cached_file

    names = ("revision", "cache_dir", "subfolder", "token", "local_files_only", "proxies", "force_download")
    keep = {name: init_kwargs[name] for name in names if init_kwargs.get(name) is not None}
    try:
        return Path(str(cached_file(path, "config.json", **keep))).parent
    except (OSError, ValueError):  # neither a folder nor a repository of the hub
        return None


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
    own = adapter_modules(model) if without else set()
    modules = [(name, module) for name, module in model.named_modules() if id(module) not in own]
    return {
        "weights": found.hexdigest(),
        "config": _of_config(config.to_dict() if hasattr(config, "to_dict") else {}),
        "classes": json_sha256([[name, type(module).__qualname__] for name, module in modules]),
        "attributes": _attributes(modules),
    }


# Entries of a config or a module that change no output in eval mode.
_WITHOUT_EFFECT = frozenset([
    "_name_or_path", "name_or_path", "transformers_version", "use_cache", "initializer_range",
    "gradient_checkpointing", "training", "warnings_issued",
])  # fmt: skip


def _of_config(config: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if not (name in _WITHOUT_EFFECT or "drop" in name)}
    return json_sha256(json.loads(json.dumps(kept, default=str, sort_keys=True)))


def _attributes(modules: list[tuple[str, nn.Module]]) -> dict[str, str]:
    """By name of a public attribute: a hash of its values in all modules."""
    found: dict[str, list[list[str]]] = {}
    for path, module in modules:
        if "Dropout" in type(module).__name__:
            continue
        for name, value in vars(module).items():
            text = None if name[:1] == "_" or name in _WITHOUT_EFFECT or "drop" in name else _text_of(value)
            if text is not None:
                found.setdefault(name, []).append([path, text])
    return {name: json_sha256(values) for name, values in sorted(found.items())}


def _text_of(value: Any) -> str | None:
    """A setting as text that is the same in every run; None for other values."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, Enum)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        texts = [_text_of(each) for each in value]
        return None if any(text is None for text in texts) else f"[{', '.join(map(str, texts))}]"
    if isinstance(value, Mapping):
        return _text_of([[str(key), value[key]] for key in sorted(value, key=str)])
    if callable(value) and not isinstance(value, nn.Module) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return None


def tokenizer_identity(processing_class: Any) -> str | None:
    """A hash of the map from tokens to ids; None where there is no tokenizer."""
    tokenizer = tokenizer_of(processing_class)
    return None if tokenizer is None else json_sha256(sorted(tokenizer.get_vocab().items()))


def collation(data_collator: Any, processing_class: Any) -> dict[str, Any]:
    """The settings of the collation that change the teacher's outputs: padding side, truncation, packing."""
    tokenizer = tokenizer_of(processing_class) or tokenizer_of(getattr(data_collator, "tokenizer", None))
    length = getattr(tokenizer, "model_max_length", None)
    return {
        "padding_side": getattr(tokenizer, "padding_side", None),
        "max_length": length if isinstance(length, int) and length < 10**9 else None,
        "packed": bool(getattr(data_collator, "padding_free", False)),
    }


def compare(where: Path, kept: Mapping[str, Any], current: Mapping[str, tuple[str, str, Any, str]]) -> None:
    """Raises CacheError for the first setting of a cache that differs from the current one.

    Args:
        where: the cache; kept: its settings.
        current: by path in the settings ("teacher.weights"): the argument to name, what of it is compared, its current
            value and how to fix it.
    """
    for place, (argument, what, now, fix) in current.items():
        value: Any = kept
        for part in place.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value != now:
            shown = f"one with {what} {_short(now)}"
            expected = f"{what} {_short(value)}, of which the teacher cache {str(where)!r} was built"
            other = "Or name another teacher_cache_dir: one is built there."
            raise CacheError(message(argument, shown, expected, f"{fix} {other}"))


def compare_teachers(where: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Raises CacheError where a cache is of another teacher than the one with this `teacher_identity`.

    Returns:
        A clause that names what could not be compared because it is not on this machine; None where all was.
    """
    fix = "Give the teacher that the cache was built from, in the same way."
    teacher = kept.get("teacher", {})
    current = {"teacher.given": ("teacher_model", "given as a", now["given"], fix)}
    if now["given"] == "server":  # by name alone: the same model may have moved to another host
        current["teacher.name"] = ("teacher_server_model", "the name", now["name"], "Set it so.")
        compare(where, kept, current)
        return None
    if now["given"] == "several":
        compare(where, kept, current)
        return _compare_each(where, teacher.get("teachers", []), now["teachers"])
    if "init_kwargs" in now:
        current["teacher.init_kwargs"] = ("teacher_model_init_kwargs", "the value", now["init_kwargs"], "Set it so.")
    words = {"weights": "weights of SHA-256", "config": "a config of SHA-256", "classes": "module classes of SHA-256"}
    missing = [name for name in ("weights", "config") if now.get(name) is None]
    for name, what in words.items():
        if name in now and name not in missing:
            current[f"teacher.{name}"] = ("teacher_model", what, now[name], fix)
    attributes, kept_attributes = now.get("attributes", {}), teacher.get("attributes", {})
    for name in sorted(set(attributes) & set(kept_attributes) if isinstance(kept_attributes, Mapping) else ()):
        what = f"attributes {name!r} of its modules of SHA-256"
        current[f"teacher.attributes.{name}"] = ("teacher_model", what, attributes[name], fix)
    compare(where, kept, current)
    if not missing:
        return None
    if teacher.get("name") != now["name"]:
        shown = f"{now['name']!r}, whose weights are not on this machine"
        expected = f"the name {teacher.get('name')!r}, by which the teacher cache {str(where)!r} was built"
        fix = "To read the cache without its teacher give teacher_model=CachedTeacher(folder) and no teacher_cache_dir."
        raise CacheError(message("teacher_model", shown, expected, fix, because="nothing else could be compared"))
    return f"the {' and the '.join(missing)} of the teacher {now['name']!r} are not on this machine"


def _compare_each(where: Path, kept: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str | None:
    """`compare_teachers` of each of several teachers, and of their weights and names."""
    for argument, field in (("teacher_weights", "weight"), ("teacher_names", "teacher_id")):
        found, fix = [one.get(field) for one in now], "Set it so."
        compare(where, {field: [one.get(field) for one in kept]}, {field: (argument, "the values", found, fix)})
    unknown = []
    for index, (one, other) in enumerate(zip(kept, now, strict=True)):
        with naming(index):
            unknown.append(compare_teachers(where, {"teacher": one}, other))
    return "; ".join(each for each in unknown if each is not None) or None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""A sentence-transformers folder: pooling and layers read from its JSON files, and written beside a trained model.

For: teachers and students of the task `embedding`. No code of the folder runs and nothing is unpickled; the library
itself is not imported.
Shapes: B rows, S positions, H numbers of a hidden state or an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ..files import write_atomically
from ..losses import normalised, pool
from ..validation import fail
from .inputs import real_tokens, takes_features, token_mask
from .logits import named_outputs

MODULES = "modules.json"
EMBEDDING = "sentence_embedding"  # the key of outputs that holds a vector for each row
_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # the library's names: those of kd_pooling
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid}
# What `from_pretrained` takes to find the files of a hub name.
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
# Files of the folder on how texts are read, copied as they are.
_COPIED = ("config_sentence_transformers.json", "sentence_bert_config.json")
_OTHER_MODULES = "Give the model as a SentenceTransformer, whose own modules then run."


class SentenceFolder(NamedTuple):
    """What the files of a sentence-transformers folder hold.

    Args:
        path: folder or hub name. where: arguments of `from_pretrained` that find it.
        modules: the entries of modules.json. transformer: the subfolder of the transformer, "" at the top.
        pooling: a name of `losses.POOLINGS`; pooling_config: its file.
        layers: (type, subfolder, config) of each module after the pooling.
    """

    path: str
    where: dict[str, Any]
    modules: list[dict[str, Any]]
    transformer: str
    pooling: str
    pooling_config: dict[str, Any]
    layers: tuple[tuple[str, str, dict[str, Any]], ...]

    @property
    def normalises(self) -> bool:
        """Whether embeddings are scaled to length 1."""
        return any(kind == "Normalize" for kind, _, _ in self.layers)

    @property
    def has_weights(self) -> bool:
        """Whether a module after the pooling has weights."""
        return any(kind == "Dense" for kind, _, _ in self.layers)


def read_sentence_folder(path: str, where: Mapping[str, Any] | None = None) -> SentenceFolder | None:
    """The folder or hub name as sentence-transformers reads it; None where it has no modules.json.

    Args:
        where: arguments of `from_pretrained`, of which those are taken that find files.

    Raises:
        ValueError: modules, a pooling or layers of other kinds than are applied here.
    """
    where = {name: value for name, value in (where or {}).items() if name in _WHERE}
    found = _read(path, MODULES, where) if path else None
    if found is None:
        return None
    modules = found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else []
    kinds = [_kind(path, str(each.get("type"))) for each in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        expected = "a Transformer, a Pooling, then Dense and Normalize modules"
        _refuse(path, f"with the modules {', '.join(kinds) or 'none'}", expected)
    places = [str(each.get("path", "")) for each in modules]
    if any(Path(place).is_absolute() or ".." in Path(place).parts for place in places):
        _refuse(path, f"with modules in {', '.join(places)}", "subfolders of it")
    configs = [_read(path, f"{place}/config.json", where) or {} for place in places[1:]]
    layers = tuple(zip(kinds[2:], places[2:], configs[1:], strict=True))
    for kind, _, config in layers:
        _check_layer(path, kind, config)
    _check_transformer(path, _read(path, "/".join(filter(None, (places[0], _COPIED[1]))), where) or {})
    pooling = _pooling_of(path, configs[0])
    return SentenceFolder(path, where, modules, places[0], pooling, configs[0], layers)


def sentence_folder_of(model: Any) -> SentenceFolder | None:
    """The folder that a model was loaded from, or that `student_from_teacher` has noted; None where it was no such one.

    None for a model with adapters, which is saved without its base.
    """
    if hasattr(model, "get_base_model"):
        return None
    noted = getattr(model, "kd_sentence_folder", None)
    return noted or read_sentence_folder(getattr(getattr(model, "config", None), "_name_or_path", ""))


def _read(path: str, name: str, where: Mapping[str, Any]) -> Any:
    """The content of a JSON file of a folder or hub name; None where there is no such file."""
    file = find_file(path, name, where)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        fail("teacher_model", repr(path), f"a folder whose {name} is JSON ({error})", "Save the model again.")


def find_file(path: str, name: str, where: Mapping[str, Any]) -> str | None:
    """The path of a file of a folder or hub name on this machine; None where there is no such file."""
    from transformers.utils import cached_file

    silent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        return cached_file(path, name, **where, **silent)
    except (OSError, ValueError):  # no such folder, and no name of a repository
        return None


def _kind(path: str, named: str) -> str:
    """The class of a module, of those that the library itself has."""
    if not named.startswith("sentence_transformers."):
        because = "the code of another class is not run"
        _refuse(path, f"with a module of the class {named}", "modules of sentence-transformers alone", because)
    return named.rpartition(".")[2]


def _check_transformer(path: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError where the embedding is made of another output than the last hidden state."""
    text = config.get("modality_config", {}).get("text", {})
    read = text.get("method_output_name", "last_hidden_state"), config.get("module_output_name", "token_embeddings")
    if read != ("last_hidden_state", "token_embeddings") or text.get("method", "forward") != "forward":
        _refuse(path, f"reading the output {read[0]!r}", "the output 'last_hidden_state' of the transformer")


def _pooling_of(path: str, config: Mapping[str, Any]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:  # before version 6: a flag for each
        flags = {f"pooling_mode_{name}{'_token' if name == 'cls' else '_tokens'}": name for name in ("cls", "mean")}
        flags["pooling_mode_lasttoken"] = "lasttoken"
        known = [name for flag, name in flags.items() if config.get(flag)]
        others = [flag for flag, value in config.items() if value is True and flag.startswith("pooling_mode_")]
        modes = known + [flag for flag in others if flag not in flags]
        modes = modes or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        _refuse(path, f"with the pooling {', '.join(map(str, modes))}", "one of the poolings mean, cls and lasttoken")
    return _POOLINGS[modes[0]]


def _check_layer(path: str, kind: str, config: Mapping[str, Any]) -> None:
    names = {config.get(name) or EMBEDDING for name in ("module_input_name", "module_output_name")}
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, last = activation.rpartition(".")
    known = kind != "Dense" or (package.startswith("torch.nn.") and last in _ACTIVATIONS)
    if names != {EMBEDDING} or config.get("use_residual") or not known:
        shown = f"with a {kind} module of the settings {dict(config)}"
        _refuse(path, shown, f"layers on {EMBEDDING}, with the activation {', '.join(_ACTIVATIONS)}")


def _refuse(path: str, shown: str, expected: str, because: str | None = None) -> NoReturn:
    fail("sentence-transformers folder", f"{path!r}, {shown}", expected, _OTHER_MODULES, because=because)


# ---- a teacher by path ----


class Normalise(nn.Module):
    """Embeddings of length 1."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return normalised(embeddings)


class Dense(nn.Module):
    """activation(linear(embeddings)), in the dtype of its weight."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.activation(self.linear(embeddings.to(self.linear.weight.dtype)))


class SentenceEncoder(nn.Module):
    """A teacher with its pooling and what follows it: columns -> {"sentence_embedding": [B, H]}.

    What it lacks is the inner model's: config, tokens, device.

    Args:
        transformers_model: a transformer, a `SentenceTransformer`, or a module of the user's own.
        pooling: of its last hidden state; None for a `SentenceTransformer`.
        layers: applied to the embeddings; None where the pooling is that of the run, not of a folder.
    """

    def __init__(self, transformers_model: nn.Module, pooling: str | None, layers: nn.Sequential | None = None) -> None:
        super().__init__()
        self.transformers_model, self.pooling = transformers_model, pooling
        self.pooling_of_run = layers is None
        self.layers = nn.Sequential() if layers is None else layers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformers_model"), name)

    @property
    def class_name(self) -> str:
        """For a person."""
        return type(self.transformers_model).__name__

    def forward(self, **columns: Any) -> dict[str, Tensor]:
        inner = self.transformers_model
        outputs = inner(dict(columns)) if takes_features(inner) else inner(**columns)
        return {EMBEDDING: self.layers(embeddings_of(outputs, columns, self.pooling or "mean", "teacher_model"))}


def embeddings_of(outputs: Any, columns: Mapping[str, Any], pooling: str, argument: str) -> Tensor:
    """[B, H] in what a model returned: its "sentence_embedding", a tensor, or its last hidden state, pooled.

    Args:
        columns: what it was given. argument: "model" or "teacher_model", for the error.

    Raises:
        TypeError: it returned none of them.
    """
    found = named_outputs(outputs)
    embeddings = found.get(EMBEDDING) if found else outputs
    if isinstance(embeddings, Tensor):
        return embeddings
    hidden = found.get("last_hidden_state")
    if isinstance(hidden, Tensor):
        return pool_attended(hidden, columns, pooling, argument)
    names = ", ".join(found) or type(outputs).__name__
    expected = f"{EMBEDDING!r} [batch, width], 'last_hidden_state', or a tensor [batch, width]"
    fix = "Take a model without an output head (AutoModel) or a SentenceTransformer, or set kd_task to its task."
    fail(argument, f"a model that returns {names}", expected, fix, error=TypeError)


def pool_attended(hidden: Tensor, columns: Mapping[str, Any], pooling: str, argument: str) -> Tensor:
    """[B, H] of hidden states [B, S, H] at the positions that `attention_mask` attends.

    Raises:
        ValueError: hidden states of other dimensions, or a mask of other positions (sound, images, virtual tokens).
    """
    if hidden.dim() != 3:
        fix = f"Let its forward return {EMBEDDING!r} [batch, width]."
        fail(argument, f"giving a last_hidden_state of shape {tuple(hidden.shape)}", "[batch, sequence, width]", fix)
    mask = token_mask(columns.get("attention_mask"))
    attended = real_tokens(mask, hidden.shape[:2])
    if mask is not None and attended is None:
        shown = f"giving {hidden.shape[1]} hidden states for an attention_mask of shape {tuple(mask.shape)}"
        fix = f"Wrap it in a module that pools them and returns {EMBEDDING!r} [batch, width]."
        because = "which of them are of padding is not known"
        fail(argument, shown, "one hidden state for each entry of the mask", fix, because=because)
    return pool(hidden, attended, pooling)


def sentence_encoder(transformers_model: nn.Module, folder: SentenceFolder) -> SentenceEncoder:
    """The transformer of a folder with what follows it there, in the transformer's dtype and on its device.

    Raises:
        ValueError: the weights of a Dense module are no safetensors file, or do not fit its config.
    """
    layers: list[nn.Module] = []
    for kind, place, config in folder.layers:
        layers.append(Normalise() if kind == "Normalize" else _dense(folder, place, config))
    first = next(transformers_model.parameters())
    made = nn.Sequential(*layers).to(device=first.device, dtype=first.dtype)
    return SentenceEncoder(transformers_model, folder.pooling, made).eval()


def _dense(folder: SentenceFolder, place: str, config: Mapping[str, Any]) -> Dense:
    from safetensors.torch import load_file

    file = find_file(folder.path, f"{place}/model.safetensors", folder.where)
    if file is None:
        because = "a pickle can run code"
        shown = f"{folder.path!r}, whose module {place} has no model.safetensors"
        fix = "Load it with the library, and save it again with save_pretrained."
        fail("teacher_model", shown, "weights in safetensors", fix, because=because)
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    weights = {name.removeprefix("linear."): tensor for name, tensor in load_file(file).items()}
    shapes = [{name: list(x.shape) for name, x in each.items()} for each in (weights, linear.state_dict())]
    if shapes[0] != shapes[1]:
        shown = f"{folder.path!r}, whose module {place} has the weights {shapes[0]}"
        fail("teacher_model", shown, f"{shapes[1]}, by its config", "Save the model again.")
    linear.load_state_dict(weights)
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    return Dense(linear, _ACTIVATIONS[activation]())


def width_of(model: nn.Module) -> int | None:
    """The numbers of a model's embedding, by its layers or its config; None where neither has it."""
    inner = getattr(model, "transformers_model", None)
    if takes_features(model):
        return model.get_embedding_dimension()  # type: ignore[operator]
    dense = [layer for layer in getattr(model, "layers", ()) if isinstance(layer, Dense)]
    if inner is not None:
        return dense[-1].linear.out_features if dense else width_of(inner)
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    return width if isinstance(width, int) else None


# ---- a student that is saved ----


def write_sentence_folder(output_dir: Any, folder: SentenceFolder, pooling: str, width: int) -> None:
    """Makes of a folder with a saved transformer a sentence-transformers folder like `folder`, with this pooling.

    Args:
        width: H.
    """
    out = Path(output_dir)
    kinds = ["Pooling", *(kind for kind, _, _ in folder.layers)]
    configs = [_pooling_config(folder.pooling_config, pooling, width), *(config for _, _, config in folder.layers)]
    entries = [{**folder.modules[0], "path": ""}]
    for number, (kind, config) in enumerate(zip(kinds, configs, strict=True), start=1):
        entries.append({**folder.modules[number], "path": f"{number}_{kind}"})
        write_atomically(out / f"{number}_{kind}" / "config.json", json.dumps(config, indent=2))
    for name in _COPIED:
        place = "/".join(filter(None, (folder.transformer if name == _COPIED[1] else "", name)))
        kept = _read(folder.path, place, folder.where)
        if kept is not None:
            write_atomically(out / name, json.dumps(kept, indent=2))
    if not any(out.glob("tokenizer*")):  # the trainer had none: the library reads texts with that of the folder
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder.path, subfolder=folder.transformer, **folder.where).save_pretrained(out)
    write_atomically(out / MODULES, json.dumps(entries, indent=2))


def _pooling_config(kept: Mapping[str, Any], pooling: str, width: int) -> dict[str, Any]:
    """The file of the pooling with another mode and width, in the form that the folder has."""
    named = next(name for name, own in _POOLINGS.items() if own == pooling)
    sizes = {name: width for name in ("embedding_dimension", "word_embedding_dimension") if name in kept}
    if "pooling_mode" in kept or not any(name.startswith("pooling_mode_") for name in kept):
        return {**kept, **sizes, "pooling_mode": named}
    flags = {name: False for name in kept if name.startswith("pooling_mode_")}
    flag = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    return {**kept, **sizes, **flags, flag[named]: True}

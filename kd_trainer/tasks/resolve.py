"""Which task of `TASKS` a model has: by its Auto class, its config, its labels, or in the end by its logits.

For: the trainer on the first batch, and the teacher, which the same Auto class loads.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..validation import fail
from .inputs import front_positions, takes_features, vocabulary_rows
from .kinds import TASKS, Task
from .logits import Wanted

# What transformers' other models do, by the mapping that lists them: none has the logits of one of the tasks. The more
# special mappings come first, since several list the same models.
OTHER_PURPOSES = {
    "MODEL_FOR_OBJECT_DETECTION_MAPPING": "object detection",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING": "object detection by text",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING": "segmentation",
    "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING": "instance segmentation",
    "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING": "image segmentation",
    "MODEL_FOR_MASK_GENERATION_MAPPING": "mask generation",
    "MODEL_FOR_IMAGE_MATTING_MAPPING": "image matting",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING": "depth estimation",
    "MODEL_FOR_NORMAL_ESTIMATION_MAPPING": "estimating surface normals",
    "MODEL_FOR_POINTMAP_ESTIMATION_MAPPING": "pointmap estimation",
    "MODEL_FOR_POSE_ESTIMATION_MAPPING": "pose estimation",
    "MODEL_FOR_KEYPOINT_DETECTION_MAPPING": "keypoint detection",
    "MODEL_FOR_KEYPOINT_MATCHING_MAPPING": "keypoint matching",
    "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING": "image to image",
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING": "masked image modelling",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING": "comparing images with texts (contrastive)",
    "MODEL_FOR_RETRIEVAL_MAPPING": "retrieval",
    "MODEL_FOR_AUDIO_XVECTOR_MAPPING": "speaker embeddings (its logits are no classes)",
    "MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING": "table question answering",
    "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING": "visual question answering",
    "MODEL_FOR_TABLE_RECOGNITION_MAPPING": "table recognition",
    "MODEL_FOR_TEXT_RECOGNITION_MAPPING": "text recognition",
    "MODEL_FOR_RNNT_MAPPING": "transducer speech recognition",
    "MODEL_FOR_TDT_MAPPING": "transducer speech recognition",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING": "text to speech",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING": "text to speech",
    "MODEL_FOR_AUDIO_TOKENIZATION_MAPPING": "audio tokenization",
    "MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING": "time series classification",
    "MODEL_FOR_TIME_SERIES_REGRESSION_MAPPING": "time series regression",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING": "time series prediction",
    "MODEL_FOR_DECISION_MAPPING": "decisions",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "generation without labels",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING": "generation without labels",
    "MODEL_FOR_PRETRAINING_MAPPING": "pretraining",
    "MODEL_FOR_BACKBONE_MAPPING": "features (a backbone)",
    "MODEL_FOR_TEXT_ENCODING_MAPPING": "hidden states (a model without an output head)",
    "MODEL_FOR_IMAGE_MAPPING": "hidden states (a model without an output head)",
    "MODEL_MAPPING": "hidden states (a model without an output head)",
}


# Of these the logits are of queries, and query i of one model is not query i of another: no kd_task fits them.
_OF_QUERIES = [name for name, purpose in OTHER_PURPOSES.items() if "detection" in purpose or "segmentation" in purpose]
_WITHOUT_AUTO_CLASS = {"MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING": "causal_lm"}  # ImageGPT


def auto_classes(task: Task) -> list[Any]:
    """The Auto classes of a task that the installed transformers has."""
    import transformers

    found = (getattr(transformers, name, None) for name in task.auto_classes)
    return [auto_class for auto_class in found if auto_class is not None]


def auto_class_of(model: nn.Module) -> tuple[Task, Any] | None:
    """The task and the Auto class of transformers that `model` belongs to; None where transformers lists it nowhere.

    The Auto class is None for the few lists that have none: such a teacher cannot be loaded by path.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for task in TASKS.values():
        for auto_class in auto_classes(task):
            listed = _listed(auto_class._model_mapping, config)
            if isinstance(model, listed) and _has_logits(model, auto_class.__name__):
                if not task.encoder_decoder or _is_encoder_decoder(config):
                    return task, auto_class
                return TASKS["causal_lm"], auto_class  # a decoder that reads speech or images: it shifts its labels
    for mapping, name in _WITHOUT_AUTO_CLASS.items():
        if isinstance(model, _listed(getattr(modeling_auto, mapping, {}), config)):
            return TASKS[name], None
    return None


def _listed(mapping: Any, config: Any) -> tuple[type, ...]:
    """The classes that a mapping of transformers has for a config."""
    try:
        found = mapping.get(type(config), ())
    except ValueError:  # a class that transformers names and does not have
        return ()
    return found if isinstance(found, tuple) else (found,)


def _is_encoder_decoder(config: Any) -> bool:
    """By the config, or by its language model's where that is a part (BLIP-2 with a T5)."""
    return any(getattr(c, "is_encoder_decoder", False) for c in (config, config.get_text_config()))


def _has_logits(model: nn.Module, auto_class: str) -> bool:
    """Whether a model of one of the Auto classes that list models of other kinds too has the outputs of its task."""
    if auto_class == "AutoModelForVisualQuestionAnswering":  # ViLT has classes, BLIP writes the answer
        return "logits" in (outputs_declared(model) or ())
    if auto_class in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):  # PI0 moves robots
        return "labels" in inspect.signature(model.forward).parameters
    if auto_class in TASKS["embedding"].auto_classes:  # an encoder-decoder's last hidden state is of its decoder
        outputs = outputs_declared(model) or ()
        return "last_hidden_state" in outputs and not {"encoder_last_hidden_state", "logits"} & set(outputs)
    return True


def outputs_declared(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the outputs that a forward's annotation declares, its loss aside; None where it declares none."""
    forward = inspect.unwrap(type(model).forward)
    declared = inspect.signature(forward).return_annotation
    if isinstance(declared, str):
        try:
            declared = eval(declared, dict(vars(sys.modules[forward.__module__])))
        except Exception:  # a name that is imported for type checkers alone
            return None
    for kind in typing.get_args(declared) or (declared,):
        if dataclasses.is_dataclass(kind):
            return tuple(field.name for field in dataclasses.fields(kind) if field.name != "loss")
    return None


def refuse_other_purposes(model: nn.Module, lists: Iterable[str] = tuple(OTHER_PURPOSES)) -> None:
    """Raises ValueError for a model of transformers that has no logits of classes, naming what it has instead.

    A subclass with a forward of the user's own is let through: it may have what its base has not.

    Args:
        lists: the keys of `OTHER_PURPOSES` to look in.
    """
    from transformers.models.auto import modeling_auto

    config: Any = getattr(model, "config", None)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    own = not inspect.unwrap(type(model).forward).__module__.startswith(("transformers.", "torch.nn."))
    if config is None or own:
        return
    for name in lists:
        if isinstance(model, _listed(getattr(modeling_auto, name, {}), config)):
            outputs = outputs_declared(model)
            offers = "" if outputs is None else f", with the outputs {', '.join(outputs)}"
            fail(
                "model",
                f"a {type(model).__name__} for {OTHER_PURPOSES[name]}{offers}",
                f"a model with class logits for one of the tasks {', '.join(TASKS)}",
                "Take a model with such an output head. Or let a module of your own return such logits as 'logits', "
                "and set kd_task.",
            )


def task_for(model: nn.Module, kd_task: str | None, shifts_labels: bool) -> Task | None:
    """The task of `model`: named by `kd_task`, known from its Auto class, or causal where upstream shifts its labels.

    None means that only the logits can tell (a plain module): see `task_from_logits`.

    Raises:
        ValueError: a model of transformers for another purpose: see `refuse_other_purposes`.
    """
    if kd_task is not None:
        if auto_class_of(model) is None:
            refuse_other_purposes(model, _OF_QUERIES)
        return TASKS[kd_task].of_model(model)
    if takes_features(model):
        return TASKS["embedding"]
    known = auto_class_of(model)
    if known is not None:
        return known[0].of_model(model)
    if shifts_labels:
        return TASKS["causal_lm"]
    refuse_other_purposes(model)
    return None


def check_virtual_tokens(model: nn.Module, task: Task, argument: str) -> None:
    """Raises ValueError for PEFT prompts whose positions PEFT itself does not keep apart from those of the labels."""
    peft: Any = getattr(model, "active_peft_config", None)
    if not getattr(peft, "is_prompt_learning", False):
        return
    kind = str(getattr(peft.peft_type, "value", peft.peft_type))
    because = None
    if task.over_positions and front_positions(model, {}):
        because = "PEFT counts the virtual tokens in start_positions and end_positions"
    elif task.encoder_decoder and kind == "MULTITASK_PROMPT_TUNING":
        because = "PEFT runs it with labels alone, not with decoder_input_ids"
    if because is not None:
        shown = f"a model with {peft.num_virtual_tokens} virtual tokens ({kind})"
        fail(argument, shown, f"LoRA or full weights for the task {task.name!r}", "Use LoRA.", because=because)


# What upstream's classifiers call their kinds of labels, and the task of each.
PROBLEM_TYPES = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


def by_problem_type(task: Task, student: nn.Module, kd_task: str | None, labels: Tensor | None) -> Task:
    """The task that a classifier's loss has upstream: by `config.problem_type`, else by num_labels and labels' dtype.

    Upstream's forward writes `problem_type` into the config when it sees labels; here labels never reach it, so this
    does.
    """
    config: Any = getattr(student, "config", None)
    if task.name not in PROBLEM_TYPES.values() or not hasattr(config, "problem_type"):
        return task
    known = config.problem_type
    if known is not None and known not in PROBLEM_TYPES:
        fail("problem_type", repr(known), "one of " + ", ".join(PROBLEM_TYPES), "Fix the student's config.")
    if kd_task is not None:
        name = kd_task
        if known is not None and PROBLEM_TYPES[known] != name:
            expected = f"{PROBLEM_TYPES[known]!r}, as the student's config says (problem_type)"
            fail("kd_task", repr(kd_task), expected, "Leave it out, or change problem_type in the config.")
    elif known is not None:
        name = PROBLEM_TYPES[known]
    elif config.num_labels == 1:
        name = "regression"
    else:
        name = "multi_label_classification" if labels is not None and labels.is_floating_point() else "classification"
    config.problem_type = next(problem for problem, task in PROBLEM_TYPES.items() if task == name)
    return TASKS[name]


def task_from_logits(logits: Tensor) -> Task:
    """[B, C] is a classification, [B, S, C] one classification a position (unshifted)."""
    names = {2: "classification", 3: "token_classification"}
    if logits.dim() not in names:
        fail(
            "teacher_model",
            f"giving logits of shape {tuple(logits.shape)}",
            "[batch, classes] or [batch, sequence, classes]",
            "Return such logits, or set kd_task.",
        )
    return TASKS[names[logits.dim()]]


def classes_have_names(student: nn.Module, task: Task | None) -> bool:
    """Whether class i of the teacher must mean class i of the student by name; `task`: None where not yet known."""
    config: Any = getattr(student, "config", None)
    numbers = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1
    return not numbers and (task is None or task.named_classes)


def classes_of(student: nn.Module, task: Task) -> int | None:
    """How many classes the student's logits have: of a vocabulary by its layer, else as its config counts them, which
    need not be true."""
    if task.over_tokens:
        return vocabulary_rows(student, written=True, measured=True)
    if not task.named_classes:  # num_labels is no number of choices or positions
        return None
    classes = getattr(getattr(student, "config", None), "num_labels", None)
    return classes if isinstance(classes, int) else None


def wanted_logits(task: Task | None, labels: Any, models: Iterable[nn.Module], vocabulary: int | None) -> Wanted:
    """What batch and configs tell of the logits, for models that return several tensors.

    Args:
        vocabulary: classes of a teacher cache; None without one.
    """
    labels = labels if isinstance(labels, Tensor) and labels.numel() else None
    dims = None if task is None else task.dims
    if task is None and labels is not None:
        dims = {1: 2, 2: 3}.get(labels.dim())
    widths: list[Any] = [vocabulary]
    at_least = 0 if task is not None and not task.softmax else 2
    if task is not None and task.a_label_a_logit:
        widths += [] if labels is None else [labels.shape[-1] if labels.dim() > 1 else 1]
    elif labels is not None and at_least and not labels.is_floating_point():
        at_least = max(at_least, int(labels.max()) + 1)
    if task is not None and task.over_tokens:
        widths += [vocabulary_rows(model, written=True) for model in models]
    elif task is None or task.named_classes:
        widths += [getattr(getattr(model, "config", None), "num_labels", None) for model in models]
    return Wanted(dims, tuple(dict.fromkeys(w for w in widths if isinstance(w, int))), at_least)

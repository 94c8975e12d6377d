"""Every list of models in transformers: the task that its models have, or what the refusal names."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers.models.auto import modeling_auto

from kd_trainer.tasks.resolve import OTHER_PURPOSES, auto_class_of, task_for

# transformers' lists by the task that their models have; "seq2seq_lm or causal_lm" by the model's config.
TASKS = {
    "SEQUENCE_CLASSIFICATION": "classification",
    "IMAGE_CLASSIFICATION": "classification",
    "AUDIO_CLASSIFICATION": "classification",
    "VIDEO_CLASSIFICATION": "classification",
    "NEXT_SENTENCE_PREDICTION": "classification",
    "MULTIPLE_CHOICE": "multiple_choice",
    "TOKEN_CLASSIFICATION": "token_classification",
    "AUDIO_FRAME_CLASSIFICATION": "audio_frame_classification",
    "CTC": "ctc",
    "SEMANTIC_SEGMENTATION": "semantic_segmentation",
    "CAUSAL_LM": "causal_lm",
    "CAUSAL_IMAGE_MODELING": "causal_lm",
    "MASKED_LM": "masked_lm",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq_lm or causal_lm",
    "SPEECH_SEQ_2_SEQ": "seq2seq_lm or causal_lm",
    "IMAGE_TEXT_TO_TEXT": "seq2seq_lm or causal_lm",
    "MULTIMODAL_LM": "seq2seq_lm or causal_lm",
    "QUESTION_ANSWERING": "question_answering",
    "DOCUMENT_QUESTION_ANSWERING": "question_answering",
    "VISUAL_QUESTION_ANSWERING": "multi_label_classification",
}
# Lists that hold the models of others, or nothing that is trained: no entry of their own.
ALIASES = {"AUDIO_TOKENIZATION_NAMES"}


def names_of_lists() -> list[str]:
    names = (name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING"))
    return sorted(set(names))


def short(name: str) -> str:
    return name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING")


def test_every_list_has_a_task_or_is_refused():
    known = {f"MODEL_FOR_{name}_MAPPING" for name in TASKS} | set(OTHER_PURPOSES)
    assert set(names_of_lists()) <= known, "add it to TASKS or OTHER_PURPOSES"


def listed(name: str) -> list[tuple[Any, type]]:
    """(config, model class) of a list, of what this machine can import and whose config has defaults that fit."""
    found: list[tuple[Any, Any]] = []
    mapping = getattr(modeling_auto, name, {})
    for config in mapping:
        try:
            models = mapping[config]
            found += [(config(), each) for each in (models if isinstance(models, (tuple, list)) else (models,))]
        except Exception:  # upstream raises many kinds where a config has no defaults that fit
            continue
    return [(config, model) for config, model in found if isinstance(model, type) and issubclass(model, nn.Module)]


def without_weights(config: Any, model: type) -> Any:
    """The model's class and config, without its layers: what recognises a model looks at nothing else."""
    made = model.__new__(model)
    nn.Module.__init__(made)
    made.config = config
    return made


# The task of these is not that of their list, but of another list, which comes first, or of their outputs.
EXCEPTIONS = {
    "BlipForQuestionAnswering": {"refused"},
    "Blip2ForConditionalGeneration": {"seq2seq_lm", "causal_lm"},
    "LxmertForQuestionAnswering": {"question_answering"},
    "PI0ForConditionalGeneration": {"refused"},
    "DiffusionGemmaForBlockDiffusion": {"refused"},
    "Qwen2_5OmniForConditionalGeneration": {"refused"},
    "Qwen3OmniMoeForConditionalGeneration": {"refused"},
}


def with_another_task(name: str, expected: set[str]) -> dict[str, str]:
    """The models of a list whose task is another than expected, with what was found."""
    wrong = {}
    for config, model in listed(f"MODEL_FOR_{name}_MAPPING"):
        allowed = EXCEPTIONS.get(model.__name__, expected)
        try:
            task = task_for(without_weights(config, model), None, False)
            found = "unknown" if task is None else task.name
        except ValueError as error:
            found = "refused" if "expected a model with class logits" in str(error) else str(error)
        if found not in allowed:
            wrong[model.__name__] = found
    return wrong


@pytest.mark.parametrize("name", TASKS)
def test_models_of_a_list_have_its_task(name):
    """BART is listed as a masked language model too and is trained as an encoder-decoder: the first entry wins."""
    allowed = set(TASKS[name].split(" or ")) | ({"seq2seq_lm", "causal_lm"} if name == "MASKED_LM" else set())
    assert not with_another_task(name, allowed)


@pytest.mark.parametrize("name", OTHER_PURPOSES)
def test_models_for_other_purposes_are_refused(name):
    """Those lists hold models of the tasks too (T5 is listed for pretraining), which have their task."""
    for config, model in listed(name)[:60]:
        made = without_weights(config, model)
        if auto_class_of(made) is not None:
            continue
        with pytest.raises(ValueError, match=r"`model` is a .* for .*; expected a model with class logits"):
            task_for(made, None, False)

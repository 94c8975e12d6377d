"""What may stand behind the mixin: a `transformers.Trainer` whose loss is a task's loss."""

from __future__ import annotations

import pytest
from transformers import Seq2SeqTrainer, Trainer

from kd_trainer import DistillationMixin, DistillationTrainer
from tests.helpers import tiny


def of(library: str, *bases: type, name: str = "Trainer", **members) -> type:
    """A class as another library would have it, which is not installed here."""
    return type(name, bases or (object,), {"__module__": library, **members})


def does_nothing(self, *args, **kwargs):
    return None


@pytest.mark.parametrize("method", ["train", "fit", "training_step", "compute_loss"])
def test_a_trainer_of_another_kind_is_refused_where_the_class_is_defined(method):
    other = of("somewhere.trainers", **{method: does_nothing})
    with pytest.raises(
        TypeError,
        match=r"`bases` is of K with somewhere.trainers.Trainer, which is no transformers.Trainer; expected "
        r"DistillationMixin in front of a transformers.Trainer.*SoftTargetLoss",
    ):
        type("K", (DistillationMixin, other), {})
    with pytest.raises(TypeError, match=r"which is no transformers\.Trainer"):  # in whatever order
        type("K", (other, DistillationMixin), {})
    with pytest.raises(TypeError, match=r"which is no transformers\.Trainer"):  # and with a class of the user's between
        type("K", (DistillationMixin, type("Own", (other,), {})), {})


def test_setfit_has_its_own():
    setfit = of("setfit.trainer", of("setfit.mixin", name="ColumnMappingMixin"), train=does_nothing)
    with pytest.raises(TypeError, match=r"with setfit.trainer.Trainer.*SetFit has a DistillationTrainer of its own"):
        type("K", (DistillationMixin, setfit), {})


def test_a_class_without_any_trainer_cannot_be_made():
    class Settings:
        """No trainer: it may stand there."""

    class Between(DistillationMixin, Settings):
        """To be put in front of a Trainer later."""

    with pytest.raises(TypeError, match=r"of Between without transformers.Trainer.*class Between\(DistillationMixin"):
        Between(model=tiny.Plain(), teacher_model=tiny.Plain())


def test_classes_beside_a_trainer_are_welcome(tmp_path):
    class Between(DistillationMixin):
        pass

    class Helper:
        def train(self, *args, **kwargs):
            return super().train(*args, **kwargs)

    class K(Between, Helper, Trainer):
        pass

    class Seq(Between, Seq2SeqTrainer):
        pass

    class Sub(Helper, DistillationTrainer):
        pass

    student, teacher = tiny.models("classification")
    for cls in (K, Sub):
        run = cls(
            model=student,
            args=tiny.arguments(tmp_path, max_steps=1),
            teacher_model=teacher,
            train_dataset=tiny.rows("classification"),
            data_collator=tiny.pad,
        )
        run.train()
        assert len(tiny.logged(run, "soft_loss")) == 1


@pytest.mark.parametrize("module", ["sentence_transformers.trainer", "sentence_transformers.cross_encoder.trainer"])
def test_sentence_transformers_trainers_get_advice_that_helps(module):
    upstream = of(module, Trainer, name="SentenceTransformerTrainer", compute_loss=does_nothing)
    own = type("Own", (upstream,), {"compute_loss": does_nothing})
    plain = type("Plain", (upstream,), {})
    for base in (upstream, own, plain):
        with pytest.raises(TypeError, match=r"compute_loss of its own.*own distillation losses \(MSELoss") as e:
            type("K", (DistillationMixin, base), {})
        assert "Move it" not in str(e.value)


def test_trls_other_trainers_get_advice_that_helps():
    trl = pytest.importorskip("trl")
    with pytest.raises(TypeError, match=r"with RewardTrainer.*Take TRL's SFTTrainer") as e:
        type("K", (DistillationMixin, trl.RewardTrainer), {})
    assert "Move it" not in str(e.value)

"""The examples run, print what their headers promise, and `by_hand.py` gives the trainer's own losses."""

from __future__ import annotations

import copy
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from kd_trainer import DistillationTrainer, MLPConfig, MLPForImageClassification, synthetic_classification
from tests.helpers import tiny
from tests.helpers.script_process import run_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(name: str, folder: Path) -> str:
    """What the example prints when it is started by its header's command, in an empty folder."""
    return run_script(EXAMPLES / name, [], folder=folder, timeout=300)


def output_of_seeds(name: str, seeds: int, folder: Path) -> str:
    """What the example prints of its first seeds."""
    start = folder / "start.py"
    lines = "import runpy, sys", f"sys.path.insert(0, {str(EXAMPLES)!r})"
    start.write_text("\n".join([*lines, f"runpy.run_path({str(EXAMPLES / name)!r})['main'](seeds={seeds})"]))
    return run_script(start, [], timeout=300)


def figures(text: str, *patterns: str) -> list[float]:
    """The number that each pattern captures in `text`."""
    found = [re.search(pattern, text) for pattern in patterns]
    missing = [pattern for pattern, match in zip(patterns, found, strict=True) if match is None]
    assert not missing, f"{missing} not in:\n{text}"
    return [float(match[1]) for match in found]


def header_of(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.parametrize(("name", "limit"), [("minimal.py", 40), ("by_hand.py", 60), ("soft_targets.py", 60)])
def test_an_example_is_short_and_opens_with_its_command(name, limit):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < limit
    header = header_of(name)
    assert f"python examples/{name}" in header
    assert "seconds" in header
    assert "Expected" in header


@pytest.mark.trains
def test_minimal_gains_from_the_swap(tmp_path):
    pattern = r" (\d+\.\d)%"
    printed = figures(
        output_of("minimal.py", tmp_path), *(f"{name}:{pattern}" for name in ("teacher", "before", "after"))
    )
    promised = figures(
        header_of("minimal.py"), "teacher" + pattern, r"plain student\)" + pattern, r"distilled student\)" + pattern
    )
    # 2,000 draws of a share p err by sqrt(p (1 - p) / 2000) <= 1.1 points; another machine's rounding moves some rows.
    assert printed == pytest.approx(promised, abs=3)
    teacher, before, after = printed
    assert before + 15 < after < teacher


@pytest.mark.trains
@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("text_classification.py", 4),
        ("image_classification.py", 15),
        ("token_classification.py", 15),
        ("question_answering.py", 15),
        ("summarization.py", 10),
    ],
)
def test_a_task_gains_from_the_swap(name, margin, tmp_path):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
    pattern = r" (\d+\.\d)%"
    teacher, before, after = figures(
        output_of(name, tmp_path), *(f"{which}:{pattern}" for which in ("teacher", "before", "after"))
    )
    promised = figures(
        header_of(name), "teacher" + pattern, r"plain student\)" + pattern, r"distilled student\)" + pattern
    )
    # 600 draws of a share err by 2 points, and another machine's rounding moves a small student by some more.
    assert [teacher, before, after] == pytest.approx(promised, abs=9)
    assert before + margin < after < teacher


@pytest.mark.trains
def test_a_masked_language_model_gains_from_the_swap(tmp_path):
    assert len((EXAMPLES / "masked_lm.py").read_text(encoding="utf-8").splitlines()) < 80
    printed = output_of("masked_lm.py", tmp_path)
    teacher, before, after = figures(printed, *(rf"{which}: (\d+\.\d)" for which in ("teacher", "before", "after")))
    header = " ".join(header_of("masked_lm.py").split())
    promised = figures(header, r"teacher (\d+\.\d)", r"plain student\) (\d+\.\d)", r"distilled student\) (\d+\.\d)")
    assert [teacher, before, after] == pytest.approx(promised, rel=0.1)  # another machine rounds otherwise
    assert teacher < after < 0.85 * before


OBJECTIVES = ("no teacher", "forward KL", "DKD, beta 8", "standardised logits")


def test_objectives_are_compared_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len((EXAMPLES / "objectives.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "objectives.py"))["main"](seeds=2, steps=10)
    cell = r"(\d+\.\d) ± \d+\.\d"
    printed = capsys.readouterr().out
    labelled = figures(printed, *(rf"{name} +{cell}" for name in OBJECTIVES))
    mixed = figures(printed, *(rf"{name} +\S+ ± \S+ +{cell}" for name in OBJECTIVES))
    assert all(0 < value < 100 for value in labelled + mixed)
    assert len({*mixed}) > 1  # the objectives differ


@pytest.mark.trains
def test_objectives_keep_their_promises(tmp_path):
    printed, header = output_of_seeds("objectives.py", 3, tmp_path), header_of("objectives.py")
    patterns = [rf"{name} +(\d+\.\d) ±" for name in OBJECTIVES]
    patterns += [rf"{name} +\S+ ± \S+ +(\d+\.\d) ±" for name in OBJECTIVES[1:]]
    # Three of the five seeds: 797 draws of a share err by a point; another machine's rounding moves some rows.
    assert figures(printed, *patterns) == pytest.approx(figures(header, *patterns), abs=3)


@pytest.mark.trains
def test_features_of_layers_gain_in_the_small_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert len((EXAMPLES / "encoder_features.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "encoder_features.py"))["main"](seeds=2)
    names = ("teacher", "no teacher", "logits", "logits, relation", "logits, relation, hidden")
    patterns = [rf"(?m)^{name} +(\d+\.\d) ±" for name in names]
    printed = figures(capsys.readouterr().out, *patterns)
    promised = figures(header_of("encoder_features.py"), *(pattern.replace("^", r"^\s+") for pattern in patterns))
    # Two of the three seeds: 700 draws of a share err by 2 points, a seed of a small student by some more.
    assert printed == pytest.approx(promised, abs=9)
    assert printed[1] < printed[2] < printed[4] < printed[0]


EMBEDDINGS = ("untrained", "trained with mean pooling", "trained with cls pooling")


@pytest.mark.trains
def test_embeddings_are_compared_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embeddings.py"])
    monkeypatch.syspath_prepend(EXAMPLES)
    assert len((EXAMPLES / "embeddings.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "embeddings.py"))["main"](seeds=1, teacher_steps=100, steps=50)
    printed = figures(capsys.readouterr().out, *(rf"{name} +(-?\d\.\d+) ±" for name in EMBEDDINGS))
    untrained, right, wrong = printed
    assert wrong + 0.05 < untrained < right - 0.005


@pytest.mark.trains
def test_embeddings_keep_their_promises(tmp_path):
    printed, header = output_of_seeds("embeddings.py", 1, tmp_path), header_of("embeddings.py")
    patterns = [rf"{name} +(-?\d\.\d+) ±" for name in EMBEDDINGS]
    untrained, right, wrong = found = figures(printed, *patterns)
    assert found == pytest.approx(figures(header, *patterns), abs=0.08)  # another machine's rounding moves the teacher
    assert right > max(untrained, wrong) + 0.015


CROSS = ("teacher", "no teacher", "chunks, tau 1", "chunks, tau 100")


def test_students_of_a_teacher_with_other_tokens_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lm_text

    text = (EXAMPLES / "cross_tokenizer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    words = "abcdefgh ijkl mnop".split()  # noqa: SIM905
    made = [f"{words[i % 3]} {i} {words[i % 2]}" for i in range(6600)]
    monkeypatch.setattr(lm_text, "local_texts", lambda: {"train": made[:6050], "validation": made[6050:]})
    runpy.run_path(str(EXAMPLES / "cross_tokenizer.py"))["main"](seeds=2, teacher_steps=2, steps=2)
    printed = capsys.readouterr().out
    bits = figures(printed, *(rf"{name} +(\d+\.\d+) ± \d+\.\d+ bits per byte" for name in CROSS))
    assert all(0 < value < 20 for value in bits)
    assert len({*bits}) > 1  # the students differ from the teacher


@pytest.mark.trains
def test_another_tokenizer_gains_little_in_few_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "cross_tokenizer.py"))["main"](seeds=2, teacher_steps=40, steps=25)
    printed = capsys.readouterr().out
    teacher, alone, *chunks = figures(printed, *(rf"{name} +(\d+\.\d+) ± \S+ bits per byte" for name in CROSS))
    # Without a model a byte takes 8 bits.
    assert teacher + 0.3 < min(alone, *chunks)
    assert max(alone, *chunks) < 5
    assert all(bits < alone + 0.1 for bits in chunks)


def test_minimal_marks_every_line_that_differs():
    """Without the marked lines it is a script of transformers and data alone."""
    lines = (EXAMPLES / "minimal.py").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines[lines.index("from datasets import concatenate_datasets  # new:") :] if line]
    marked = [line for line in code if "# new:" in line]
    assert len(marked) == 5
    assert not [line for line in code if "Distillation" in line and line not in marked]
    assert [line for line in code if "Trainer(" in line and line not in marked]


@pytest.mark.trains
def test_soft_targets_reach_the_optimum(tmp_path):
    patterns = r"start (\d\.\d+)", r"Adam (\d\.\d+)", r"optimum (\d\.\d+)"
    printed = figures(output_of("soft_targets.py", tmp_path), *patterns)
    assert printed == pytest.approx(
        figures(header_of("soft_targets.py"), *patterns), abs=1.01e-4
    )  # the last digit shown
    start, end, optimum = printed
    assert start == pytest.approx(0.0735, abs=1.01e-4)
    assert end == pytest.approx(optimum, abs=1.01e-4)


def test_by_hand_keeps_its_promises(capsys):
    runpy.run_path(str(EXAMPLES / "by_hand.py"), run_name="__main__")
    printed = capsys.readouterr().out
    patterns = r"loss (\d\.\d+) at the first of 100", r"steps, (\d\.\d+) at the last"
    assert figures(printed, *patterns) == pytest.approx(figures(header_of("by_hand.py"), *patterns), rel=0.01)
    off_2, off_4 = figures(printed, r"eq\. \(2\) by (\S+) ", r"eq\. \(4\) by (\S+)%")
    # eq. (2) is exact but for float64's rounding of probabilities near 1/10 that differ by about 1/T; eq. (4) is the
    # first order in 1/T.
    assert off_2 < 1e-11
    assert off_4 == pytest.approx(0.3, abs=0.11)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 3.0), (0.3, 1.0), (1.0, 5.0), (0.0, 2.0)])
def test_by_hand_is_the_trainer(alpha, temperature, tmp_path):
    train_by_hand = runpy.run_path(str(EXAMPLES / "by_hand.py"))["train_by_hand"]
    steps, size, rate = 20, 32, 0.1
    torch.manual_seed(0)
    teacher, student = (MLPForImageClassification(MLPConfig(hidden_sizes=sizes)) for sizes in ([256] * 3, [64]))
    rows = synthetic_classification(num_train=steps * size)["train"]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    train_by_hand(teacher, student, batches, alpha=0.0, temperature=1.0, learning_rate=rate)  # a trained teacher
    trainer = DistillationTrainer(
        model=copy.deepcopy(student),
        teacher_model=teacher,
        args=tiny.arguments(
            tmp_path,
            learning_rate=rate,
            max_steps=steps,
            per_device_train_batch_size=size,
            kd_alpha=alpha,
            kd_temperature=temperature,
        ),
        train_dataset=rows,
    )
    trainer.train()
    by_hand = train_by_hand(student, teacher, batches, alpha=alpha, temperature=temperature, learning_rate=rate)
    logged = tiny.logged(trainer, "loss")
    assert len(logged) == len(by_hand) == steps
    assert by_hand[-1] < 0.8 * by_hand[0]  # it did learn something
    # 1e-6 as long as the loss is not small beside the rounding of the log-probabilities that it is a difference of.
    rounding = alpha * temperature**2 * torch.finfo(torch.float32).eps * math.log(10)
    assert logged == pytest.approx(by_hand, rel=1e-6, abs=rounding if alpha == 1 else 0)


@pytest.mark.trains
def test_a_quantised_student_learns_from_few_rows_of_its_full_precision_self(tmp_path, monkeypatch, capsys):
    """The example with fewer steps: plain fine-tuning forgets, distillation makes good what rounding has cost."""
    monkeypatch.chdir(tmp_path)
    assert len((EXAMPLES / "quantization.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "quantization.py"))["main"](seeds=1, steps=100, teacher_steps=200, few=50)
    names = ("full precision", "not trained", "fine-tuned", "distilled")
    full, rounded, tuned, distilled = figures(capsys.readouterr().out, *(rf"{n} +(\d+\.\d+) ±" for n in names))
    assert full < distilled < rounded < tuned


ON_POLICY = ("before", "given text", "own text")


def test_on_policy_measures_all_three(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len((EXAMPLES / "on_policy.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "on_policy.py"))["main"](seeds=2, steps=2, teacher_steps=3)
    printed = figures(capsys.readouterr().out, *(rf"{name} +KL (\d+\.\d+) ±" for name in ON_POLICY))
    assert all(0 <= value < 1 for value in printed)


@pytest.mark.trains
def test_on_policy_keeps_its_promises(tmp_path):
    printed, header = output_of_seeds("on_policy.py", 2, tmp_path), header_of("on_policy.py")
    patterns = [rf"{name} +KL (\d+\.\d+) ±" for name in ON_POLICY]
    before, given, own = figures(printed, *patterns)
    assert own < 0.7 * before
    assert own < given
    # Another machine's rounding changes the text that is written, and the training with it.
    assert [before, given, own] == pytest.approx(figures(header, *patterns), rel=0.25)


@pytest.mark.trains
def test_a_pruned_student_is_ahead_of_the_same_sizes_from_scratch(tmp_path, monkeypatch, capsys):
    """With a teacher of 50 steps, whose FFN does little yet: pruning costs nothing there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert len((EXAMPLES / "prune.py").read_text(encoding="utf-8").splitlines()) < 80
    runpy.run_path(str(EXAMPLES / "prune.py"))["main"](seeds=2, teacher_steps=50, steps=10)
    names = ("teacher", "pruned", "pruned, distilled", "from scratch, distilled")
    patterns = [rf"{name} +perplexity \d+\.\d+ ± \d+\.\d+, KL to the teacher (\d+\.\d+)" for name in names]
    teacher, pruned, distilled, scratch = figures(capsys.readouterr().out, *patterns)
    assert teacher == 0
    assert max(pruned, distilled) < scratch / 5
    promised = figures(header_of("prune.py"), *patterns)
    assert promised[2] < promised[1] < promised[3]

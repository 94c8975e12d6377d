"""The pictures of the report as PNG bytes, drawn from the logits and logs of the rows of the table.

A model has one colour in all of them, from a palette for colour-blind readers. matplotlib is imported while drawing,
without pyplot: the user's backend stays.
Shapes: N test rows, C classes; logits are [N, C], labels [N] with -100 = unlabelled.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch

from .fidelity import reliability_bins
from .runs import Row, finite

TEMPERATURES = (1, 2, 3, 5, 10)
DIVERGENCE_LABELS = {
    "kl_to_teacher_nats": "KL(P‖Q), forward",
    "reverse_kl_nats": "KL(Q‖P), reverse",
    "jsd_nats": "Jensen-Shannon",
}
# Okabe and Ito's colours: the teacher is black, baselines are warm, all other students are cool.
_TEACHER = "#000000"
_BASELINES = ("#D55E00", "#E69F00", "#A6761D")
_STUDENTS = ("#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#7570B3")
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
_DPI = 150
_SHOWN_CLASSES = 10
_FEW_ROWS = 10


def draw_all(rows: Sequence[Row]) -> dict[str, bytes]:
    """Draws every picture for which there is data: file name -> PNG bytes, in the order of the report.

    Raises:
        ImportError: matplotlib is not installed; the message names the command that installs it.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("The plots need matplotlib: pip install kd_trainer[plots]") from error

    drawn = {}
    with matplotlib.rc_context(_STYLE):
        colors = _colors(rows)
        for draw in (_learning_curves, _reliability, _agreement, _temperature, _divergences):
            figure = draw(rows, colors)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=_DPI)
                drawn[f"{draw.__name__[1:]}.png"] = buffer.getvalue()
    return drawn


def _figure(width: float, height: float) -> Any:
    """A figure outside of pyplot, without global state, drawn by Agg. Sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """One colour per model name, the same in every picture."""
    palettes = {"teacher": cycle([_TEACHER]), "baseline": cycle(_BASELINES), "student": cycle(_STUDENTS)}
    return {row.name: next(palettes[row.role]) for row in rows}


def _wrapped(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width, max_lines=3, placeholder="…")) or name


def _numbers(rows: Sequence[Row], number: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations as bars and error bars; NaN, which draws none, where unknown."""
    return (
        np.array([row.mean(number) for row in rows], dtype=float),
        np.array([row.std(number) for row in rows], dtype=float),
    )


def _patch(color: str, alpha: float = 1.0) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, alpha=alpha)


def _line(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="black", **style)


def _legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """A legend under the panels, where it covers no data."""
    short = [_wrapped(label, 110 // columns) for label in labels]
    figure.legend(handles, short, loc="outside lower center", ncols=columns)


def _values(history: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """{optimizer step: value} of one logged key, where the value is a finite number."""
    logged = [entry for entry in history if "step" in entry and finite(entry.get(key)) is not None]
    return {int(entry["step"]): float(entry[key]) for entry in logged}


def _draw_curve(axes: Any, seeds: list[dict[int, float]], color: str, scale: float, marker: str | None) -> Any:
    """The mean over seeds with a band of one standard deviation; single lines where the seeds' steps differ."""
    steps = sorted(set.intersection(*map(set, seeds)))
    if len(steps) < max(map(len, seeds)) / 2:
        for seed in seeds:
            values = scale * np.array(list(seed.values()))
            (line,) = axes.plot(list(seed), values, color=color, lw=1, marker=marker, ms=3)
        return line
    values = scale * np.array([[seed[step] for step in steps] for seed in seeds])
    mean = values.mean(0)
    if len(seeds) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    (line,) = axes.plot(steps, mean, color=color, lw=1.6, marker=marker, ms=3.5)
    return line


def _learning_curves(rows: Sequence[Row], colors: dict[str, str]) -> Any:
    """Training loss and evaluation accuracy over the optimizer steps."""
    panels = []
    for key, label, scale, marker in (("loss", "training loss", 1, None), ("eval_accuracy", "accuracy (%)", 100, "o")):
        logged = {row.name: [_values(run.log_history, key) for run in row.runs] for row in rows}
        curves = {name: [*filter(None, seeds)] for name, seeds in logged.items() if any(seeds)}
        if curves:
            panels.append((label, scale, marker, curves))
    if not panels:
        return None
    figure = _figure(4.8 * len(panels) + (1.2 if len(panels) == 1 else 0), 4.2)
    handles: dict[str, Any] = {}
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, scale, marker, curves) in zip(all_axes, panels, strict=True):
        for name, seeds in curves.items():
            handles[name] = _draw_curve(axes, seeds, colors[name], scale, marker)
        losses = label == "training loss"
        axes.set_title("Training loss\n(of each run's own objective)" if losses else "Accuracy on the evaluation data")
        axes.set_ylabel(label)
        lengths = [max(map(max, seeds)) for seeds in curves.values()]
        # A short run beside one of many times its length would be squeezed into the left edge.
        long = max(lengths) > 4 * min(lengths)
        axes.set_xlabel("optimizer step (log scale)" if long else "optimizer step")
        if long:
            axes.set_xscale("log")
        axes.grid(True)
    _legend_below(figure, list(handles.values()), list(handles), min(3, len(handles)))
    return figure


def _pooled(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """The test rows of all seeds behind one another: logits and labels."""
    logits, labels = zip(*(run.predictions for run in row.runs if run.predictions), strict=True)
    return torch.cat(logits), torch.cat(labels)


def _reliability(rows: Sequence[Row], colors: dict[str, str], bins: int = 15) -> Any:
    """Accuracy by confidence, one panel per model."""
    shown = [row for row in rows if any(run.predictions and (run.predictions.labels >= 0).any() for run in row.runs)]
    if not shown:
        return None
    columns = min(len(shown), 3) if len(shown) != 4 else 4
    lines = math.ceil(len(shown) / columns)
    figure = _figure(max(2.7 * columns, 5.6), 3.0 * lines + 0.7)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, model in zip(panels, shown, strict=False):
        _draw_bins(axes, *_pooled(model), bins, colors[model.name])
        axes.set_title(f"{_wrapped(model.name, 24)}\nECE {model.mean('ece'):.3f}")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for index, axes in enumerate(panels):
        axes.set_visible(index < len(shown))
        # Shared axes label the last line of panels only, which may be shorter than the others.
        axes.tick_params(labelbottom=index + columns >= len(shown))
        axes.set_xlabel("confidence (largest probability)" if index + columns >= len(shown) else "")
        axes.set_ylabel("accuracy" if index % columns == 0 else "")
    figure.suptitle("Reliability on the test data: accuracy by confidence", fontsize=11)
    handles = [_patch("#888888", 0.7), _patch("#888888", 0.25), _line(lw=1.3), _line(ls="--", lw=1)]
    labels = ["accuracy in the bin", f"same, fewer than {_FEW_ROWS} rows", "share of the rows", "perfectly calibrated"]
    _legend_below(figure, handles, labels, 2)
    return figure


def _draw_bins(axes: Any, logits: torch.Tensor, labels: torch.Tensor, bins: int, color: str) -> None:
    found = reliability_bins(logits, labels, bins)
    edges = np.linspace(0, 1, bins + 1)
    counts = (found.fraction * (labels >= 0).sum()).round()
    bars = axes.bar((edges[1:] + edges[:-1]) / 2, found.accuracy.nan_to_num(0).numpy(), 0.92 / bins, color=color)
    for bar, count in zip(bars, counts.tolist(), strict=True):
        bar.set_alpha(0.5 if count >= _FEW_ROWS else 0.15)
    axes.stairs(found.fraction.numpy(), edges, color="black", lw=1.3)
    axes.plot([0, 1], [0, 1], color="black", ls=(0, (4, 3)), lw=1)


def _agreement(rows: Sequence[Row], colors: dict[str, str]) -> Any:
    """Agreement with the teacher: over all rows, and by class of the label."""
    shown = [row for row in rows if row.role != "teacher" and row.mean("agreement_percent") is not None]
    if not shown:
        return None
    figure = _figure(10.5, 1.9 + 0.62 * len(shown))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    places = np.arange(len(shown))
    mean, whiskers = _numbers(shown, "agreement_percent")
    left.barh(places, mean, 0.6, xerr=whiskers, color=[colors[m.name] for m in shown], alpha=0.75, capsize=3)
    for place, value in zip(places, mean, strict=True):
        left.annotate(f"{value:.1f}%", (1.02, place), xycoords=("axes fraction", "data"), va="center")
    accuracies, _ = _numbers(shown, "test_accuracy_percent")
    known = np.isfinite(accuracies)
    left.scatter(accuracies[known], places[known] - 0.18, marker="D", s=34, color="white", edgecolors="black", zorder=3)
    teacher = next((row.mean("test_accuracy_percent") for row in rows if row.role == "teacher"), None)
    entries = [(_patch("#888888"), "agreement with the teacher")]
    if known.any():
        entries.append((_line(marker="D", ls="", markerfacecolor="white"), "test accuracy"))
    if teacher is not None:
        left.axvline(teacher, color=_TEACHER, ls="--", lw=1, zorder=0)
        entries.append((_line(ls="--", lw=1), "teacher's test accuracy"))
    left.set_yticks(places, [_wrapped(model.name, 20) for model in shown])
    left.set_ylim(len(shown) - 0.5, -0.5)  # as the map beside it
    left.set(xlim=(0, 100), xlabel="test rows (%)", title="Same class as the teacher")
    handles, labels = zip(*entries, strict=True)
    _legend_below(figure, handles, labels, len(entries))
    _agreement_by_class(figure, right, shown)
    return figure


def _agreement_by_class(figure: Any, axes: Any, shown: Sequence[Row]) -> None:
    """A map of the agreement per class of the label (of the teacher's class where no row is labelled)."""
    tables, by_label = [], True
    for model in shown:
        pairs = [
            (*run.predictions, teacher.predictions.logits)
            for run, teacher in zip(model.runs, model.teachers, strict=True)
            if run.predictions and teacher and teacher.predictions
        ]
        student, labels, teacher_logits = map(torch.cat, zip(*pairs, strict=True))
        if not (labels >= 0).any():
            by_label, labels = False, teacher_logits.argmax(-1)
        same = (student.argmax(-1) == teacher_logits.argmax(-1)).double()
        counted = labels >= 0
        total = torch.bincount(labels[counted], minlength=student.shape[-1])
        table = torch.bincount(labels[counted], weights=same[counted], minlength=student.shape[-1]) / total
        tables.append(100 * table.numpy())
    values = np.array(tables)
    width = values.shape[1]
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=min(50.0, float(np.nanmin(values))), vmax=100)
    figure.colorbar(image, ax=axes, label="agreement (%)", pad=0.02)
    axes.set_yticks([])
    if width <= 12:
        axes.set_xticks(range(width))
        middle = (image.norm.vmin + 100) / 2
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                shade = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade)
    axes.set(xlabel="class of the label" if by_label else "class of the teacher", title="The same, class by class")


def _temperature(rows: Sequence[Row], colors: dict[str, str]) -> Any:
    """The teacher's soft targets at several temperatures: on average, and on one row."""
    from matplotlib import colormaps

    teachers = [row for row in rows if row.role == "teacher" and any(run.predictions for run in row.runs)]
    if not teachers:
        return None
    logits = _pooled(teachers[0])[0].double()
    ranks = min(logits.shape[-1], _SHOWN_CLASSES)
    figure = _figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    log_probs = logits.log_softmax(-1)
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    # Most rows of a good teacher are certain: one at the 90th percentile of the entropy has something to show.
    row = logits[entropy.argsort()[int(0.9 * (len(entropy) - 1))]]
    order = row.argsort(descending=True)[:ranks]
    # From dark (T = 1) to light: an order that stays one in grey.
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(TEMPERATURES)))
    handles = []
    for temperature, shade in zip(TEMPERATURES, shades, strict=True):
        mean = (logits / temperature).softmax(-1).sort(-1, descending=True).values.mean(0)[:ranks]
        (line,) = left.plot(range(1, ranks + 1), mean.numpy(), "o-", color=shade, lw=1.6, ms=4)
        right.plot(range(ranks), (row / temperature).softmax(-1)[order].numpy(), "o-", color=shade, lw=1.6, ms=4)
        handles.append(line)
    left.set(title="Teacher's soft targets, mean over the test rows", xlabel="rank of the class", ylabel="probability")
    left.set_xticks(range(1, ranks + 1))
    right.set(title="One unsure test row (90th percentile of the entropy)", xlabel="class, most likely first")
    right.set_xticks(range(ranks), [str(int(index)) for index in order])
    for axes in (left, right):
        axes.set_ylim(0, 1.03)
        axes.grid(True)
    _legend_below(figure, handles, [f"T = {temperature}" for temperature in TEMPERATURES], len(TEMPERATURES))
    return figure


def _divergences(rows: Sequence[Row], colors: dict[str, str]) -> Any:
    """The three divergences between teacher P and student Q, side by side."""
    shown = [row for row in rows if row.role != "teacher" and row.mean("kl_to_teacher_nats") is not None]
    if not shown:
        return None
    figure = _figure(max(6.4, 2.1 * len(shown) + 1.5), 4.4)
    axes = figure.subplots()
    colors = dict(zip(DIVERGENCE_LABELS, ("#0072B2", "#E69F00", "#009E73"), strict=True))
    positive = []
    for index, (key, color) in enumerate(colors.items()):
        mean, spread = _numbers(shown, key)
        places = np.arange(len(shown)) + (index - 1) * 0.27
        known = np.isfinite(mean)
        axes.bar(places[known], mean[known], 0.25, yerr=spread[known], color=color, capsize=2, error_kw={"lw": 1})
        positive += mean[known & (mean > 0)].tolist()
        for place, value, whisker in zip(places, mean, np.nan_to_num(spread), strict=True):
            if math.isfinite(value):
                above = (place, value + whisker)
                axes.annotate(f"{value:.3g}", above, (0, 3), textcoords="offset points", ha="center", fontsize=8)
            else:
                axes.annotate("inf", (place, 0.95), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    # One far-off student would flatten the bars of the others.
    logarithmic = bool(positive) and max(positive) > 30 * min(positive)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 3, max(positive) * 3)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(shown)), [_wrapped(model.name, 20) for model in shown])
    axes.set_ylabel("nats per test row, T = 1" + (" (log scale)" if logarithmic else ""))
    axes.set_title("How far each student Q is from the teacher P, by direction")
    _legend_below(figure, [*map(_patch, colors.values())], list(DIVERGENCE_LABELS.values()), 3)
    return figure

"""The difference of a student from its baseline over the seeds: paired, with its 95% interval by Student's t.

The i-th runs of both are one pair: the same start, order of rows and seed. For: `comparison.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from .runs import Row, finite

# Numbers of an evaluation that say nothing of a model.
NO_METRICS = ("_runtime", "_per_second", "_preparation_time")
# A better model has more of these, whatever the task; of others a script's own direction is not known.
_HIGHER = ("accuracy", "f1", "agreement", "overlap", "precision", "recall", "bleu", "cosine", "spearman", "exact_match")
_LOWER = ("loss", "perplexity", "nll", "ece", "mse", "mae", "wer", "cer", "kl_to_teacher")


class Metric(NamedTuple):
    """A metric of the evaluation, by its name without the prefix "eval_".

    Args:
        higher_is_better: None where it is not known.
    """

    name: str
    higher_is_better: bool | None

    @classmethod
    def of(cls, name: str) -> Metric:
        """The direction that its name has everywhere."""
        up, down = name.endswith(_HIGHER) or name.startswith("rouge"), name.endswith(_LOWER)
        return cls(name, True if up and not down else False if down else None)


class Difference(NamedTuple):
    """A metric of a student minus that of its baseline, over the pairs.

    Args:
        scale: from the numbers of the evaluation to those shown: 100 where shares are shown as percent.
        teacher: of its evaluation, where it is known.
        baselines, students: one number for each pair.
        differences: student minus baseline; `mean` of them, and `interval`: its 95% interval, None below two pairs.
    """

    student: str
    baseline: str
    metric: Metric
    scale: float
    teacher: float | None
    baselines: list[float]
    students: list[float]
    differences: list[float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def gain(self) -> float:
        """The mean, positive where the student is better."""
        return -self.mean if self.metric.higher_is_better is False else self.mean

    @property
    def share(self) -> float | None:
        """Of the teacher's lead over the baseline that the student makes up; None without a teacher that leads."""
        if self.teacher is None or self.metric.higher_is_better is None:
            return None
        lead = self.teacher - statistics.fmean(self.baselines)
        lead = lead if self.metric.higher_is_better else -lead
        return self.gain / lead if lead > 0 else None

    @property
    def same(self) -> bool:
        """Whether all seeds have the same numbers, of which an interval says nothing."""
        return len(set(self.baselines)) == len(set(self.students)) == 1

    @property
    def helps(self) -> bool | None:
        """Whether the whole interval is on one side of 0, and on which; None where it is not."""
        if self.interval is None or self.metric.higher_is_better is None or self.same:
            return None
        low, high = self.interval
        if low <= 0 <= high:
            return None
        return self.gain > 0

    def shown(self, value: float, sign: str = "") -> str:
        """A number of this metric as it is printed, percent or points where they are shares."""
        return (
            f"{self.scale * value:{sign}.1f}" if self.scale == 100 else f"{value:{sign}.3g}" if sign else f"{value:.4g}"
        )

    def shown_interval(self) -> str:
        """The 95% interval as it is printed."""
        if self.interval is None:
            return "–"
        return f"{self.shown(self.interval[0], '+')} to {self.shown(self.interval[1], '+')}"

    def json(self) -> dict[str, Any]:
        """The numbers as the evaluation has them, unscaled."""
        return {
            "student": self.student,
            "baseline": self.baseline,
            "metric": self.metric.name,
            "higher_is_better": self.metric.higher_is_better,
            "teacher": self.teacher,
            "baselines": self.baselines,
            "students": self.students,
            "differences": self.differences,
            "mean": self.mean,
            "interval_95": None if self.interval is None else list(self.interval),
            "share_of_teachers_lead": self.share,
        }


def paired_differences(rows: Sequence[Row]) -> list[Difference]:
    """One for each metric that every run of a student and of its baseline has; none where they are no pairs."""
    teacher = next((row for row in rows if row.role == "teacher"), None)
    found = []
    for row in rows:
        baseline = row.baseline
        if row.role != "student" or baseline is None or len(row.runs) != len(baseline.runs):
            continue
        both = [run.results for run in (*row.runs, *baseline.runs)]
        names = [name for name in both[0] if name.startswith("eval_") and not name.endswith(NO_METRICS)]
        for name in (name for name in names if all(_number(results.get(name)) is not None for results in both)):
            students, baselines = ([float(run.results[name]) for run in each.runs] for each in (row, baseline))
            led = [_number(run.results.get(name)) for run in (teacher.runs if teacher else [])]
            known = [value for value in led if value is not None]
            led_by = statistics.fmean(known) if known and len(known) == len(led) else None
            metric = Metric.of(name.removeprefix("eval_"))
            shares = metric.name.endswith(("accuracy", "agreement", "overlap"))
            differences = [a - b for a, b in zip(students, baselines, strict=True)]
            mean, interval = mean_interval(differences)
            scale = 100.0 if shares and all(0 <= value <= 1 for value in (*students, *baselines)) else 1.0
            found.append(
                Difference(
                    row.name, baseline.name, metric, scale, led_by, baselines, students, differences, mean, interval
                )
            )
    return found


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) else finite(value)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean and its 95% interval: mean ± t * s / sqrt(n), t of n - 1 degrees of freedom; None below two values.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])[0]
        2.0
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level, for a whole number of degrees of freedom.

    Example:
        >>> round(t_quantile(2), 4)
        4.3027
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    for _ in range(200):  # far below the rounding of a float
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t): the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = total = 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * math.cos(angle) * total if degrees > 1 else 0.0))


def sentence(difference: Difference) -> str:
    """Whether distillation helps, in plain words, with the numbers that say so."""
    name, count = difference.metric.name.replace("_", " "), len(difference.differences)
    seeds = f"{count} seed{'s' * (count > 1)}"
    unit = " points" if difference.scale == 100 else ""
    numbers = f"{name} {difference.shown(difference.mean, '+')}{unit}"
    if difference.metric.higher_is_better is False:
        numbers += ", where lower is better"
    if difference.interval is not None:
        numbers += f" (95% interval {difference.shown_interval()})"
    if difference.metric.higher_is_better is None:
        return f"Whether a higher {name} is better is not known (set greater_is_better): {numbers}."
    if difference.helps is None:
        if difference.interval is not None and not any(difference.differences):
            return f"Distillation makes no difference here: {numbers}, over {seeds}."
        more = "more seeds narrow the interval (kd_compare_seeds)"
        if count == 1:
            more = "one seed has no interval (kd_compare_seeds)"
        elif difference.same:
            more = "all have the same numbers (shuffle the rows, or give the trainer a model_init)"
        return f"Whether distillation helps cannot be told from {seeds}: {numbers}; {more}."
    if not difference.helps:
        return f"Distillation does not help here: {numbers}, over {seeds}."
    share = difference.share
    led = "" if share is None else f" That is {100 * share:.0f}% of the teacher's lead."
    return f"Distillation helps: {numbers}, over {seeds}.{led}"

"""Divergences between two categorical distributions given as logits: nats per position.

For: every loss that compares a student with a teacher, by name through the dict `DIVERGENCES`. Leaves formulas to
`formulas.py`, the temperature squared, masks, means (`reductions.py`) and settings
(`modules.py`) to others.
Letters: V classes or vocabulary; z_s, z_t student and teacher logits [..., V]; T temperature;
p = softmax(z_t/T) the teacher's, q = softmax(z_s/T) the student's probabilities.

Sums are float32 or wider whatever the logits' dtype. A new divergence is one formula and one entry of `DIVERGENCES`:
all others read the entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validation import check_choice, check_number, check_temperature, fail
from .checks import check_class_ids, check_logits
from .formulas import (
    dkd_terms,
    entropy_switch_terms,
    jsd_terms,
    kl_terms,
    kl_to_mixture_terms,
    per_position,
    skew_reverse_kl_terms,
    squared_error_terms,
    total_variation_terms,
    wide,
)


@dataclass(frozen=True)
class Divergence:
    """A divergence: its formula and its properties. An entry of `DIVERGENCES`, called as `forward_kl` is.

    Args:
        terms: the formula, (log_p, log_q) -> contributions [..., V] whose sum over V is D(p, q) in nats; log_p and
            log_q are log-probabilities [..., V] of teacher and student, in float32 or wider. It is differentiated with
            respect to log_q. Given `beta=` where there is a default, and with `needs_labels` `labels=` [...] int64
            class ids in range.
        parameter: what `beta` is in the formula, in words; None: it has no parameter.
        default: of the parameter.
        range: the parameter lies strictly between these; an end that is None is open.
        needs_labels: whether the formula reads the label of a position. A position without one has the forward KL.
        of_logits: the formula takes logits (z_t, z_s) in place of log-probabilities, and has no temperature.
        sparse: whether it is defined over the k + 1 buckets of a teacher given as top-k.
        limit: number of classes -> the parameter from which on it decides nothing; None: there is no such limit.
        once: the formula takes `once=True`, see `jsd_terms`: a cheaper gradient for the tiles.

    Example:
        >>> half_squared = Divergence(lambda log_p, log_q: (log_p.exp() - log_q.exp()).square() / 2)
        >>> half_squared(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])).item()
        1.0
    """

    terms: Callable[..., Tensor]
    parameter: str | None = None
    default: float | None = None
    range: tuple[float | None, float | None] = (None, None)
    needs_labels: bool = False
    of_logits: bool = False
    sparse: bool = True
    limit: Callable[[int], float] | None = None
    once: bool = False

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 1.0,
        beta: float | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """D(p, q) of logits [..., V]: nats [...]. `labels` [...]: class ids, for a divergence that needs them."""
        terms = self._terms_of(student_logits, teacher_logits, temperature, beta, labels)
        return per_position(terms, student_logits, teacher_logits, labels)

    def temperature(self, temperature: float) -> float:
        """The temperature that divides the logits, and whose square multiplies the loss: 1 for one of logits."""
        return 1.0 if self.of_logits else temperature

    def arguments(self, logits: Tensor) -> Tensor:
        """What the formula takes of logits over T [..., V]: log-probabilities, or the logits themselves."""
        return logits if self.of_logits else torch.log_softmax(logits, -1)

    def evaluate(
        self, teacher: Tensor, student: Tensor, beta: float, labels: Tensor | None = None, *, once: bool = False
    ) -> Tensor:
        """The formula alone: contributions [..., V] from `arguments`, in their dtype.

        `beta` as `check` returns it; `labels` [...]: what is no class in range counts as no label, None as none at all.
        `once`: their sum is differentiated once, with respect to the student alone.
        """
        given: dict[str, Any] = {} if self.parameter is None else {"beta": beta}
        given |= {"once": True} if once and self.once else {}
        if not self.needs_labels:
            return self.terms(teacher, student, **given)
        log_p, log_q = teacher, student
        if labels is None:
            return kl_terms(log_p, log_q)
        labels = labels.long()
        labelled = (labels >= 0) & (labels < log_q.shape[-1])
        terms = self.terms(log_p, log_q, labels=torch.where(labelled, labels, 0), **given)
        if labels.device.type == "cpu" and bool(labelled.all()):
            return terms
        return torch.where(labelled.unsqueeze(-1), terms, kl_terms(log_p, log_q))

    def check(self, beta: float | None, argument: str = "beta", classes: int | None = None) -> float:
        """Returns the beta to use (0 where there is none); raises unless it lies in the range.

        Args:
            classes: of the logits; None: unknown, and `limit` is not looked at.
        """
        if self.parameter is None:
            if beta is not None:
                having = ", ".join(f"'{name}'" for name, entry in DIVERGENCES.items() if entry.parameter is not None)
                own = next((f" '{name}'" for name, entry in DIVERGENCES.items() if entry is self), "")
                fix = f"Leave `{argument}` out, or choose one of {having}."
                fail(argument, repr(beta), f"None with divergence{own}", fix, because="this divergence has no beta")
            return 0.0
        low, high = self.range
        if beta is not None:
            check_number(argument, beta, low=low, high=high, open_low=low is not None, open_high=high is not None)
        used = self.default if beta is None else beta
        assert used is not None
        if classes is not None and self.limit is not None and used >= self.limit(classes):
            shown = f"{used:g} (the default)" if beta is None else used
            expected = f"below {self.limit(classes):.4g}, the limit for {classes} classes"
            because = "no teacher output would be on its other side"
            fail(argument, shown, expected, f"Lower `{argument}`, or choose another divergence.", because=because)
        return used

    def _terms_of(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float,
        beta: float | None,
        labels: Tensor | None,
    ) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """Checks; returns the terms [..., V] as a function of z_s, z_t and labels."""
        beta = self.check(beta)
        check_temperature("temperature", temperature)
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        if self.needs_labels:
            check_class_ids(labels, student_logits.shape[:-1])
        dtype, t = wide(student_logits, teacher_logits), self.temperature(temperature)

        def terms(z_s: Tensor, z_t: Tensor, labels: Tensor | None) -> Tensor:
            teacher, student = (self.arguments(z.to(dtype) if t == 1 else z.to(dtype) / t) for z in (z_t, z_s))
            return self.evaluate(teacher, student, beta, labels)

        return terms


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(kl_terms),
    "reverse_kl": Divergence(lambda log_p, log_q: kl_terms(log_q, log_p)),
    "symmetric_kl": Divergence(lambda log_p, log_q: kl_terms(log_p, log_q) + kl_terms(log_q, log_p)),
    "jsd": Divergence(jsd_terms, "weight of the teacher in the mixture", default=0.5, range=(0, 1), once=True),
    "skew_forward_kl": Divergence(
        kl_to_mixture_terms, "share of the teacher in the mixture", default=0.1, range=(0, 1)
    ),
    "skew_reverse_kl": Divergence(
        skew_reverse_kl_terms, "share of the student in the mixture", default=0.1, range=(0, 1)
    ),
    "total_variation": Divergence(total_variation_terms),
    "dkd": Divergence(dkd_terms, "weight of NCKD", default=8.0, range=(0, None), needs_labels=True, sparse=False),
    "logit_mse": Divergence(squared_error_terms, of_logits=True, sparse=False),
    "entropy_switch": Divergence(
        entropy_switch_terms,
        "teacher entropy in nats, above which the forward KL is taken",
        default=1.0,
        range=(0, None),
        sparse=False,
        limit=math.log,
    ),
}


def check_divergence(divergence: str, beta: float | None) -> float:
    """Returns the beta to use (0 where there is none); raises ValueError for an unknown name or a bad beta."""
    check_choice("divergence", divergence, DIVERGENCES)
    return DIVERGENCES[divergence].check(beta)


def divergence_terms(
    divergence: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Elementwise contributions of a divergence: D(p, q) = sum over V of the result.

    When to use: where torch's reduction 'none' is wanted, or second derivatives (the plain formula, which
    `DIVERGENCES[divergence]` uses for small inputs and for gradients of the teacher).

    Args:
        divergence: a key of `DIVERGENCES`.
        student_logits: z_s [..., V], any floating dtype.
        teacher_logits: z_t [..., V], the same shape.
        temperature: T > 0, divides both logits.
        beta: the parameter of the divergence, if it has one; None is its default.
        labels: [...] class ids, for a divergence that needs them; -100: none.

    Returns:
        Nats [..., V] in float32 or wider. Single contributions of a KL may be negative; their sum is not.

    Raises:
        ValueError: unknown divergence, beta or temperature out of range, shapes that differ.
        TypeError: logits that are no floating tensors.

    Example:
        >>> terms = divergence_terms("total_variation", torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf]))
        >>> terms.tolist()
        [0.25, 0.25]
    """
    check_divergence(divergence, beta)
    terms = DIVERGENCES[divergence]._terms_of(student_logits, teacher_logits, temperature, beta, labels)
    return terms(student_logits, teacher_logits, labels)


# ---- the public functions -------------------------------------------------------------------------------------------


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || q) = sum p (log p - log q): the teacher's distribution p is matched everywhere it has mass.

    When to use: the default for distillation (Hinton et al.); the student covers all the teacher's modes. With action
    logits of an old policy as the teacher it is the policy KL of a trust region (TRPO), see the second example.

    Args:
        student_logits: z_s [..., V], any leading dimensions, any floating dtype.
        teacher_logits: z_t [..., V], the same shape (never broadcast). Gradients flow to it when it requires them.
        temperature: T > 0, divides both logits; the result is not multiplied by T².
        beta: must be None: this divergence has none.

    Returns:
        Nats [...], float32 or wider. 0 where the distributions are equal, +inf where q = 0 at a class with p > 0.

    Raises:
        ValueError: a beta, a temperature <= 0 or not finite, shapes that differ, V = 0.
        TypeError: logits that are no floating tensors.

    Example:
        >>> teacher = torch.tensor([[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]])
        >>> student = torch.tensor([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]])
        >>> round(forward_kl(student, teacher).mean().item(), 6)
        0.006916
        >>> old_policy, policy = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.2]])  # action logits
        >>> bool(forward_kl(policy, old_policy).mean() < 0.01)  # inside a trust region of 0.01 nats
        True

    Source: Kullback and Leibler 1951; Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """
    return DIVERGENCES["forward_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(q || p) = sum q (log q - log p): the student puts no mass where the teacher has none.

    When to use: a student too small for all the teacher's modes, which is to keep to the likely ones; sequence models
    trained on their own samples (MiniLLM); the KL penalty of a policy q towards a reference policy p.

    Args, Returns, Raises: as `forward_kl`; +inf where p = 0 at a class with q > 0.

    Example:
        >>> policy, reference = torch.tensor([[0.0, 1.2]]), torch.tensor([[0.0, 1.0]])  # action logits
        >>> round(reverse_kl(policy, reference).item(), 4)
        0.0037

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    return DIVERGENCES["reverse_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def symmetric_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || q) + KL(q || p), the sum (not the mean) of both directions: Jeffreys' divergence.

    When to use: two models that learn from each other, where neither is the reference.

    Args, Returns, Raises: as `forward_kl`; +inf where either direction is.

    Example:
        >>> a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> bool(torch.isclose(symmetric_kl(a, b), forward_kl(a, b) + reverse_kl(a, b)))
        True

    Source: Jeffreys 1946; Zhang et al. 2018 (deep mutual learning), arXiv:1706.00384.
    """
    return DIVERGENCES["symmetric_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q: the Jensen-Shannon divergence.

    When to use: a bounded loss, finite also where the supports differ; beta moves it between the two KLs' behaviour.
    It vanishes as beta goes to 0 or 1: for a KL take `forward_kl` or `reverse_kl` by name.

    Args: as `forward_kl`; beta: strictly between 0 and 1, default 0.5.
    Returns: nats [...], at most log 2 (at beta 0.5). Raises: as `forward_kl`.

    Example:
        >>> apart = jsd(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]))
        >>> round(apart.item(), 4)  # log 2
        0.6931

    Source: Lin 1991; Agarwal et al. 2023 (GKD), arXiv:2306.13649.
    """
    return DIVERGENCES["jsd"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || beta p + (1 - beta) q): the forward KL to a mixture that holds a little of the teacher.

    When to use: in place of `forward_kl` where students far from the teacher give large, noisy gradients.

    Args: as `forward_kl`; beta: the lambda of the paper, strictly between 0 and 1, default 0.1.
    Returns: nats [...], at most -log(beta), so never inf. Raises: as `forward_kl`.

    Example:
        >>> apart = skew_forward_kl(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]), beta=0.1)
        >>> round(apart.item(), 4)  # -log 0.1
        2.3026

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    return DIVERGENCES["skew_forward_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(q || beta q + (1 - beta) p): the mirror of `skew_forward_kl`.

    When to use: in place of `reverse_kl`; DistiLLM's choice for sequences sampled from the student.

    Args: as `forward_kl`; beta: the lambda of the paper, strictly between 0 and 1, default 0.1.
    Returns: nats [...], at most -log(beta), so never inf. Raises: as `forward_kl`.

    Example:
        >>> a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> bool(skew_reverse_kl(a, b) == skew_forward_kl(b, a))
        True

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    return DIVERGENCES["skew_reverse_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """0.5 sum |p - q|: the largest difference in probability that any set of classes can show.

    When to use: as a bounded, robust loss, and as a figure one can explain (1 - TV is the acceptance rate of
    speculative decoding with the student as the draft).

    Args, Raises: as `forward_kl`. Returns: [...] in [0, 1]. (No logarithm in it, so no nats.)

    Example:
        >>> total_variation(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])).item()
        0.5

    Source: Wen et al. 2023 (f-distill), arXiv:2307.15190.
    """
    return DIVERGENCES["total_variation"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    beta: float | None = None,
) -> Tensor:
    """TCKD + beta NCKD: the KL of label or not, and beta times the KL among the other classes, renormalised.

    When to use: classification with a confident teacher, whose knowledge of the other classes the forward KL weighs by
    1 - p of the label alone: KL(p || q) is the case beta = 1 - p. With two classes NCKD is 0.

    Args: as `forward_kl`; labels: [...] class ids, -100 where there is none: there the forward KL is taken; beta: > 0,
        default 8.
    Returns: nats [...], +inf as `forward_kl`. Raises: as `forward_kl`; TypeError without labels.

    Example:
        >>> student, teacher = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
        >>> label, p = torch.tensor(0), torch.softmax(teacher, -1)
        >>> plain = dkd(student, teacher, labels=label, beta=1 - p[0].item())
        >>> bool(torch.isclose(plain, forward_kl(student, teacher)))
        True

    Source: Zhao et al. 2022, arXiv:2203.08679.
    """
    entry = DIVERGENCES["dkd"]
    return entry(student_logits, teacher_logits, temperature=temperature, beta=beta, labels=labels)


def logit_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """mean over V of (z_s - z_t)²: the logits themselves, without temperature.

    When to use: classifiers of few classes whose student is to copy the logits, offset included.

    Args, Raises: as `forward_kl`; temperature: has no effect, and no T² is multiplied on. Returns: [...] squared
        logits; classes that both exclude do not count, one that one of them excludes gives +inf.

    Example:
        >>> logit_mse(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])).item()
        2.0

    Source: Ba and Caruana 2014, arXiv:1312.6184; Kim et al. 2021, arXiv:2105.08919.
    """
    return DIVERGENCES["logit_mse"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def entropy_switch(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || q) where the entropy of p is above beta nats, KL(q || p) elsewhere.

    When to use: sequence models: the student covers the teacher where that is uncertain, and keeps to its likely tokens
    where it is not.

    Args: as `forward_kl`; beta: the threshold of the entropy at T in nats, > 0, default 1 (not from the source).
    Returns: nats [...], +inf as the KL that is taken. Raises: as `forward_kl`.

    Example:
        >>> student, sure, unsure = torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
        >>> bool(entropy_switch(student, sure, beta=0.5) == reverse_kl(student, sure))
        True
        >>> bool(entropy_switch(student, unsure, beta=0.5) == forward_kl(student, unsure))
        True

    Source: Jin et al. 2026 (EOPD), arXiv:2603.07079, where the forward KL is added instead.
    """
    return DIVERGENCES["entropy_switch"](student_logits, teacher_logits, temperature=temperature, beta=beta)

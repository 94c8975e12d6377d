"""The definitions of the divergences once more, in plain Python over lists of probabilities, for the tests."""

from __future__ import annotations

import math

from kd_trainer.losses.divergences import DIVERGENCES

INF = math.inf


def kl(a, b):
    return math.fsum(x * (math.log(x) - math.log(y)) if y > 0 else INF for x, y in zip(a, b, strict=True) if x > 0)


def mix(weight, a, b):
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def entropy(a):
    return -math.fsum(x * math.log(x) for x in a if x > 0)


# Divergences of two distributions alone, without labels or logits; those over the buckets of a top-k.
OF_PROBS = [name for name, entry in DIVERGENCES.items() if not entry.needs_labels and not entry.of_logits]
OVER_BUCKETS = [name for name, entry in DIVERGENCES.items() if entry.sparse]

# p the teacher's probabilities, q the student's, b the beta.
WRITTEN_OUT = {
    "forward_kl": lambda p, q, b: kl(p, q),
    "reverse_kl": lambda p, q, b: kl(q, p),
    "symmetric_kl": lambda p, q, b: kl(p, q) + kl(q, p),
    "jsd": lambda p, q, b: b * kl(p, mix(b, p, q)) + (1 - b) * kl(q, mix(b, p, q)),
    "skew_forward_kl": lambda p, q, b: kl(p, mix(b, p, q)),
    "skew_reverse_kl": lambda p, q, b: kl(q, mix(b, q, p)),
    "total_variation": lambda p, q, b: 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)),
    "entropy_switch": lambda p, q, b: kl(p, q) if entropy(p) > b else kl(q, p),
}

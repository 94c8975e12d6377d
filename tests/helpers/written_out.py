"""The definitions of the divergences once more, in plain Python over lists of probabilities, for the tests."""

from __future__ import annotations

import math

INF = math.inf


def kl(a, b):
    return math.fsum(x * (math.log(x) - math.log(y)) if y > 0 else INF for x, y in zip(a, b, strict=True) if x > 0)


def mix(weight, a, b):
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


# p the teacher's probabilities, q the student's, b the beta.
WRITTEN_OUT = {
    "forward_kl": lambda p, q, b: kl(p, q),
    "reverse_kl": lambda p, q, b: kl(q, p),
    "symmetric_kl": lambda p, q, b: kl(p, q) + kl(q, p),
    "jsd": lambda p, q, b: b * kl(p, mix(b, p, q)) + (1 - b) * kl(q, mix(b, p, q)),
    "skew_forward_kl": lambda p, q, b: kl(p, mix(b, p, q)),
    "skew_reverse_kl": lambda p, q, b: kl(q, mix(b, q, p)),
    "total_variation": lambda p, q, b: 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)),
}

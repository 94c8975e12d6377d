"""Distillation without a trainer: each line of the loss beside its equation in Hinton et al. 2015 (arXiv 1503.02531).

    python examples/by_hand.py                   # about 6 seconds on one CPU core

Expected: loss 5.0271 at the first of 100 steps, 0.0611 at the last; at T = 1000 the gradient is eq. (2) to rounding and
eq. (4) to 0.3%. `DistillationTrainer` logs the same losses step by step (test_examples.py compares to 1e-6).
"""

import torch

from kd_trainer import MLPConfig, MLPForImageClassification, synthetic_classification


def log_soft_targets(logits, temperature):
    """Eq. (1): q_i = exp(z_i / T) / sum_j exp(z_j / T), as a logarithm (softmax, then log, would round twice)."""
    return torch.log_softmax(logits / temperature, dim=-1)


def soft_loss(student_logits, teacher_logits, temperature):
    """The first objective: C = -sum_i p_i log q_i, the cross-entropy with the soft targets, both at temperature T.

    Less the teacher's entropy -sum_i p_i log p_i, which has no gradient in z: the best possible loss is then 0.
    The gradient is eq. (2), dC/dz_i = (q_i - p_i) / T; at high T it nears eq. (4), (z_i - v_i) / (N T^2).
    """
    log_q, log_p = log_soft_targets(student_logits, temperature), log_soft_targets(teacher_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def train_by_hand(student, teacher, batches, alpha, temperature, learning_rate):
    """Trains `student` by SGD on {"features", "labels"} batches; returns the loss of each step."""
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=learning_rate), []
    for batch in batches:
        z = student(batch["features"]).logits
        with torch.no_grad():
            v = teacher(batch["features"]).logits
        soft = temperature**2 * soft_loss(z, v, temperature)  # gradients scale as 1 / T^2: "multiply them by T^2"
        hard = -log_soft_targets(z, 1.0).gather(-1, batch["labels"][:, None]).mean()  # second objective: labels, T = 1
        loss = alpha * soft + (1 - alpha) * hard  # "a weighted average of two different objective functions"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(42)
    teacher, student = (MLPForImageClassification(MLPConfig(hidden_sizes=sizes)) for sizes in ([256, 256, 256], [64]))
    rows = synthetic_classification(num_train=3200)["train"]
    batches, T = [rows[i : i + 32] for i in range(0, len(rows), 32)], 1000.0
    train_by_hand(teacher, student, batches, alpha=0.0, temperature=1.0, learning_rate=0.1)  # from the labels alone
    losses = train_by_hand(student, teacher, batches, alpha=0.7, temperature=3.0, learning_rate=0.1)
    print(f"loss {losses[0]:.4f} at the first of {len(losses)} steps, {losses[-1]:.4f} at the last")
    z, v = (model(batches[0]["features"]).logits.detach().double() for model in (student, teacher))
    gradient = torch.func.grad(lambda z: 32 * soft_loss(z, v, T))(z)  # 32 rows in the mean; eq. (2) is of one
    eq_2 = (log_soft_targets(z, T).exp() - log_soft_targets(v, T).exp()) / T
    eq_4 = ((z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))) / (10 * T**2)  # N = 10 zero-meaned logits
    off_2, off_4 = ((gradient - eq).norm() / gradient.norm() for eq in (eq_2, eq_4))
    print(f"at T = {T:g} the gradient is off eq. (2) by {off_2:.0e} and off eq. (4) by {off_4:.1%}")

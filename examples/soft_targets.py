"""Distilling from probabilities: 100 rows of soft targets, a linear student, and the best that it can reach.

    python examples/soft_targets.py            # about 6 seconds on one CPU core, half of it imports

Expected (mean KL(target || student) in nats):  start 0.0735   Adam 0.0323   optimum 0.0323
There is no relation between features and targets, so the loss cannot reach 0: the optimum, found by LBFGS in float64,
shows when a training run is done.
"""

import torch
from torch import Tensor, nn

from kd_trainer import KLDivergenceLoss, soft_target_data

EPOCHS, LEARNING_RATE, SEED = 1000, 0.01, 42


def mean_kl(model: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """KL(P || Q) over the rows; the target P comes first, and both sides are probabilities."""
    return KLDivergenceLoss()(targets, model(features).softmax(-1))


def train(model: nn.Module, features: Tensor, targets: Tensor) -> tuple[float, float]:
    """Full-batch Adam; the loss before the first and after the last step."""
    start = mean_kl(model, features, targets).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        mean_kl(model, features, targets).backward()
        optimizer.step()
    return start, mean_kl(model, features, targets).item()


def optimum(features: Tensor, targets: Tensor) -> float:
    """The loss of the best linear model: the problem is convex, so LBFGS finds it from anywhere."""
    features, targets = features.double(), targets.double()
    model = nn.Linear(features.shape[1], targets.shape[1]).to(features)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = KLDivergenceLoss(validate=False)(targets, model(features).softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


if __name__ == "__main__":
    torch.manual_seed(SEED)  # data first, then the model: this order gives the figures above
    rows = soft_target_data(seed=None)[:]
    student = nn.Linear(10, 10)
    start, end = train(student, rows["features"], rows["soft_targets"])
    best = optimum(rows["features"], rows["soft_targets"])
    print(f"start {start:.4f}   Adam {end:.4f}   optimum {best:.4f}")

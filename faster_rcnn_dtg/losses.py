"""Classification losses per element, for targets between 0 and 1."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def softmax_focal(log_probability: Tensor, gamma: float = 1.5) -> Tensor:
    """-(1 - p)^gamma log p of the true class's log-probability (Unbiased Teacher's ``fast_rcnn.py``), same shape."""
    # The clamp keeps the gradient of the power finite at p = 1.
    return -(1 - log_probability.exp()).clamp(min=1e-6) ** gamma * log_probability


def log_odds(log_probability: Tensor) -> Tensor:
    """log p - log(1 - p), the logit whose sigmoid is p; p is taken as at most 1 - 1e-6."""
    return log_probability - (-torch.expm1(log_probability.clamp(max=-1e-6))).log()


def log_score(logits: Tensor) -> Tensor:
    """Log-probability of a logit, the inverse of ``log_odds``."""
    return logsigmoid(logits)

"""The R-CNN's softmax focal loss, and probabilities as logits."""
from __future__ import annotations

import torch
from torch import Tensor


def softmax_focal(log_probability: Tensor, gamma: float = 1.5) -> Tensor:
    """-(1 - p)^gamma log p of the true class's log-probability (Unbiased Teacher's ``fast_rcnn.py``), same shape."""
    # The clamp keeps the gradient of the power finite at p = 1 for every gamma.
    return -(1 - log_probability.exp()).clamp(min=1e-6) ** gamma * log_probability


def log_odds(log_probability: Tensor) -> Tensor:
    """log p - log(1 - p), the logit whose sigmoid is p (``logsigmoid`` inverts it); p is taken as at most 1 - 1e-6."""
    return log_probability - (-torch.expm1(log_probability.clamp(max=-1e-6))).log()

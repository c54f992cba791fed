"""Classification losses per element, for targets between 0 and 1."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss (Lin et al. 2017), same shape as its inputs.

    For a target of 0 or 1 it is torchvision's ``sigmoid_focal_loss``; in between it is smallest where the score equals the
    target, as the quality focal loss of GFL, which torchvision's is not.
    """
    alpha_target = alpha * target + (1 - alpha) * (1 - target)
    cross_entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
    return alpha_target * (target - logits.sigmoid()).abs() ** gamma * cross_entropy


def softmax_focal(log_probability: Tensor, gamma: float = 1.5) -> Tensor:
    """-(1 - p)^gamma log p of the true class' log-probability (Unbiased Teacher's ``fast_rcnn.py``), same shape."""
    # The clamp keeps the gradient of the power finite at p = 1.
    return -(1 - log_probability.exp()).clamp(min=1e-6) ** gamma * log_probability


def log_odds(log_probability: Tensor) -> Tensor:
    """log p - log(1 - p), the logit whose sigmoid is p; p is taken as at most 1 - 1e-6."""
    return log_probability - (-torch.expm1(log_probability.clamp(max=-1e-6))).log()


def log_score(logits: Tensor) -> Tensor:
    """Log-probability of a logit, the inverse of ``log_odds``."""
    return logsigmoid(logits)

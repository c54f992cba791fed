"""The focal loss, with soft targets too, for detectors whose classes are sigmoids."""
from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss (Lin et al. 2017), same shape as its inputs.

    For a target of 0 or 1 it is torchvision's ``sigmoid_focal_loss``; in between it is smallest where the score equals the
    target, like GFL's quality focal loss and unlike torchvision's.
    """
    alpha_target = alpha * target + (1 - alpha) * (1 - target)
    cross_entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
    return alpha_target * (target - logits.sigmoid()).abs() ** gamma * cross_entropy

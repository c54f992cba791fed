"""Random numbers without state: a pure function of a seed and a position, the same on every device.

Whatever a step draws depends only on (seed, step, slot), so a resumed run, another number of processes or another device
sees the same draws, and nothing has to be saved.
"""
from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """One round of a 32-bit integer hash (Mueller's), on int64 tensors whose values are below 2^32."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x


def random_keys(seeds: Tensor, identity: Tensor) -> Tensor:
    """[N, A] int64 in 0..2^32-1, uniform, from ``seeds`` [N] int64 and a number [A] int64 for each column."""
    seeds = _mixed((seeds & _MASK) ^ _mixed((seeds >> 32) & _MASK))
    return _mixed(_mixed((identity + 1) & _MASK).unsqueeze(0) ^ seeds.unsqueeze(1))


def sample_mask(mask: Tensor, limit: Tensor | int, seeds: Tensor, most: int, identity: Tensor) -> Tensor:
    """At most ``limit`` random True entries of each row of a mask.

    Args:
        mask: [N, A] bool.
        limit: [N] int64 or int, how many to keep per row.
        seeds: [N] int64.
        most: an upper bound on ``limit`` that the host knows.
        identity: [A] int64, identifies each column, so that the draw does not depend on its position: an image's own draws
            are the same in any batch and on any canvas.

    Returns:
        [N, A] bool, a subset of ``mask``.
    """
    most = min(most, mask.shape[1])
    keys = random_keys(seeds, identity) + 1
    best, index = (keys * mask).topk(most, dim=1)
    limit = limit.unsqueeze(1) if isinstance(limit, Tensor) else limit  # a plain number stays on the host: a copy would wait
    chosen = (best > 0) & (torch.arange(most, device=mask.device) < limit)
    return torch.zeros_like(mask).scatter(1, index, chosen)

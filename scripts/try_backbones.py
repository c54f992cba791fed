"""Train backbones for a few steps each from random weights, to see that they fit and what a step costs.

    python scripts/try_backbones.py [NAME ...] [--detector gfl|faster_rcnn] [--steps 20] [--set dotted.key=value ...]

Prints a Markdown table: parameters of the whole detector, median time of a step with teacher and student, and the labelled
loss at the first and over the last five steps, on the built-in data set with configs/quickstart.yaml. One that does not fit
gives an error line; the others are still trained.
"""
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

from command_line import Parser, main_guard, number, one_of
from read_settings import DETECTORS, QUICKSTART, RunSettings, build_detector, settings_from

from dtg_core.errors import UserError
from dtg_core.ranges import Count
from dtg_core.settings_text import yaml_scalar

#: One small model of each family that detectors are often built on.
FAMILIES = {
    "resnet": "resnet18", "resnext": "resnext26ts", "convnext": "convnext_atto", "efficientnet": "efficientnet_lite0",
    "mobilenetv3": "mobilenetv3_small_100", "mobilenetv4": "mobilenetv4_conv_small", "regnet": "regnetx_002",
    "hgnetv2": "hgnetv2_b0", "swin": "swin_tiny_patch4_window7_224", "pvt_v2": "pvt_v2_b0", "vit": "vit_tiny_patch16_224",
}  # fmt: skip


def parser() -> Parser:
    result = Parser("Train backbones for a few steps each.")
    result.add_argument("names", nargs="*", metavar="NAME", help="timm models (default: one of each of eleven families)")
    result.add_argument("--detector", type=one_of(DETECTORS), default="gfl", metavar="|".join(DETECTORS),
                        help="detector on each backbone (default: gfl)")
    result.add_argument("--steps", type=number(Count), default=20, metavar="N", help="steps for each (default: 20)")
    result.add_list("--set", "dotted.key=value", "as of train.py")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    families = {name: family for family, name in FAMILIES.items()}
    print("| family | model | parameters | step | loss at step 1 | loss at the end |\n|---|---|---|---|---|---|")
    failed = False
    for name in arguments.names or FAMILIES.values():
        try:
            settings = _settings(arguments.detector, name, arguments.steps, arguments.set)
            parameters, seconds, losses = _train(settings)
        except UserError as error:  # the others are still tried
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        name = settings.backbone.name  # --set may have named another
        family, end = families.get(name, name.split("_")[0]), sum(losses[-5:]) / len(losses[-5:])
        print(f"| {family} | {name} | {parameters / 1e6:.1f} M | {seconds:.2f} s | {losses[0]:.2f} | {end:.2f} |", flush=True)
    return 2 if failed else 0


def _settings(detector: str, name: str, steps: int, overrides: Sequence[str]) -> RunSettings:
    """Every layer learns from random weights, and guidance acts from the first step."""
    scratch = ["backbone.pretrained=false", "backbone.freeze_to_stride=0", "backbone.batch_norm=train", "data.workers=0",
               "guidance.start_step=0", "guidance.ramp_steps=0", "optim.warmup_steps=0"]  # fmt: skip
    chosen = [f"detector={detector}", f"backbone.name={yaml_scalar(name)}", f"run.steps={steps}"]
    return settings_from(QUICKSTART, [*chosen, *scratch, *overrides])[0]


def _train(settings: RunSettings) -> tuple[int, float, list[float]]:
    """Number of parameters, median seconds of a step, labelled loss of each step."""
    import torch
    from accelerate import Accelerator

    from dtg_core.data.plan import step_data
    from dtg_core.data.sources import open_sources
    from dtg_core.engine.train_step import prepare, train_step

    sources = open_sources(settings.data, supervised=False)
    torch.manual_seed(0)
    accelerator = Accelerator()
    detector = build_detector(settings, len(sources.labeled.class_names))
    made = prepare(settings, detector, sources.labeled.objects_per_image(), accelerator)
    data = step_data(settings, sources, 0, 1)
    labeled, times = [], []
    made.student.train()
    for step in range(settings.run.steps):
        batch = data[step].to(accelerator.device)
        began = time.perf_counter()
        losses, _ = train_step(made, [batch])
        labeled.append(sum(float(loss) for name, loss in losses.items() if name.branch == "labeled"))
        times.append(time.perf_counter() - began)
    return sum(parameter.numel() for parameter in made.module.parameters()), statistics.median(times), labeled


if __name__ == "__main__":
    main_guard(main)

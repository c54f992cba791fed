"""What the scripts share: the detectors by name, the command line, the run's settings, and error reports.

Heavy imports are inside functions, so that ``--help`` and a mistyped flag are answered at once.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, get_args

from dtg_core.detectors import KNOWN
from dtg_core.drafts import require_writable, write_text, writing
from dtg_core.errors import UserError, nearest, printable
from dtg_core.ranges import Count, Seed, check_ranges, out_of
from dtg_core.settings import COMMAND_LINE, DEFAULT, load_config, overridden, refuse
from dtg_core.settings_text import dotted, flatten, yaml_scalar

if TYPE_CHECKING:
    from run_settings import RunSettings
    from tqdm import tqdm

    from dtg_core.config import DataConfig, DataRules, Paradigm
    from dtg_core.protocol import Detector

T = TypeVar("T")
QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
RULES = "data.rules."  # the settings for reading data
PARADIGMS = ("dense", "sparse", "supervised")
WHICH = ("teacher", "student", "best")  # the weights in a run folder


# Detectors -------------------------------------------------------------------------------------------------------------


DETECTORS = tuple(KNOWN)
#: The stages of each detector, the keys of ``guidance.stages`` that matter to it.
STAGES = {name: known.stages for name, known in KNOWN.items()}


def build_detector(settings: RunSettings, num_classes: int) -> Detector:
    """The detector of ``settings`` with its initial weights."""
    package = importlib.import_module(KNOWN[settings.detector].package)
    return package.build(getattr(settings, settings.detector), settings.backbone, num_classes)


# Command line ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, with the nearest flag, and takes no abbreviations."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # a shell leaves the ~ of --flag=~/file as it is
        self.add_argument("--debug", action="store_true", help="show the whole traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``argv``, or name the first argument that is not known."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            advice = nearest(unknown[0].partition("=")[0], flags) if unknown[0].startswith("-") else ""
            raise UserError(f"{unknown[0]}: unknown argument{advice}")
        return arguments


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of ``choices``, with the nearest one in the error."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"unknown value {text!r}{nearest(text, choices)}")
        return text

    return parse


def number(range_: Any) -> Callable[[str], Any]:
    """An argparse type: a number of a range of ``dtg_core.ranges``, such as ``Count``."""
    kind, interval = get_args(range_)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wanted {wanted} (found {text!r})") from None
        if problem := out_of(value, interval):
            raise argparse.ArgumentTypeError(problem)
        return value

    return parse


def add_overwrite(parser: Parser) -> None:
    """The flag that ``require_new`` names."""
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing files")


def add_weights(parser: Parser, device: bool = True, which: bool = True) -> None:
    """What a trained detector is loaded from, as ``load_detector`` takes it."""
    parser.add_argument("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="run folder, or a weights file of one")
    if which:
        parser.add_argument("--which", type=one_of(WHICH), default=WHICH[0], metavar="|".join(WHICH),
                            help="which detector of a run folder (default: teacher); best: the teacher at its best evaluation")
    if device:
        parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: what is available)")


def add_rules(parser: Parser) -> None:
    """The flag that messages about data refer to."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="data.rules.key=value", help="what is tolerated")


def rules_of(arguments: argparse.Namespace, rules: DataRules | None = None) -> DataRules:
    """``rules`` (the defaults) with the changes of ``add_rules``. UserError for other keys."""
    from dtg_core.config import Config, DataRules, cross_check

    for text in arguments.set:
        if not text.startswith(RULES):
            raise UserError(f"--set {text}: is not used here - give {RULES}KEY=VALUE, or a flag for files")
    plain = Config()
    config = replace(plain, data=replace(plain.data, rules=rules or DataRules()))
    config = overridden(config, arguments.set)
    check_ranges(config)
    cross_check(config, {})
    return config.data.rules


def require_new(
    files: Iterable[Path], overwrite: bool, flag: str = "--output", inputs: Iterable[str | Path | None] = ()
) -> None:
    """UserError unless all ``files``, given by ``flag``, can be written without loss: none exists, or ``overwrite`` and none is one
    of the ``inputs``. To be called before long work."""
    read = {os.path.realpath(path) for path in inputs if path is not None}
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder - give another {flag}")
        if os.path.realpath(file) in read:
            raise UserError(f"{file}: is read, too, and would be lost - give another {flag}")
        if not overwrite and os.path.lexists(file):
            raise UserError(f"{file}: exists - give another {flag}, or --overwrite")
        require_writable(file.parent, flag)


def write_json(file: Path, figures: Mapping[str, object]) -> None:
    """Write what ``--json FILE`` asks for, with its parent folders."""
    with writing(f"--json {file}", "give another file"):
        write_text(file, json.dumps(figures, indent=1) + "\n")


def progress(items: Iterable[T] | None = None, total: int | None = None, unit: str = "image") -> tqdm[T]:
    """``items`` with a bar, on a terminal only; without ``items`` the caller updates it."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would be forked into workers, and write to the stderr that check_data.py reads
    return tqdm(items, total=total, unit=unit, leave=False, disable=None, miniters=1)


def require_own_files(data: DataConfig, keys: Mapping[str, str], run: Path) -> None:
    """UserError if the settings of ``run`` name files relative to the folder that it was trained in, and this is another.

    Args:
        data: the run's. keys: those of ``data`` that are to be read, each with the flags that would replace it; empty: none do.
    """
    if data.labeled is None:  # the built-in data set, whatever the other keys say
        return
    for key, flags in keys.items():
        path = getattr(data, key)
        if path is not None and not os.path.isabs(path) and not os.path.exists(path):
            other = f", or give {flags}" if flags else ""
            raise UserError(f"data.{key}={path} of {run}: not found from here - run it in the folder where the run was trained"
                            f"{other}")


def train_parser() -> Parser:
    """The command line of ``train.py``."""
    parser = Parser("Train a detector on few labelled and many unlabelled images.")
    add = parser.add_argument
    add("--detector", type=one_of(DETECTORS), metavar="|".join(DETECTORS), help="required unless the config names it")
    add("--config", type=Path, metavar="FILE", help="YAML settings (default: configs/quickstart.yaml)")
    add("--paradigm", type=one_of(PARADIGMS), metavar="|".join(PARADIGMS), help="guidance of every stage")
    add("--backbone", metavar="TIMM_NAME", help="any timm model with feature maps (backbone.name)")
    add("--steps", type=number(Count), metavar="N", help="training steps (run.steps)")
    add("--seed", type=number(Seed), metavar="N", help="seed of all random draws (run.seed)")
    add("--labeled", metavar="ANNOTATIONS.json", help="labelled images, COCO format (data.labeled)")
    add("--unlabeled", metavar="DIR|ANNOTATIONS.json", help="unlabelled images (data.unlabeled)")
    add("--val", metavar="ANNOTATIONS.json", help="images to evaluate on (data.val)")
    add("--images", metavar="DIR", help="folder that file names in the JSONs are relative to (data.images)")
    add("--val-images", metavar="DIR", help="the same for --val, if different (data.val_images)")
    add("--output", metavar="DIR", help="run folder (run.output)")
    add("--init", metavar="WEIGHTS", help="weights file or run folder that student and teacher start from (run.init)")
    add("--reset-head", action="store_const", const=True, help="with --init: train the class layers from scratch (run.reset_head)")
    add("--resume", metavar="auto|CHECKPOINT", help="continue from the newest or the given checkpoint")
    add("--resume-with-changes", action="store_true", help="resume although settings or data have changed")
    add("--stop-at", type=number(Count), metavar="N",
        help="write a checkpoint after N steps and stop there, to be resumed later")
    add("--overwrite", action="store_true", help="first delete what an earlier run has written into the folder")
    add("--scale-lr", action="store_true", help="multiply lr by this run's images per step / optim.reference_batch")
    add("--replay", type=Path, metavar="FILE", help="repeat the step at which a run gave up (its nonfinite/step.json)")
    add("--set", nargs="+", action="extend", default=[], metavar="dotted.key=value", help="set any value of the config")
    add("--print-config", action="store_true", help="print every setting and where it comes from, and exit")
    add("--dry-run", action="store_true", help="check everything, try two steps, estimate time and memory, and write nothing")
    return parser


#: Flags that set a key.
_FLAG_KEYS = {
    "detector": "detector", "backbone": "backbone.name", "steps": "run.steps", "seed": "run.seed", "labeled": "data.labeled",
    "unlabeled": "data.unlabeled", "val": "data.val", "images": "data.images", "val_images": "data.val_images",
    "output": "run.output", "init": "run.init", "reset_head": "run.reset_head", "paradigm": "paradigm",
}


def load_settings(arguments: argparse.Namespace) -> tuple[RunSettings, dict[str, str], list[str]]:
    """The settings of a ``train_parser`` command line; see ``settings_from``.

    Raises:
        UserError: for contradictory flags, too.
    """
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite: the one keeps what the other deletes - give one of them")
    overrides = [f"{key}={yaml_scalar(getattr(arguments, flag))}" for flag, key in _FLAG_KEYS.items()
                 if getattr(arguments, flag) is not None]
    for flag in ("detector", "paradigm"):  # which name a run's folder, and a study's runs; of other keys, the later one wins
        value = getattr(arguments, flag)
        other = next((text for text in arguments.set if text.partition("=")[0] == flag), None)
        if value is not None and other is not None and other.partition("=")[2] != value:
            raise UserError(f"--set {other}: --{flag} says {value} - leave one of the two out")
    settings, origins, notes = settings_from(_shortest(arguments.config or QUICKSTART), [*overrides, *arguments.set])
    if origins["detector"] == DEFAULT:
        raise UserError(f"--detector: missing - choose from {', '.join(DETECTORS)}")
    if settings.paradigm == "supervised" and arguments.unlabeled:
        refuse("paradigm", "supervised uses no unlabelled images (found --unlabeled) - leave one of the two out", origins)
    return settings, origins, notes


def settings_from(file: Path | None, overrides: Sequence[str]) -> tuple[RunSettings, dict[str, str], list[str]]:
    """The defaults with the settings of a YAML file and "dotted.key=value"; later ones win.

    Returns:
        The settings, the origin of each key, and warnings to show.

    Raises:
        UserError: for whatever ``load_config``, the range checks and the detector's settings among each other find.
    """
    from run_settings import RunSettings

    from dtg_core.config import RENAMED, cross_check

    notes: list[str] = []
    of_file, origins = load_config(RunSettings, file, (), RENAMED, notes)
    settings = overridden(of_file, overrides, origins)
    if missing := [stage for stage in STAGES[settings.detector] if stage not in settings.guidance.stages]:
        raise UserError(f"guidance.stages.{missing[0]}: is missing - add its StageRule to paper_stages in dtg_core/config.py")
    settings = _fill_paradigms(_at_home(settings), origins, settings.paradigm != of_file.paradigm)
    check_ranges(settings, origins)
    stages = {name: settings.guidance.stages[name] for name in STAGES[settings.detector]}  # no other can be wrong
    for name, rule in stages.items():
        if settings.paradigm == "supervised" and rule.paradigm != "none":
            key = f"guidance.stages.{name}.paradigm"
            refuse(key, f"the paradigm is supervised (found {rule.paradigm}) - use none, or another paradigm", origins)
    return settings, origins, [*notes, *cross_check(replace(settings, guidance=replace(settings.guidance, stages=stages)), origins)]


def without_effect(given: Sequence[str], settings: RunSettings) -> list[str]:
    """A note on keys given by ``--set`` that the run's detector and paradigm do not read."""
    from dtg_core.engine.effective import SILENT, effective

    every = dotted(flatten(settings))
    idle = {text.partition("=")[0] for text in given} & every.keys() - effective(every).keys() - SILENT - {"paradigm"}
    return [f"--set {', '.join(sorted(idle))}: without effect, as this detector and paradigm do not read it"] if idle else []


def is_supervised(settings: RunSettings) -> bool:
    """Whether no stage of the chosen detector learns from unlabelled images, so that none are loaded."""
    return all(settings.guidance.stages[stage].paradigm == "none" for stage in STAGES[settings.detector])


def _stage_paradigm(paradigm: str) -> Paradigm:
    return "none" if paradigm == "supervised" else cast("Paradigm", paradigm)


def _fill_paradigms(settings: RunSettings, origins: dict[str, str], changed: bool) -> RunSettings:
    """Give the run's paradigm to the stages without a more specific one, noting its origin. If the command line has ``changed`` it,
    those of the file, which may be a run's own config.yaml, are no longer valid."""
    stages = dict(settings.guidance.stages)
    for stage, rule in stages.items():
        key = f"guidance.stages.{stage}.paradigm"
        if origins[key] == DEFAULT or (changed and origins[key] != COMMAND_LINE):
            stages[stage] = replace(rule, paradigm=_stage_paradigm(settings.paradigm))
            origins[key] = origins["paradigm"]
    return replace(settings, guidance=replace(settings.guidance, stages=stages))


def _at_home(settings: RunSettings) -> RunSettings:
    """A leading ~ in a path becomes the user's folder, which neither YAML nor the shell does in key=~/file."""

    def expanded(section: T, *keys: str) -> T:
        found = {key: value for key in keys if (value := getattr(section, key)) is not None}
        return replace(section, **{key: os.path.expanduser(value) for key, value in found.items()})  # type: ignore[type-var]

    return replace(
        settings, data=expanded(settings.data, "labeled", "unlabeled", "val", "images", "val_images", "unlabeled_images"),
        run=expanded(settings.run, "output", "init"), backbone=expanded(settings.backbone, "weights"),
    )  # fmt: skip


def _shortest(path: Path) -> Path:
    """Relative to the working folder where that is shorter: it is shown in messages."""
    try:
        relative = Path(os.path.relpath(path))
    except ValueError:  # another drive
        return path
    return relative if len(str(relative)) < len(str(path)) else path


def check_devices(environment: Mapping[str, str], gpus: int) -> None:
    """Raise UserError if a launcher's environment asks for GPUs that do not exist, instead of a silent start on the CPU or a
    failure deep in CUDA; or for shards of parameters, of which the teacher's average and the clipping of gradients know nothing.

    Args:
        environment: of this process, as ``accelerate launch`` and ``torchrun`` set it. gpus: how many torch finds.
    """
    for sharded in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{sharded}", "").lower() == "true":
            raise UserError(f"accelerate: {sharded} splits parameters over processes, which training here cannot do - use "
                            "--multi_gpu")
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not gpus and visible not in ("", "-1"):
        raise UserError(f"CUDA_VISIBLE_DEVICES: torch finds none of these GPUs (found {visible}) - unset it, or fix the index, "
                        "the driver or the CUDA build of torch")
    processes = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if not gpus and processes > 1:
        raise UserError(f"processes: {processes} were started for GPUs, and torch finds none - fix the driver or the CUDA build "
                        "of torch, or set ACCELERATE_USE_CPU=true to train on the CPU")
    if 0 < gpus < processes:
        raise UserError(f"processes: {processes} on this machine, which has fewer GPUs (found {gpus}) - start {gpus} of them, or "
                        "make more GPUs visible")


# Errors ----------------------------------------------------------------------------------------------------------------


def main_guard(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run ``main(sys.argv[1:])`` and exit with its status.

    A UserError becomes one line on stderr and status 2, Ctrl-C status 130; with ``--debug`` the traceback is shown. If the
    reader of the output has gone, as with ``head``, it is status 141 without a message.
    """
    try:
        with _warnings_told():
            status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(141)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Show what the core's modules log on stderr, like other warnings; loader processes inherit this."""
    core, lines = logging.getLogger("dtg_core"), logging.StreamHandler()
    lines.setFormatter(logging.Formatter("warning: %(message)s"))
    core.addHandler(lines)
    core.propagate = False
    try:
        yield
    finally:
        core.removeHandler(lines)
        core.propagate = True

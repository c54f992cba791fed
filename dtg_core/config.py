"""Configuration: dataclasses whose defaults are the paper's values, where it gives them, with the ranges of valid values.

YAML files may set existing fields only (``dtg_core.settings`` reads them). ``configs/*.yaml`` scale the paper's values down
or fill in a setting.
The labels A1 to A30 mark choices that the paper leaves open; docs/method.md gives reasons for each default.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

from dtg_core.ranges import Count, NotNegative, OpenShare, PartialShare, Positive, PositiveShare, Seed, Share, Whole
from dtg_core.settings import Renames, refuse

Paradigm = Literal["dense", "sparse", "none"]
Collisions = Literal["best", "all"]
Hull = Literal["ellipse", "corners"]
Side = Annotated[int, "[16, 16384]"]  # of an image, in pixels
Patches = Annotated[int, "[0, 100]"]

#: Key names of former versions; renaming a key takes a new table at the end, which makes the next version.
RENAMED: Renames = ({"faster_rcnn.rcnn.max_candidates": "faster_rcnn.rcnn.pre_nms"},)
SCHEMA = len(RENAMED) + 1


@dataclass(frozen=True)
class StageRule:
    """How the teacher guides one stage on unlabelled images."""

    paradigm: Paradigm = "dense"
    # Inverse NMS Clustering (Sec. 3.2)
    tau: OpenShare = 0.45  # a teacher sample is a candidate when its score is above tau
    nms_iou: PositiveShare = 0.5  # IoU of the teacher's NMS, which makes the clusters (A14)
    classification: bool = True  # INC class labels, Eq. 2
    box: bool = True  # INC box targets, Eq. 3
    max_candidates: Count = 1000  # at most per image, the best ones, the others being ignored; a safety limit (A16)
    min_iou: PartialShare = 0.3  # of a moved teacher anchor with its student anchor, below which the pair is dropped (A5)
    collisions: Collisions = "best"  # of teacher samples on one student sample: the best teaches it, or all do (A6)
    background_tau: OpenShare | None = None  # at or below: background; between it and tau: ignored. None: tau (A7)
    # Samples per image: all candidates, and random background up to this number but never fewer than candidates. None: all
    # background (A8)
    background_samples: Whole | None = None
    # Reduction of class and box losses (A12). "cluster": Eqs. 2 and 3 literally, means over clusters of the means within them.
    # "stage": the stage's own reduction on labelled images, for whose scale alpha was chosen.
    normalization: Literal["cluster", "stage"] = "cluster"
    # Class target (A27): the stage's own (GFL: IoU with the kept box), 1, the teacher's score, or consensus: the mean IoU of the
    # student's box with all members of the teacher's cluster, weighted by their scores.
    quality: Literal["stage", "one", "teacher", "consensus"] = "stage"
    # Rank Matching (Eqs. 4 to 6)
    rank: bool = True
    rank_weight: NotNegative = 3.0  # beta
    temperature: Annotated[float, "[1e-6, inf)"] = 1.0  # T
    # Not in the paper, for weak teachers whose scores are noise
    member_iou: PartialShare = 0.0  # least IoU of a member's student sample with the box that it learns; others are ignored
    member_share: PartialShare = 0.0  # the same, as a share of the best such IoU in the cluster; others are background
    member_tau: OpenShare | None = None  # a cluster needs one score above tau; further members need this one. None: tau, too
    consensus_rank: Positive | None = None  # rank by a box's mean IoU with its cluster, divided by this, not by the teacher's logit
    cluster_trust: bool = False  # weigh a cluster's losses by the mean IoU between its members; a cluster of one by 0
    share_classes: bool = False  # share a member's class target out over the classes that its cluster's members see
    soft_background: bool = False  # weigh background by 1 - the teacher's score (after Soft Teacher)
    # Step size, in logits, with which each class's threshold (tau, sparse: pseudo_score) adapts until the teacher finds as many
    # objects per unlabelled image as labelled images have. 0: fixed thresholds
    tau_rate: Share = 0.0
    # the sparse-to-dense baseline (Sec. 3.1)
    pseudo_score: PartialShare = 0.5  # a detection of the teacher is a pseudo box when its score is above this
    proposals: Literal["teacher", "student"] = "teacher"  # whose proposals the R-CNN is trained on (A30)


def paper_stages() -> dict[str, StageRule]:
    """The paper's thresholds (Sec. 4.2) with the detectors' own NMS."""
    return {
        "head": StageRule(tau=0.4, nms_iou=0.6),  # GFL; the paper gives no tau (A26)
        # The RPN's cross-entropy is a mean over its 256 samples; divided by the few clusters instead, it outgrows all other
        # losses, and a batch without a candidate destroys the detector (measured).
        "rpn": StageRule(tau=0.9, nms_iou=0.7, background_samples=256, normalization="stage"),
        "rcnn": StageRule(tau=0.45, nms_iou=0.5),
    }


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance on unlabelled images."""

    alpha: NotNegative = 4.0  # weight of all unlabelled losses (Eq. 1)
    start_step: Whole = 2000  # no unlabelled loss before this step (A28)
    ramp_steps: Whole = 2000  # then its weight grows linearly from 0 to alpha over these steps
    stages: dict[str, StageRule] = field(default_factory=paper_stages)

    def only(self, stages: Iterable[str]) -> GuidanceConfig:
        """The same for a detector with these stages; the others are those of other detectors, and nothing reads them."""
        return replace(self, stages={name: self.stages[name] for name in stages})


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model and how it is trained."""

    name: str = "resnet50"
    pretrained: bool = True
    weights: str | None = None  # file (.safetensors, or .pt without pickled code) instead of an installed package or the hub
    freeze_to_stride: Whole = 4  # layers up to and including the feature map of this stride are frozen; 0: none
    batch_norm: Literal["frozen", "train"] = "frozen"
    options: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model as they are


@dataclass(frozen=True)
class DataRules:
    """What is tolerated in images and annotations."""

    max_bad_annotations: Share = 0.1  # share of a file's annotations that may be unusable; they are left out
    # Share of a file's images that may be missing, which are left out, and that may be unreadable in evaluate.py and
    # check_data.py, which stop at more; training takes another image in the place of an unreadable one
    max_bad_images: Share = 0.01
    box_format: Literal["auto", "xywh", "xyxy"] = "auto"  # of "bbox"; auto: xywh, refused if it looks like another format
    # Boxes of a file whose images have since been enlarged or shrunk: scale them with the images, or keep them as they are
    resized: Literal["error", "scale", "keep"] = "error"
    allow_outside_root: bool = False  # whether file names may lead out of the images' folder
    use_json_area: bool = False  # small, medium and large by the JSON's "area" (COCO: of masks), not the boxes'
    truncated: Literal["skip", "use", "error"] = "skip"  # image files that are cut off; use: what there is of them
    float_range: tuple[float, float] | None = None  # values of float, 32-bit and 16-bit images that become black and white
    max_pixels: Count = 89_478_485  # of an image; larger ones are not decoded


DEFAULT_RULES = DataRules()


@dataclass(frozen=True)
class DataConfig:
    """Which images. No ``labeled`` means the built-in synthetic data set of shapes; then no other file may be named."""

    labeled: str | None = None  # COCO JSON
    unlabeled: str | None = None  # folder, or COCO JSON whose annotations are ignored
    val: str | None = None  # COCO JSON
    images: str | None = None  # folder that the JSONs' file names are relative to
    val_images: str | None = None  # the same for val's file names; None: images
    unlabeled_images: str | None = None  # and for those of unlabeled, if it is a JSON
    unlisted: Literal["ignore", "unlabeled"] = "ignore"  # images next to the labelled ones that their JSON does not list
    labeled_per_device: Count = 1
    unlabeled_per_device: Count = 4
    workers: Annotated[int, "[0, 256]"] = 2  # loader processes per training process
    shapes_labeled: Count = 80  # size of the built-in synthetic data set
    shapes_unlabeled: Count = 1000
    shapes_val: Count = 300
    shapes_seed: Seed = 0
    rules: DataRules = DEFAULT_RULES


@dataclass(frozen=True)
class ViewsConfig:
    """Weak and strong views, Soft Teacher's recipe (Sec. 3.1)."""

    short_edge: tuple[Side, Side] = (400, 1200)  # limits of the shorter side, drawn uniformly for each view
    long_edge: Side = 1333
    test_short_edge: Side = 800
    flip: Share = 0.5  # probability of a horizontal flip
    color: bool = True  # one of nine colour operations, on labelled and strong views
    geometric: Share = 1.0  # probability of one of shift, rotation and shear, on strong views
    rotate: Annotated[float, "[0, 180]"] = 30.0  # limits in degrees
    shear: Annotated[float, "[0, 80]"] = 30.0
    translate: PartialShare = 0.1  # limit as a share of the side
    erase_patches: tuple[Patches, Patches] = (1, 4)  # number of patches erased from a strong view; (0, 0): none
    erase_size: Share = 0.2  # largest side of a patch as a share of the view's
    box_hull: Hull = "ellipse"  # box around a rotated object; Soft Teacher: corners


@dataclass(frozen=True)
class OptimConfig:
    """SGD as in Sec. 4.2, or AdamW for short runs."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    momentum: PartialShare = 0.9
    weight_decay: NotNegative = 1e-4
    warmup_steps: Whole = 500  # linear, from lr / 1000
    milestones: tuple[Count, ...] = (120_000, 160_000)  # steps at which lr is multiplied by gamma
    gamma: PositiveShare = 0.1
    clip_norm: Positive | None = None
    accumulate: Count = 1  # micro-batches per step; more than one saves memory but costs an extra forward pass each
    reference_batch: Count = 40  # images per step that lr is meant for, unlabelled ones included: for --scale-lr and a warning
    ema: PartialShare = 0.999  # the teacher keeps min(ema, 1 - 1 / (step + 1)) of itself (A29)


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    steps: Count = 180_000
    seed: Seed = 0
    output: str | None = None  # run folder; None: runs/<detector>-<paradigm>-<data>-seed<seed>
    init: str | None = None  # weights file or run folder that teacher and student start from
    reset_head: bool = False  # initialise layers that depend on the classes afresh, instead of taking them from ``init``
    log_every: Count = 50
    evaluate_every: Whole = 0  # and once before guidance begins; 0: only at the end
    checkpoint_every: Whole = 0
    score_threshold: PartialShare = 0.05  # of evaluated detections (A29)
    evaluate_batch: Count = 8
    channels_last: bool = True
    compile: bool = False  # torch.compile of the backbone: takes minutes at the start and at new image sizes, for faster steps
    max_skipped: Count = 20  # steps in a row that may be skipped because they are not finite (a fp16 scaler needs up to 16)
    trackers: tuple[str, ...] = ()  # of Accelerate, besides metrics.jsonl: tensorboard, wandb, ...


@dataclass(frozen=True)
class Config:
    """Everything but the detectors' own sections, which the command line adds."""

    schema: Annotated[int, f"[{SCHEMA}, {SCHEMA}]"] = SCHEMA  # version of these keys
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


C = TypeVar("C", bound=Config)


def without_weights(config: C) -> C:
    """The same, but the backbone starts from random weights, for when other weights are loaded afterwards."""
    return replace(config, backbone=replace(config.backbone, pretrained=False, weights=None))


def cross_check(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Check values against each other: UserError for what cannot run, a list of warnings for what was hardly intended."""
    optim, views, guidance, run = config.optim, config.views, config.guidance, config.run
    if list(optim.milestones) != sorted(set(optim.milestones)):
        refuse("optim.milestones", f"has to ascend (found {list(optim.milestones)})", origins)
    for key, (low, high) in (("views.short_edge", views.short_edge), ("views.erase_patches", views.erase_patches)):
        if low > high:
            refuse(key, f"the lower limit is over the upper one (found [{low}, {high}])", origins)
    for key in ("unlabeled", "val", "images", "val_images", "unlabeled_images", "unlisted") if config.data.labeled is None else ():
        value = getattr(config.data, key)
        if value != getattr(DataConfig(), key):
            refuse(f"data.{key}", "is of no use without labelled images, as the built-in synthetic data set would be trained on "
                   f"(found {value}) - give --labeled (data.labeled), or leave it out", origins)
    levels = config.data.rules.float_range
    if levels is not None and levels[0] >= levels[1]:
        refuse("data.rules.float_range", f"the first has to be below the second (found {list(levels)})", origins)
    for name, rule in guidance.stages.items():
        for key, limit in (("background_tau", rule.background_tau), ("member_tau", rule.member_tau)):
            if limit is not None and limit > rule.tau:
                refuse(f"guidance.stages.{name}.{key}", f"is over tau (found {limit} and {rule.tau})", origins)
        if rule.paradigm == "dense" and not (rule.classification or rule.box or (rule.rank and rule.rank_weight > 0)):
            key = f"guidance.stages.{name}"
            refuse(f"{key}.classification", "all losses of the stage are off (found false, as box and rank) - use "
                   f"{key}.paradigm=none", origins)
    if run.init is not None and config.backbone.weights is not None:
        refuse("backbone.weights", "is not read, because run.init has all weights - leave one of the two out", origins)
    if run.reset_head and run.init is None:
        refuse("run.reset_head", "there is no head to reset, because no weights are loaded - give --init WEIGHTS", origins)
    warnings = []
    wanted = max(views.short_edge[1], views.test_short_edge)
    if views.long_edge < wanted:
        warnings.append(f"views.long_edge: {views.long_edge} keeps views smaller than the {wanted} px of views.short_edge or "
                        "views.test_short_edge - raise it")
    beyond = [step for step in optim.milestones if step >= run.steps]
    if beyond:
        warnings.append(f"optim.milestones: {beyond} are never reached in {run.steps} steps")
    if optim.warmup_steps >= run.steps:
        warnings.append(f"optim.warmup_steps: {optim.warmup_steps} of {run.steps} steps, so lr never reaches its full value")
    backbone = config.backbone
    partly_frozen = backbone.batch_norm == "frozen" or backbone.freeze_to_stride > 0
    if partly_frozen and not backbone.pretrained and backbone.weights is None and run.init is None:
        # Measured: residual branches end in a batch norm of weight 0, so that frozen ones never learn anything.
        warnings.append("backbone.pretrained: false, so frozen batch norms and layers stay as they were drawn at random - use "
                        "backbone.batch_norm=train and backbone.freeze_to_stride=0")
    guided = any(rule.paradigm != "none" for rule in guidance.stages.values())
    if guided and guidance.start_step >= run.steps:
        warnings.append(f"guidance.start_step: {guidance.start_step} of {run.steps} steps, so no unlabelled image is used")
    if guided and guidance.alpha == 0:
        warnings.append("guidance.alpha: 0, so nothing is learnt from unlabelled images - use --paradigm supervised, or raise it")
    return warnings

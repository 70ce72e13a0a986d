"""What the config of a run may say: its sections, their keys and defaults, and which contradict each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.engine.offered import check_offered
from pretrain.errors import InputError, nearest
from pretrain.images.transforms import Law
from pretrain.model.spec import ARCHITECTURES, ViTSpec
from pretrain.run.configfile import FolderName, Indices, Section, Seeds, Shots
from pretrain.storage.retry import TIMEOUTS, Timeouts

_SIZES = tuple(next(iter(ARCHITECTURES.values())))


class ModelSection(Section):
    """The network. `arch` names a size of the paper; sizes said beside it replace its own, and all five replace it.

    Read, it holds either: `arch` alone, or the five sizes.
    """

    arch: str | None = None
    patch_size: int | None = None
    layers: int | None = None
    width: int | None = None
    mlp: int | None = None
    heads: int | None = None
    image_size: int = 224
    channels: int = 3
    num_classes: int = 1000
    representation_size: int | None = None
    dropout: float = 0.0
    gelu: Literal["exact", "tanh"] = "exact"
    pool: Literal["cls", "mean"] = "cls"
    positions: Literal["learned", "sincos2d"] = "learned"
    # Bias the classification layer starts from; −ln(classes) lets a sigmoid loss start from the base rate.
    head_bias: float = 0.0

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str | None) -> str | None:
        if arch is not None and arch not in ARCHITECTURES:
            near = nearest(arch, ARCHITECTURES)
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"unknown architecture {arch!r}; {hint}known: {' '.join(ARCHITECTURES)}")
        return arch

    @model_validator(mode="before")
    @classmethod
    def _arch_or_sizes(cls, said: Any) -> Any:
        name = said.get("arch") if isinstance(said, dict) else None
        sizes = ARCHITECTURES.get(name) if isinstance(name, str) else None
        if sizes is None:
            return said
        given = {key: said[key] for key in sizes if said.get(key) is not None}
        if {**sizes, **given} == sizes:
            return {**said, **dict.fromkeys(sizes)}
        if len(given) == len(sizes):
            raise ValueError(
                f"arch {name!r} has no effect where {', '.join(sizes)} are all set; leave it out, or set to null the "
                "sizes that it should give"
            )
        return {**said, **sizes, **given, "arch": None}

    @model_validator(mode="after")
    def _sized(self) -> ModelSection:
        missing = [key for key in _SIZES if getattr(self, key) is None]
        if self.arch is None and missing:
            raise ValueError(
                f"without arch, {', '.join(missing)} must be given (or name one of {' '.join(ARCHITECTURES)})"
            )
        try:
            self.spec()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def spec(self) -> ViTSpec:
        """The network's specification."""
        keys = set(ViTSpec.__dataclass_fields__)
        said = {key: value for key, value in self.model_dump().items() if key in keys and value is not None}
        return ViTSpec(**{**ARCHITECTURES.get(self.arch or "", {}), **said})


Layers = Annotated[int, Field(gt=0)]
Magnitude = Annotated[int, Field(ge=0, le=30)]
Share = Annotated[float, Field(le=1)]


class DataSection(Section):
    """The shard stream and the augmentation. `train` and `eval` are an INDEX or a list that is concatenated."""

    train: Indices | None = Field(default=None, examples=[["DIR", "DIR2"]])
    eval: Indices | None = Field(default=None, examples=[["DIR", "DIR2"]])
    workers: int = Field(default=4, gt=0)  # decode threads per rank
    audit: bool = False
    chunk: int = Field(default=8, gt=0)  # g, samples a chunk
    lanes: int | None = Field(default=None, gt=0)  # V; null: B·clamp(⌊N/(64·g·B)⌋, 1, 4)
    crop: Law = "torchvision"  # how area and aspect are drawn; the paper's recipes were tuned with TensorFlow's
    crop_area: tuple[float, Share] = (0.05, 1.0)  # share of the image's area (the paper's inception crop)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    eval_crop: Literal["centre", "whole"] = "centre"  # of the image resized by its shorter side; or all of it, squashed
    decoder: Literal["host", "device"] = "host"  # where training's JPEGs are decoded, cropped and augmented
    # [operations, magnitude]; its pixels are for 224 px
    randaugment: tuple[Layers, Magnitude] | None = Field(default=None, examples=[[2, 10]])
    mixup: float = Field(default=0.0, ge=0)  # α of Beta(α, α); 0: no mixup
    read_ahead_mib: int = Field(default=1024, gt=0)  # of shards, per rank, beyond what the next batches ask for
    # Of attempts at one range of a remote shard; below train.hang_minutes and slow_minutes, which end who waits longer.
    patience_minutes: float = Field(default=5, gt=0)
    # A network of more outputs than the data have classes, or a grey one for images in colour; fine-tuning: "refuse".
    mismatch: Literal["note", "refuse"] = "note"
    unreadable_chunks: Literal["stop", "quarantine"] = "stop"
    max_unreadable: float = Field(default=0.01, ge=0, le=1)  # share of about the last 10⁴ images; the run ends above

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high, found {list(bounds)}")
        return bounds

    def timeouts(self) -> Timeouts:
        """How long is waited for remote shards."""
        return replace(TIMEOUTS, deadline=60 * self.patience_minutes)


class GuardSection(Section):
    """Updates that are skipped, and what follows too many of them."""

    skips: int = Field(default=3, gt=0)  # updates skipped in a row before `then`
    then: Literal["stop", "rollback"] = "stop"
    spike: float | None = Field(default=None, gt=1)  # standard deviations above the mean loss; null: spikes are trained
    margin: int = Field(default=100, ge=0)  # steps before the skipped ones that a roll-back avoids with them
    rollbacks: int = Field(default=3, gt=0)  # at most, in a run


class TrainSection(Section):
    """How long, how much at once, and against which loss. Exactly one of `steps` and `epochs` is set."""

    global_batch: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)  # images per rank and backward pass; null: no accumulation
    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    loss: Literal["sigmoid", "softmax"] = "softmax"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # What the backward pass computes again: nothing, all of a block, all but its matrix products and attention, or all
    # of every k-th block.
    activation_checkpointing: Literal["none", "full", "selective"] | Layers = "none"
    compile: bool = False  # torch.compile of the blocks
    eval_every: int | None = Field(default=None, gt=0)  # steps between validations; null: once, at the end
    time_limit_minutes: float | None = Field(default=None, gt=0)
    guard: GuardSection = GuardSection()
    # Without progress for so long the run ends, with the stack of the rank that hangs: in a step, and in a save or an
    # evaluation. All up to the end of the first step has at least half an hour.
    hang_minutes: float = Field(default=10.0, gt=0, le=10_000)
    slow_minutes: float = Field(default=15.0, gt=0, le=10_000)

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"set exactly one of steps and epochs, found steps={self.steps}, epochs={self.epochs}")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class AveragingSection(Section):
    """The Polyak average of the weights, average ← decay · average + (1 − decay) · weights after each update."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    start_step: int = Field(default=0, ge=0)  # updates before which the average is the weights themselves
    debias: bool = True  # the weights that averaging began from have no share in it (schedule.Averaging)


class OptimizerSection(Section):
    """AdamW (pre-training, Table 3) or SGD with momentum (fine-tuning, Table 4)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    clip_norm: float = Field(default=1.0, ge=0)  # global gradient norm; 0: no clipping
    averaging: AveragingSection | None = Field(default=None, examples=[{"decay": 0.9999}])


class ScheduleSection(Section):
    """Linear warm-up from 0, then decay to `final_lr` over the steps that are left."""

    warmup_steps: int = Field(default=10_000, ge=0)
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_lr: float = Field(default=0.0, ge=0)


class FewshotSection(Section):
    """Few-shot evaluation while training: the closed-form probe on the frozen features every `every` steps."""

    every: int = Field(gt=0)
    support: Indices = Field(examples=[["DIR", "DIR2"]])
    query: Indices = Field(examples=[["DIR", "DIR2"]])
    shots: Shots = (5,)
    seeds: Seeds = (0,)
    l2: float = Field(default=1024.0, gt=0)


class CheckpointSection(Section):
    """When to save, and how many to hold. The last step is always saved."""

    every: int | None = Field(default=None, gt=0)  # steps
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, gt=0)  # newest checkpoints held
    keep_every: int | None = Field(default=None, gt=0)  # steps; the first checkpoint of so many is never removed
    background: bool = True  # write while training goes on, from a copy in the host's memory


class LoggingSection(Section):
    """What is written down, and how often."""

    every: int = Field(default=10, gt=0)  # steps
    tensorboard: bool = True
    peak_tflops: float | None = Field(default=None, gt=0)  # per device, for MFU; null: by its data sheet


# Keys of a DeepSpeed config that other keys of ours already say.
_SAID_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
}


class Recipe(Section):
    """What pre-training and fine-tuning say alike."""

    needs_weights: ClassVar[bool] = False  # whether a run cannot begin without --init

    name: FolderName
    seed: int = Field(default=0, ge=0, lt=2**53)
    data: DataSection = DataSection()
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict, examples=[{"zero_optimization": {"stage": 1}}])

    @field_validator("deepspeed")
    @classmethod
    def _not_said_twice(cls, section: dict[str, Any]) -> dict[str, Any]:
        for key, ours in _SAID_ELSEWHERE.items():
            if key in section:
                raise ValueError(f"{key} follows from {ours}: set that and leave deepspeed.{key} out")
        check_offered(section)
        return section

    @model_validator(mode="after")
    def _patience_ends_first(self) -> Recipe:
        patience, train = self.data.patience_minutes, self.train
        for key, limit in (("hang_minutes", train.hang_minutes), ("slow_minutes", train.slow_minutes)):
            if patience >= limit:
                raise ValueError(
                    f"data.patience_minutes is {patience:g}, train.{key} is {limit:g}: a rank that waits for storage "
                    f"would be ended as one that hangs; a data.patience_minutes below train.{key} would be right"
                )
        return self

    def of(self, network: ViTSpec | None) -> RunConfig:
        """The run that this is, given the network of the weights it begins from. Raises InputError: they do not fit."""
        raise NotImplementedError


class RunConfig(Recipe):
    """A run whose network is fully said: pre-training as it stands, fine-tuning once the checkpoint is known."""

    model: ModelSection
    fewshot: FewshotSection | None = Field(default=None, examples=[{"every": 1000, "support": "DIR", "query": "DIR2"}])

    def of(self, network: ViTSpec | None) -> RunConfig:
        return self

# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the options of a training run ask for: processes, data, network, losses, optimizer, average."""

import contextlib
import datetime
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from .. import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from ..data.cache import build_cache
from ..data.dataset import ImageDataset
from ..data.folders import load_table
from ..data.portraits import PortraitDataset
from ..data.resolutions import MixedResolutionBatchSampler, source_size
from ..data.streams import ImageStream, ignore_signals
from .augment import GeometricAugment
from .checkpoints import check_architecture, read_object
from .ema import HalfLifeEMA
from .freezing import freeze
from .losses import (
    OctaveLoss,
    OctaveValidationLoss,
    TrainingLoss,
    ValidationLoss,
    detail_law,
    octave_scalings,
)
from .options import Options
from .step import WeightAverage, keep_freed_memory

HELD_OUT_PORTRAITS = 10_001  # added to --seed: the series of portraits that validation looks at
MODELS = {"unet": DFUModel, "refiner": DFURefiner}  # by the component of the pipeline that they are
NOISE_LEVELS = {"unet": (-1.2, 1.2), "refiner": (-2.3, 1.4)}  # mean and deviation of ln sigma
NOT_FOR_REFINERS = (
    "class_conditional", "label_dropout", "augment_probability", "upsample_resolutions", "freeze", "spectral_rank",
    "checkpointed_levels", "push_to_hub",
)  # fmt: skip
MEASURED_IMAGES = 128  # from which the deviation of detail is measured


def build_accelerator(args: Options) -> Accelerator:
    """The launcher's processes with their precision and trackers, seeded. `args.mixed_precision` becomes what counts.

    Raises:
        ValueError: a tracker or a precision that is not there.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / "logs")),
        # The others wait while the main process samples and validates, longer than the usual ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=4))],
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} is not installed: install it, or use --report_to none.")
    args.mixed_precision, on_cpu = accelerator.mixed_precision, accelerator.device.type == "cpu"
    if args.mixed_precision == "fp16" and on_cpu:
        raise ValueError("--mixed_precision fp16 needs a GPU (here it would silently be float32): use bf16.")
    if on_cpu:
        keep_freed_memory()
    if deepspeed := accelerator.state.deepspeed_plugin:  # whose engine clips and wants to know the batch
        share = args.batch_size // accelerator.num_processes
        options = {"train_micro_batch_size_per_gpu": share, "gradient_clipping": args.max_grad_norm}
        deepspeed.deepspeed_config.update(options)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    set_seed(args.seed)
    return accelerator


def load_config(args: Options) -> tuple[str, dict]:
    """Which component of a pipeline is trained, "unet" or "refiner", and the arguments of its model, checked against
    what this script trains: models of images that return what they take. Sets options whose default depends on it."""
    source = args.init_from or args.model_config
    if args.init_from:
        index = DFUPipeline.load_config(args.init_from)
        there = [part for part in MODELS if (index.get(part) or [None])[0]]
        part = args.component or there[0]
        if part not in there:
            raise ValueError(f"--init_from {args.init_from} has no {part}, only: {', '.join(there)}.")
        config = dict(MODELS[part].load_config(args.init_from, subfolder=part))
    else:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{source} must hold the arguments of a model, {{...}}, but holds {config!r:.80}.")
        parts = {model.__name__: part for part, model in MODELS.items()}
        name = config.get("_class_name", "DFUModel")
        if name not in parts:
            raise ValueError(f"{source} is of a {name}, but this script trains {' and '.join(parts)}.")
        part = parts[name]
    channels = config.get("in_channels", 3), config.get("out_channels", config.get("in_channels", 3))
    if channels[0] != channels[1] or channels[0] not in (1, 3):
        raise ValueError(
            f"{source}: this script trains models of grey or colour images that return "
            f"what they take, but here in_channels, out_channels = {channels}."
        )
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    height, width = max(args.resolutions + args.upsample_resolutions, key=math.prod)
    p_mean, p_std = NOISE_LEVELS[part]
    args.p_mean, args.p_std = p_mean if args.p_mean is None else args.p_mean, args.p_std or p_std
    if part == "refiner":
        _check_refiner(args, config, source)
        args.source_resolution = args.source_resolution or (height, width)
        coarse = min(map(min, args.resolutions)) // 2
        return part, config | {"coarse_size": coarse, "sample_size": round(math.sqrt(height * width))}
    config |= {"in_channels": channels[0], "sample_size": height if height == width else (height, width)}
    several = args.source_resolution and len(args.resolutions) > 1  # a trunk of pictures of several shapes
    return part, config | {"coarse_sizes": args.resolutions if several else None}


def _check_refiner(args: Options, config: dict, source: str) -> None:
    given = [name for name in NOT_FOR_REFINERS if vars(args)[name]]
    if given:
        raise ValueError(f"--{given[0]} is for a DFUModel, but {source} is of a DFURefiner: leave it out.")
    if config.get("tileable"):
        raise ValueError(
            f"{source} has tileable={config['tileable']!r}, but refiners are trained on pictures with edges: leave it "
            f"out, pipelines take `tileable` when they are called."
        )
    if min(map(min, args.resolutions)) < 2:
        raise ValueError("--resolutions of a refiner are at least 2 pixels a side, for a coarse picture has half.")


class Data:
    """What the options ask for: `train` (a data set, or a stream's table), `held_out` or None, their description."""

    def __init__(self, args: Options, channels: int, accelerator: Accelerator):
        self.args, self.held_out, self.class_names = args, None, None
        wanted = args.resolutions + args.upsample_resolutions
        self.sizes = sorted({source_size(size, args.resolutions, args.source_resolution) for size in wanted})
        self.is_stream, self.images = args.streaming, args.dataset_name or args.train_data_dir
        if not self.images:
            self._portraits(channels)
            return
        self.options = dict(
            mode="L" if channels == 1 else "RGB",
            image_column=args.image_column,
            label_column=args.label_column if args.class_conditional else None,
            small_images=args.small_images,
            min_size=tuple(map(max, zip(*self.sizes))),
        )
        self.crops = dict(random_crop=args.random_crop, random_flip=args.random_flip, seed=args.seed)
        # One process a machine unpacks, converts and resizes; the others then find it done.
        with accelerator.local_main_process_first():
            table = load_table(
                args.dataset_name, args.dataset_config_name, args.dataset_split, args.streaming, args.train_data_dir
            )
            self._stream(table) if self.is_stream else self._table(table)
        self.description = f"{self.images}" + (", streamed" if self.is_stream else f", fingerprint {self.fingerprint}")

    def _portraits(self, channels: int) -> None:
        args = self.args
        if channels != 3:
            raise ValueError(f"The portraits have 3 channels, but the model has {channels}.")
        self.train = PortraitDataset(1_000_000, seed=args.seed)
        if args.num_validation_images:
            self.held_out = PortraitDataset(args.num_validation_images, seed=args.seed + HELD_OUT_PORTRAITS)
        self.fingerprint, self.description = f"portraits-{args.seed}", f"procedural portraits, seed {args.seed}"

    def _table(self, table) -> None:
        args = self.args
        self.train = ImageDataset(table, **self.options, **self.crops)
        if args.cache_dir and not args.dry_run:
            cache = build_cache(self.train, self.sizes, args.cache_dir, args.num_workers)
            self.train = ImageDataset(table, **self.options, **self.crops, cache=cache)
        self.class_names, self.fingerprint = self.train.class_names, self.train.fingerprint
        if held_out := min(args.num_validation_images, len(self.train) // 10):
            self.train, self.held_out = self.train.split(held_out, args.seed)

    def _stream(self, table) -> None:
        args = self.args
        self.class_names = ImageStream(table, [], **self.options).class_names  # which checks the columns, too
        if args.class_conditional and not self.class_names:
            raise ValueError(f"The stream does not say how many classes {args.label_column!r} has: leave --streaming.")
        self.fingerprint = None  # not known before all of it was read
        if args.num_validation_images:
            table = table.shuffle(args.seed)  # classes often come one after another
            rows = list(table.take(args.num_validation_images))
            self.held_out = ImageDataset(datasets.Dataset.from_list(rows, features=table.features), **self.options)
            table = table.skip(len(rows))
        if next(iter(table), None) is None:
            raise ValueError(f"{self.images} holds no image to train on: lower --num_validation_images, or add some.")
        self.train = table

    def facts(self) -> dict:
        """What run.json holds."""
        return {"description": self.description, "fingerprint": self.fingerprint, "class_names": self.class_names}

    def __str__(self) -> str:
        return self.description if self.is_stream else f"{self.description}, {self.length:,} images"

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    @property
    def length(self) -> int | None:
        """Number of training images; None for a stream."""
        return None if self.is_stream else len(self.train)

    def detail_law(self) -> dict[str, float]:
        """`detail_std` and `detail_exponent` of a refiner, measured on the largest pictures that are loaded."""
        images = self.held_out if self.is_stream else self.train
        if images is None:
            raise ValueError("A stream is measured by its held-out images: give `detail_std`, or hold some out.")
        largest = max(self.sizes, key=math.prod)
        items = images.__getitems__([(i, largest) for i in range(min(len(images), MEASURED_IMAGES))])
        try:
            std, exponent = detail_law(torch.stack([item["image"] for item in items]))
        except ValueError as error:
            raise ValueError(
                f"{self.images}: {error}. Take larger originals, or give `detail_std` in the model configuration."
            ) from error
        return {"detail_std": round(std, 4), "detail_exponent": round(exponent, 3)}

    def loader(self, sampler: MixedResolutionBatchSampler, pin_memory: bool) -> DataLoader:
        """This process's micro-batches, in the sampler's order whatever the number of workers."""
        args, data = self.args, dict(batch_sampler=sampler)
        images = self.train
        if self.is_stream:
            images, data = ImageStream(self.train, sampler, **self.options, **self.crops), dict(batch_size=None)
        return DataLoader(
            images, **data, num_workers=args.num_workers, worker_init_fn=ignore_signals, pin_memory=pin_memory
        )


def build_sampler(
    args: Options, length: int | None, start: int, accelerator: Accelerator
) -> MixedResolutionBatchSampler:
    """This process's share of each step from `start` on; `length` is that of the data."""
    return MixedResolutionBatchSampler(
        length, args.batch_size, args.resolutions, args.resolution_weights, args.upsample_resolutions,
        args.upsample_weight, args.max_pixels_per_batch, args.max_train_steps, start, args.seed,
        accelerator.process_index, accelerator.num_processes, args.source_resolution,
    )  # fmt: skip


def build_network(
    args: Options, part: str, config: dict, data: Data, checkpoint: Path | None
) -> DFUModel | DFURefiner:
    """A new network, the one to fine-tune, or with a checkpoint one that takes its weights; for a dry run one without
    contents."""
    if part == "refiner":
        config = _complete_detail(config, data, checkpoint)
    with torch.device("meta") if args.dry_run and not args.init_from else contextlib.nullcontext():
        network = _build_unet(args, config, data.num_classes) if part == "unet" else _build_refiner(args, config)
    if checkpoint:
        check_architecture(checkpoint, network)
    if args.freeze:
        freeze(network, args.freeze)
    if args.gradient_checkpointing and not args.dry_run:
        network.enable_gradient_checkpointing(**({"levels": args.checkpointed_levels} if part == "unet" else {}))
    if args.torch_compile and not args.dry_run:
        network.compile_repeated_blocks()
    return network


def _complete_detail(config: dict, data: Data, checkpoint: Path | None) -> dict:
    """The configuration of a refiner with the law of its detail: that given, or of the checkpoint, or measured."""
    names = "detail_std", "detail_exponent"
    config = {name: value for name, value in config.items() if name not in names or value is not None}
    if "detail_std" in config:
        return config
    if "detail_exponent" in config:
        raise ValueError(
            f"The model configuration has `detail_exponent` {config['detail_exponent']!r}, but no `detail_std`: give "
            "both, or none to have them measured."
        )
    saved = read_object(checkpoint / "config.json") if checkpoint else {}
    saved = {name: saved[name] for name in names if name in saved}
    return config | (saved or data.detail_law())  # a checkpoint perhaps saw other images


def _build_unet(args: Options, config: dict, num_classes: int | None) -> DFUModel:
    """A new model for the data's classes and augmentation, or the one to fine-tune, which must fit them."""
    if num_classes and args.label_dropout:
        num_classes += 1  # the last one means no class
    wanted = {"num_class_embeds": num_classes, "num_augment_labels": config.get("num_augment_labels", 0)}
    if args.augment_probability:
        wanted["num_augment_labels"] = GeometricAugment.num_labels
    for name, value in wanted.items():
        given = config.get(name)
        if (args.init_from or given) and (given or None) != (value or None):
            raise ValueError(
                f"{args.init_from or args.model_config} has {name}={given}, but with --class_conditional "
                f"{args.class_conditional}, --label_dropout {args.label_dropout} and --augment_probability "
                f"{args.augment_probability} it must be {value}."
            )
    if not args.init_from:
        return DFUModel.from_config(config | wanted)
    model = DFUPipeline.from_pretrained(args.init_from).unet.float().train()
    if args.spectral_rank:
        model = model.factorized(args.spectral_rank)
    model.register_to_config(sample_size=config["sample_size"], coarse_sizes=config["coarse_sizes"])
    return model


def _build_refiner(args: Options, config: dict) -> DFURefiner:
    """A new refiner, or the one to fine-tune."""
    if not args.init_from:
        return DFURefiner.from_config(config)
    model = DFURefiner.from_pretrained(args.init_from, subfolder="refiner", use_safetensors=True).float().train()
    model.register_to_config(sample_size=config["sample_size"], coarse_size=config["coarse_size"])
    return model


def build_scheduler(args: Options) -> EDMHeunScheduler:
    """The scalings of the network: a pipeline to fine-tune brings its own."""
    if args.init_from:
        return EDMHeunScheduler.from_pretrained(args.init_from, subfolder="scheduler")
    return EDMHeunScheduler()


def build_loss(args: Options, part: str, model, scalings, num_classes: int | None) -> TrainingLoss | OctaveLoss:
    """The loss of a prepared model around which there are these scalings."""
    noise = dict(seed=args.seed, p_mean=args.p_mean, p_std=args.p_std)
    if part == "refiner":
        return OctaveLoss(model, scalings, **noise)
    augment = GeometricAugment(args.augment_probability) if args.augment_probability else None
    return TrainingLoss(
        model, scalings, **noise, augment=augment, label_dropout=args.label_dropout, no_class=num_classes
    )


def build_validation(args: Options, part: str, scalings, held_out) -> ValidationLoss | None:
    """The loss on held-out images; None without any."""
    if held_out is None:
        return None
    options = dict(seed=args.seed, p_mean=args.p_mean, p_std=args.p_std, source_resolution=args.source_resolution)
    loss = OctaveValidationLoss if part == "refiner" else ValidationLoss
    return loss(held_out, args.resolutions, scalings, **options)


def build_scalings(scheduler: EDMHeunScheduler, network: DFUModel | DFURefiner) -> EDMHeunScheduler | Callable:
    """The scalings around the network: those of a refiner are for the deviation of its detail at each size."""
    return octave_scalings(network.config, scheduler) if isinstance(network, DFURefiner) else scheduler


def build_optimizer(args: Options, network) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam over the parameters that train (frozen ones cost no memory), and the schedule of its learning rate, which
    stays unprepared: Accelerate would step it once for each process, and our steps count the global batch."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=args.learning_rate)
    warmup, steps = -(-args.lr_warmup_images // args.batch_size), args.max_train_steps
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, None, warmup, steps)


def set_learning_rate(lr_scheduler, optimizer, step: int, rate: float) -> None:
    """Put the schedule of this run's options at a step; the checkpoint's came with the optimizer."""
    lr_scheduler.last_epoch = step
    lr_scheduler.base_lrs = [rate for _ in lr_scheduler.base_lrs]
    for group, scale in zip(optimizer.param_groups, lr_scheduler.lr_lambdas):
        group["initial_lr"], group["lr"] = rate, rate * scale(step)


def build_average(args: Options, accelerator: Accelerator, model) -> WeightAverage:
    """The average of a prepared model's weights, which the pipeline gets."""
    make = functools.partial(
        HalfLifeEMA, batch_size=args.batch_size, halflife_images=args.ema_halflife_images,
        rampup_ratio=args.ema_rampup_ratio,
    )  # fmt: skip
    return WeightAverage(accelerator, model, make)

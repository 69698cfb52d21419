# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the options of a training run ask for: data, network, scalings, optimizer, averages."""

import functools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from .. import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from ..data.cache import build_cache
from ..data.dataset import ImageDataset
from ..data.folders import load_table
from ..data.portraits import PortraitDataset
from ..data.resolutions import MixedResolutionBatchSampler, source_size
from ..data.streams import ImageStream, ignore_signals
from .augment import GeometricAugment
from .ema import HalfLifeEMA, PowerEMA
from .losses import detail_std, fit_size

HELD_OUT_PORTRAITS = 10_001  # added to --seed: the series of portraits that validation looks at
MODELS = {"unet": DFUModel, "refiner": DFURefiner}  # by the component of the pipeline that they are
NOISE_LEVELS = {"unet": (-1.2, 1.2), "refiner": (-2.3, 1.4)}  # mean and deviation of ln sigma
NOT_FOR_REFINERS = (
    "class_conditional", "label_dropout", "augment_probability", "upsample_resolutions", "freeze", "spectral_rank",
    "checkpointed_levels", "sigma_data", "push_to_hub",
)  # fmt: skip
MEASURED_IMAGES = 128  # from which the deviation of detail is measured


def load_config(args) -> tuple[str, dict]:
    """Which component of a pipeline is trained, "unet" or "refiner", and the arguments of its model, checked against
    what this script trains: models of images that return what they take."""
    source = args.init_from or args.model_config
    if args.init_from:
        index = DFUPipeline.load_config(args.init_from)
        part = "unet" if (index.get("unet") or [None])[0] else "refiner"
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
    if part == "refiner":
        _check_refiner(args, config, source)
        coarse = min(map(min, args.resolutions)) // 2
        return part, config | {"coarse_size": coarse, "sample_size": round(math.sqrt(height * width))}
    return part, config | {"in_channels": channels[0], "sample_size": height if height == width else (height, width)}


def _check_refiner(args, config: dict, source: str) -> None:
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

    def __init__(self, args, channels: int, accelerator: Accelerator):
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
        options = self.options | dict(random_crop=args.random_crop, random_flip=args.random_flip, seed=args.seed)
        self.train = ImageDataset(table, **options)
        if args.cache_dir and not args.dry_run:
            cache = build_cache(self.train, self.sizes, args.cache_dir, args.num_workers)
            self.train = ImageDataset(table, **options, cache=cache)
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

    def __str__(self) -> str:
        return self.description if self.is_stream else f"{self.description}, {self.length:,} images"

    @property
    def num_classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    @property
    def length(self) -> int | None:
        """Number of training images; None for a stream."""
        return None if self.is_stream else len(self.train)

    def detail_std(self) -> float:
        """The deviation of the octaves' detail, over the resolutions as they are drawn."""
        images, args = self.held_out if self.is_stream else self.train, self.args
        if images is None:
            raise ValueError("A stream is measured by its held-out images: give `detail_std`, or hold some out.")
        powers = []
        for size in args.resolutions:
            source = source_size(size, args.resolutions, args.source_resolution)
            items = images.__getitems__([(i, source) for i in range(min(len(images), MEASURED_IMAGES))])
            powers.append(detail_std(fit_size(torch.stack([item["image"] for item in items]), size)) ** 2)
        return round(math.sqrt(np.average(powers, weights=args.resolution_weights)), 4)

    def loader(self, sampler: MixedResolutionBatchSampler, pin_memory: bool) -> DataLoader:
        """This process's micro-batches, in the sampler's order whatever the number of workers."""
        args, data = self.args, dict(batch_sampler=sampler)
        images = self.train
        if self.is_stream:
            crops = dict(random_crop=args.random_crop, random_flip=args.random_flip, seed=args.seed)
            images, data = ImageStream(self.train, sampler, **self.options, **crops), dict(batch_size=None)
        return DataLoader(
            images, **data, num_workers=args.num_workers, worker_init_fn=ignore_signals, pin_memory=pin_memory
        )


def build_unet(args, config: dict, num_classes: int | None) -> DFUModel:
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
    model.register_to_config(sample_size=config["sample_size"])
    return model


def build_refiner(args, config: dict) -> DFURefiner:
    """A new refiner, or the one to fine-tune."""
    if not args.init_from:
        return DFURefiner.from_config(config)
    model = DFURefiner.from_pretrained(args.init_from, subfolder="refiner", use_safetensors=True).float().train()
    model.register_to_config(sample_size=config["sample_size"], coarse_size=config["coarse_size"])
    return model


def build_scheduler(args) -> EDMHeunScheduler:
    """The scalings of the network: a pipeline to fine-tune brings its own."""
    if not args.init_from:
        return EDMHeunScheduler(sigma_data=args.sigma_data or 0.5)
    scheduler = EDMHeunScheduler.from_pretrained(args.init_from, subfolder="scheduler")
    if args.sigma_data not in (None, scheduler.config.sigma_data):
        raise ValueError(
            f"{args.init_from} was trained with sigma_data={scheduler.config.sigma_data}, not {args.sigma_data}: "
            f"leave out --sigma_data."
        )
    return scheduler


def build_optimizer(args, model) -> torch.optim.Optimizer:
    """Over the parameters that train: frozen ones cost no memory here."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.learning_rate)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ValueError(f"--optimizer adam8bit needs bitsandbytes ({error}): pip install bitsandbytes.") from error
    return Adam8bit(parameters, lr=args.learning_rate)


def average_rules(args) -> dict:
    """How to make each average of the weights: "ema" is what the pipeline gets, the others leave snapshots."""

    def halflife(parameters):
        return HalfLifeEMA(parameters, args.batch_size, args.ema_halflife_images, args.ema_rampup_ratio)

    power = {f"power-{width}": functools.partial(PowerEMA, sigma_rel=width) for width in args.power_ema}
    return {"ema": halflife, **power}

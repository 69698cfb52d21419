# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The Dual-FNO UNet (DFU): a denoiser for every height and width.

Havrilla, Rojas, Liao, Tao, "DFU: scale-robust diffusion model for zero-shot super-resolution image generation",
arXiv 2401.06144. Each layer joins a 3x3 convolution, fixed in pixels, with a Fourier layer (Li et al., arXiv
2010.08895), fixed in cycles per image; around them stands the DDPM++ UNet of EDM (Karras et al., arXiv 2206.00364).
"""

import numbers
import re
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..checks import INTEGERS, check_tileable
from .layers import NEAR_ZERO, DFUBlock, DualConv2d, _check_conv_type, _group_norm, _init_linear, _norm_silu
from .loading import SafetensorsMixin
from .lora import LoRAMixin
from .spectral import Boundary, SpectralConv2d, _is_integer, _parse_boundary, _parse_modes, _parse_rank


class DFUModel(SafetensorsMixin, ModelMixin, ConfigMixin, LoRAMixin):
    """Dual-FNO UNet: takes a noisy image of any height and width >= 1 and returns the network output F of EDM.

    A drop-in for `diffusers.UNet2DModel`. Each level halves both sides, rounding up; the decoder restores the exact
    sizes. Non-square images are functions on the same unit square: modes count cycles per image on each axis.
    The defaults are the FFHQ model of arXiv 2401.06144 without augmentation labels (630.6 M parameters, 569 M of them
    spectral); smaller presets are in `examples/configs`.

    LoRA (needs PEFT): `add_adapter(LoraConfig(target_modules=["qkv", "proj", "skip", "spatial"], target_parameters=
    ["spectral.weight"]))` reaches the attention, the 1x1, 3x3 and spectral convolutions; for the latter PEFT has
    neither dropout nor DoRA, and such an adapter must be fused before `torch.compile` or `torch.export`.

    Args:
        sample_size: height and width, or one integer for both, that pipelines generate by default.
        in_channels, out_channels: channels of the image.
        block_out_channels: channels of each level, finest first; the first is even and at least 4.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        fourier_modes: for each level (rows, columns) of modes, see `SpectralConv2d`, an int k for (k, k + 1), or None
            for no spectral path. Modes that a grid cannot resolve are left out there.
        conv_type: "dual"; "spatial" leaves out every spectral path (the paper's UNet baseline), "spectral" every 3x3
            convolution (its FNO-UNet baseline; each level needs modes).
        attention_levels: levels with self-attention in their encoder blocks and their last decoder block. The middle
            block always has it.
        dropout: probability in [0, 1) of zeroing a feature before a block's second convolution, while training.
        norm_num_groups: upper limit of the groups of a GroupNorm; a group has at least four channels.
        norm_eps: epsilon of the GroupNorms.
        num_class_embeds: number of classes, or None for an unconditional model.
        num_augment_labels: number of augmentation labels (EDM's non-leaking augmentation has 9); they are zero in
            sampling.
        spectral_boundary: "periodic" (waves continue at the opposite edge), "mirror" (waves are reflected), or a pair
            of them for (rows, columns). With "mirror" modes count half cycles per image, see `SpectralConv2d`.
        tileable: axes along which the 3x3 convolutions see the opposite edge instead of zeros, for images that tile
            the plane: "x" (left and right edges meet), "y", "xy" or None. A call can override it.
        spectral_rank: None for a full matrix in each Fourier mode. A number in (0, 1) mixes that share of the channels
            in each mode, between two factors that all modes share, see `SpectralConv2d`: the spectral weights shrink
            with its square. `factorized` converts a trained model.
        coarse_sizes: grids (height, width) at which it was trained to draw the start of octaves, if there are several:
            a pipeline with a refiner takes the one whose aspect ratio is nearest to the picture's. None: `sample_size`
            for every picture.

    Raises:
        ValueError: an argument out of its range, or lists of levels that do not fit together.

    >>> model = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> model(torch.randn(2, 3, 13, 7), timestep=-0.5).sample.shape
    torch.Size([2, 3, 13, 7])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DFUBlock", "DualConv2d"]
    _repeated_blocks = ["DFUBlock"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 96,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        fourier_modes: tuple[int | tuple[int, int] | None, ...] = ((16, 9), (8, 5), (4, 3), None),
        conv_type: Literal["dual", "spatial", "spectral"] = "dual",
        attention_levels: tuple[int, ...] = (2,),
        dropout: float = 0.1,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        num_class_embeds: int | None = None,
        num_augment_labels: int = 0,
        spectral_boundary: Boundary = "periodic",
        tileable: Literal["x", "y", "xy"] | None = None,
        spectral_rank: float | None = None,
        coarse_sizes: tuple[tuple[int, int], ...] | None = None,
    ):
        super().__init__()
        self._check_config()
        channels, levels = block_out_channels, range(len(block_out_channels))
        noise_channels, embedding_channels = channels[0], 4 * channels[0]

        def conv(in_channels, out_channels, init_scale=1.0):
            return DualConv2d(
                in_channels, out_channels, fourier_modes[0], conv_type, init_scale, spectral_boundary, spectral_rank
            )

        def block(in_channels, level, out_channels=None, resample=None, attention=False):
            return DFUBlock(
                in_channels, out_channels or channels[level], embedding_channels, fourier_modes[level], conv_type,
                level, resample, attention, dropout, norm_num_groups, norm_eps, spectral_boundary, spectral_rank,
            )  # fmt: skip

        # 1. embedding of noise level and labels
        self.class_embedding = nn.Embedding(num_class_embeds, noise_channels) if num_class_embeds else None
        self.augment_embedding = None
        if num_augment_labels:
            self.augment_embedding = _init_linear(nn.Linear(num_augment_labels, noise_channels, bias=False))
        self.embedding_in = _init_linear(nn.Linear(noise_channels, embedding_channels))
        self.embedding_out = _init_linear(nn.Linear(embedding_channels, embedding_channels))

        # 2. encoder: every block leaves a skip connection of `skips[-1]` channels
        self.conv_in = conv(in_channels, channels[0])
        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level in levels:
            if level > 0:
                self.down_blocks.append(block(skips[-1], level, out_channels=skips[-1], resample="down"))
                skips.append(skips[-1])
            for _ in range(layers_per_block):
                self.down_blocks.append(block(skips[-1], level, attention=level in attention_levels))
                skips.append(channels[level])

        # 3. middle
        current = channels[-1]
        self.mid_blocks = nn.ModuleList(block(current, levels[-1], attention=attention) for attention in (True, False))

        # 4. decoder: every block but the upsampling ones takes one skip connection
        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            if level < levels[-1]:
                self.up_blocks.append(block(current, level + 1, resample="up"))
            for layer in range(layers_per_block + 1):
                attention = level in attention_levels and layer == layers_per_block
                self.up_blocks.append(block(current + skips.pop(), level, attention=attention))
                current = channels[level]

        # 5. output
        self.norm_out = _group_norm(current, norm_num_groups, norm_eps)
        self.conv_out = conv(current, out_channels, NEAR_ZERO)
        self.gradient_checkpointing, self._checkpointed_levels = False, tuple(levels)
        self._periodic_axes(tileable)  # raises if they do not fit the boundary

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        augment_labels: torch.Tensor | None = None,
        tileable: Literal["x", "y", "xy"] | None = None,
    ) -> UNet2DOutput | tuple:
        """Evaluate the network.

        Args:
            sample: (batch, in_channels, height, width), scaled by the scheduler (c_in of EDM).
            timestep: c_noise = ln(sigma) / 4, often negative, or the timestep of any other scheduler: a number, a
                scalar tensor or one value per image. Never rounded.
            class_labels: (batch,) integers in [0, num_class_embeds), for a class-conditional model.
            return_dict: return a `UNet2DOutput` rather than a tuple.
            augment_labels: (batch, num_augment_labels), None for zeros (an image that was not augmented).
            tileable: axes along which the image tiles the plane, in place of the config's. If all levels halve the
                size exactly, a shift of the input by whole pixels of the last level shifts the output by as much.

        Returns:
            `UNet2DOutput` with `sample` (batch, out_channels, height, width), or a tuple of it.

        Raises:
            TypeError: a sample that is not a floating point tensor, a timestep or labels of a wrong type.
            ValueError: a wrong number of dimensions or channels, missing, unexpected or out-of-range labels.
        """
        self._check_inputs(sample, timestep, class_labels, augment_labels)

        # 1. noise level and labels
        embedding = self._embed(sample, timestep, class_labels, augment_labels)
        periodic = self._periodic_axes(self.config.tileable if tileable is None else tileable)

        # 2. encoder
        sample = self.conv_in(sample.contiguous(memory_format=torch.channels_last), periodic=periodic)
        skips = [sample]
        for block in self.down_blocks:
            height, width = sample.shape[-2:]
            size = ((height + 1) // 2, (width + 1) // 2) if block.resample else (height, width)
            sample = self._run(block, sample, embedding, size, periodic)
            skips.append(sample)

        # 3. middle
        for block in self.mid_blocks:
            sample = self._run(block, sample, embedding, None, periodic)

        # 4. decoder
        for block in self.up_blocks:
            if not block.resample:  # rebound before the call, so that the parts are freed during it
                sample = torch.cat([sample, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if block.resample else None
            sample = self._run(block, sample, embedding, size, periodic)

        # 5. output
        sample = self.conv_out(_norm_silu(self.norm_out, sample), periodic=periodic).contiguous()
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func=None, levels: Iterable[int] | None = None
    ) -> None:
        """As in diffusers: blocks keep only their inputs, and run again in the backward pass.

        Args:
            gradient_checkpointing_func: in place of torch's.
            levels: only the blocks of these levels; None for all. Level 0, the full image, needs most memory.

        Raises:
            ValueError: no levels, or one that the model does not have.
        """
        there = range(len(self.config.block_out_channels))
        levels = tuple(there if levels is None else [levels] if _is_integer(levels) else levels)
        if not levels or not all(level in there for level in levels):
            raise ValueError(f"This model has the levels 0 to {there[-1]}, but got levels={levels}.")
        super().enable_gradient_checkpointing(gradient_checkpointing_func)
        self._checkpointed_levels = levels

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type, ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """As in diffusers, and also for the spectral weights: diffusers casts only torch's own layers."""
        compute_dtype = compute_dtype or self.dtype
        super().enable_layerwise_casting(
            storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, non_blocking
        )
        skipped = (*self._skip_layerwise_casting_patterns, *(skip_modules_pattern or ()))
        for name, module in self.named_modules():
            kept = any(re.search(pattern, name) for pattern in skipped)
            kept = kept or isinstance(module, skip_modules_classes or ())
            if isinstance(module, SpectralConv2d) and not kept:
                apply_layerwise_casting(module, storage_dtype, compute_dtype, None, None, non_blocking)

    def factorized(self, spectral_rank: float) -> "DFUModel":
        """A smaller model that approximates this one, to be trained further. The weights of the Fourier layers are
        factorised by `SpectralConv2d.factorized`, the others copied. All parameters are trainable, and gradient
        checkpointing is off.

        Raises:
            ValueError: a rank outside (0, 1), a model that is factorised already, has no spectral path, or adapters.

        >>> model = DFUModel(block_out_channels=(32, 32), fourier_modes=(5, None), attention_levels=())
        >>> [round(m.num_parameters() / 1e6, 2) for m in (model, model.factorized(0.4))]
        [3.49, 1.14]
        """
        if not any(isinstance(module, SpectralConv2d) for module in self.modules()):
            raise ValueError("This model has no spectral weights that could be factorised.")
        if getattr(self, "peft_config", None):
            raise ValueError("This model has LoRA adapters: fuse them and unload them, or delete them, first.")
        with torch.device("meta"):
            model = self.from_config(self.config, spectral_rank=spectral_rank)
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, SpectralConv2d):
                layer = module.factorized(spectral_rank).state_dict()
                state |= {f"{name}.{key}": value for key, value in layer.items()}
        model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
        return model.train(self.training)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Regional compilation: as in diffusers, one graph for each kind of block (channels and size).

        A UNet has more kinds than torch allows graphs for one piece of code by default, so this raises that limit
        (`torch._dynamo.config.recompile_limit`) to four for each block: room for several image sizes.
        """
        blocks = sum(isinstance(module, DFUBlock) for module in self.modules())
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 4 * blocks)
        super().compile_repeated_blocks(*args, **kwargs)

    def _periodic_axes(self, tileable: str | None) -> tuple[bool, bool]:
        """Whether rows and columns are periodic, from the names of the axes."""
        check_tileable(tileable)
        periodic = tuple(axis in (tileable or "") for axis in "yx")
        boundary = _parse_boundary(self.config.spectral_boundary)
        if any(joined and kind == "mirror" for joined, kind in zip(periodic, boundary)):
            raise ValueError(
                f"`tileable={tileable!r}` joins edges that this model's spectral_boundary="
                f"{self.config.spectral_boundary!r} (rows, columns) keeps apart: it takes a model whose boundary is "
                f"'periodic' along these axes."
            )
        return periodic

    def _run(self, block: DFUBlock, *args) -> torch.Tensor:
        if self.gradient_checkpointing and block.level in self._checkpointed_levels and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _embed(self, sample, timestep, class_labels, augment_labels) -> torch.Tensor:
        """Embedding (batch, 4 * block_out_channels[0]) of noise level and labels."""
        timestep = torch.as_tensor(timestep, device=sample.device).to(torch.float32).expand(sample.shape[0])
        channels = self.config.block_out_channels[0]
        embedding = get_timestep_embedding(timestep, channels, flip_sin_to_cos=True).to(sample.dtype)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels.long()).to(sample.dtype)
        if self.augment_embedding is not None:
            if augment_labels is None:  # zeros, and with them a gradient of zero: DDP waits for one of every parameter
                augment_labels = embedding.new_zeros(len(embedding), self.config.num_augment_labels)
            embedding = embedding + self.augment_embedding(augment_labels.to(sample.dtype))
        return F.silu(self.embedding_out(F.silu(self.embedding_in(embedding))))

    def _check_config(self) -> None:
        config = self.config
        channels, modes = config.block_out_channels, config.fourier_modes
        for name in ("block_out_channels", "fourier_modes", "attention_levels"):
            if not isinstance(config[name], (list, tuple)):
                raise ValueError(f"{name} must be a list or tuple, but got {config[name]!r}.")
        if not channels or not all(_is_integer(n) and n >= 1 for n in channels) or channels[0] < 4 or channels[0] % 2:
            raise ValueError(
                f"block_out_channels must be positive integers, one per level, the first even and at least 4, "
                f"but got {channels}."
            )
        if len(modes) != len(channels):
            raise ValueError(
                f"fourier_modes must have one entry, (rows, columns), int or None, for each of the {len(channels)} "
                f"levels of block_out_channels={channels}, but got {modes}."
            )
        sides = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
        if not _is_size(sides):
            raise ValueError(
                f"sample_size must be a positive integer or (height, width), but got {config.sample_size!r}."
            )
        coarse = config.coarse_sizes
        if coarse is not None and not (isinstance(coarse, (list, tuple)) and coarse and all(map(_is_size, coarse))):
            raise ValueError(f"coarse_sizes must be a list of (height, width), or None, but got {coarse!r}.")
        _check_conv_type(config.conv_type)
        _parse_boundary(config.spectral_boundary)
        _parse_rank(config.spectral_rank)
        for level, entry in enumerate(modes):
            if entry is not None:
                _parse_modes(entry)
            elif config.conv_type == "spectral":
                raise ValueError(
                    f"conv_type='spectral' needs Fourier modes on every level, but fourier_modes[{level}] is None. "
                    f"Give it modes, or use conv_type='dual', where such a level keeps its 3x3 convolutions."
                )
        if not all(level in range(len(channels)) for level in config.attention_levels):
            raise ValueError(
                f"attention_levels must be indices of levels, from 0 to {len(channels) - 1}, but got "
                f"{config.attention_levels}."
            )
        if not isinstance(config.dropout, (int, float)) or not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), but got {config.dropout!r}.")
        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "num_augment_labels"):
            lowest = 0 if name == "num_augment_labels" else 1
            if not _is_integer(config[name]) or config[name] < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, but got {config[name]!r}.")
        if not isinstance(config.norm_eps, (int, float)) or not config.norm_eps > 0:
            raise ValueError(f"norm_eps must be a positive number, but got {config.norm_eps!r}.")
        classes = config.num_class_embeds
        if classes is not None and (not _is_integer(classes) or classes < 1):
            raise ValueError(f"num_class_embeds must be a positive integer or None, but got {classes!r}.")

    def _check_inputs(self, sample, timestep, class_labels, augment_labels) -> None:
        if not torch.is_tensor(sample) or not sample.is_floating_point():
            got = sample.dtype if torch.is_tensor(sample) else type(sample).__name__
            raise TypeError(f"`sample` must be a floating point tensor, but got {got}.")
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or 0 in sample.shape:
            raise ValueError(
                f"`sample` must have shape (batch, {self.config.in_channels}, height, width) without empty "
                f"dimensions, as in_channels={self.config.in_channels}, but got {tuple(sample.shape)}."
            )
        if not torch.is_tensor(timestep) and not isinstance(timestep, numbers.Real):
            raise TypeError(f"`timestep` must be a number or a tensor, but got {type(timestep).__name__}.")
        if torch.is_tensor(timestep) and tuple(timestep.shape) not in ((), (1,), (sample.shape[0],)):
            raise ValueError(
                f"`timestep` must be a number, a scalar tensor or one value for each of the {sample.shape[0]} images, "
                f"but got shape {tuple(timestep.shape)}."
            )
        for name, labels in (("class_labels", class_labels), ("augment_labels", augment_labels)):
            if labels is not None and not torch.is_tensor(labels):
                raise TypeError(f"`{name}` must be a tensor (or None), not {type(labels).__name__}.")
        self._check_labels(sample.shape[0], class_labels)
        expected = (sample.shape[0], self.config.num_augment_labels)
        if augment_labels is not None and tuple(augment_labels.shape) != expected:
            raise ValueError(
                f"`augment_labels` must have shape (batch, num_augment_labels) = {expected}, but got "
                f"{tuple(augment_labels.shape)}."
            )

    def _check_labels(self, batch: int, class_labels) -> None:
        classes = self.config.num_class_embeds
        if classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given to an unconditional model (num_class_embeds is None).")
            return
        if class_labels is None:
            raise ValueError(f"This model is class-conditional: give `class_labels`, integers in [0, {classes}).")
        if tuple(class_labels.shape) != (batch,) or class_labels.dtype not in INTEGERS:
            raise ValueError(
                f"`class_labels` must be {batch} integers, one per image, but got shape {tuple(class_labels.shape)} "
                f"and dtype {class_labels.dtype}."
            )
        # Looking at values on an accelerator would stop the queue; there the pipeline checks them once.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            if class_labels.min() < 0 or class_labels.max() >= classes:
                raise ValueError(f"`class_labels` must lie in [0, {classes}), but got {class_labels.tolist()}.")


def _is_size(sides) -> bool:
    return isinstance(sides, (list, tuple)) and len(sides) == 2 and all(_is_integer(n) and n >= 1 for n in sides)

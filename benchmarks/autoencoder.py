"""Our autoencoder beside diffusers' `AutoencoderKL` of equal shape.

    python benchmarks/autoencoder.py [--rounds 7] [--out FILE]

Encoding and decoding alternate between the two within a round (A B A B ...); a ratio is taken within a round. Both get
float32 tensors and give float32 tensors, at their defaults (ours is laid out channels-last when it is loaded).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from against_peer import alternate

from transfuse.autoencoders import AutoencoderConfig, ImageAutoencoder, load_autoencoder, save_autoencoder
from transfuse.devices import keep_freed_memory

SHAPES = {
    "f4, widths 16-32-96, 8 x 64 px": (AutoencoderConfig(widths=(16, 32, 96), blocks=1, groups=8), 8, 64),
    "f8, widths 32-64-128-128, 2 x 128 px": (AutoencoderConfig(widths=(32, 64, 128, 128)), 2, 128),
}


def against_diffusers(config: AutoencoderConfig, count: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Ratios by round: diffusers' seconds over ours."""
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(Path(folder), ImageAutoencoder(config).initialise(0), "benchmark")
        ours = load_autoencoder(Path(folder))
        theirs = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    assert isinstance(ours, ImageAutoencoder)
    x = torch.rand(count, 3, size, size) * 2 - 1
    z = torch.randn(count, config.latent_channels, size // config.factor, size // config.factor)

    def run(call: Callable[[], object]) -> None:
        with torch.inference_mode():
            call()

    last = torch.channels_last
    work = {
        "encode": {
            "theirs": lambda: run(lambda: theirs.encode(x)),
            "ours": lambda: run(lambda: ours.moments(x.contiguous(memory_format=last))),
        },
        "decode": {
            "theirs": lambda: run(lambda: theirs.decode(z)),
            "ours": lambda: run(lambda: ours.reconstruct(z.contiguous(memory_format=last))),
        },
    }
    found = {}
    for name, contenders in work.items():
        readings = alternate(contenders, rounds)
        found[name] = [a.wall / b.wall for a, b in zip(readings["theirs"], readings["ours"], strict=True)]
    return found


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, (config, count, size) in SHAPES.items():
        for what, ratios in against_diffusers(config, count, size, arguments.rounds).items():
            middle = statistics.median(ratios)
            print(f"{name}: {what:<8} {middle:.2f} times diffusers' rate ({min(ratios):.2f} to {max(ratios):.2f})")
            report[f"{name}, {what}"] = {"ratio": middle, "ratios": ratios}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

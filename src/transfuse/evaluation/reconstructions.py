"""What a model's autoencoder keeps of pictures, without the model.

PSNR, SSIM, and the Fréchet distance of reconstructions from the pictures themselves ("rFD", with FID's network rFID).
`transfuse autoencoder inspect` shows more of an autoencoder by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .bench import EvalContext, Metric
from .confidence import bootstrap
from .distances import (
    LEAST,
    RECOGNISER,
    all_features,
    check_features,
    distance_name,
    features_name,
    frechet,
    open_features,
)
from .generate import Made, Task
from .pairs import bench_pairs, check_pairs
from .reconstruction import BEST_PSNR, psnr, ssim
from .result import Example, MetricResult, Result

SHOWN = 12


def _check(bench: EvalContext) -> None:
    check_pairs(bench, "autoencoder", LEAST)
    check_features(bench.options.features)


def _titles(network: str) -> tuple[str, str, str]:
    return "PSNR in dB", "SSIM", distance_name(network, "rFID", "rFD")


def _score(bench: EvalContext) -> MetricResult:
    pairs, autoencoder = bench_pairs(bench), bench.pipe.exported.autoencoder

    def work(numbers: Sequence[int]) -> list[Made]:
        pictures = np.stack([pairs.picture(n) for n in numbers])
        rebuilt = autoencoder.decode(autoencoder.encode(pictures))
        scores = zip(psnr(pictures, rebuilt), ssim(pictures, rebuilt), rebuilt, strict=True)
        return [Made({"psnr": float(a), "ssim": float(b)}, image) for a, b, image in scores]

    label = pairs.whole_label
    task = Task("reconstructions", {"data": label}, len(pairs.ids), work)
    made = bench.make(task)
    name = bench.options.features
    sees = open_features(name, bench.recogniser() if name == RECOGNISER else None, bench.device)
    count = len(pairs.ids)
    distance = frechet(all_features(sees, made.image, count), all_features(sees, pairs.picture, count))
    said = f"{bench.version}, autoencoder {autoencoder.name}@{autoencoder.fingerprint}"
    columns = {key: [record[key] for record in made.records] for key in ("psnr", "ssim")}
    seen = f"{said}, features {sees.name}@{sees.digest}"
    titles = _titles(sees.name)
    results = [
        Result.of(titles[0], bootstrap(columns["psnr"]), "higher", said, label, ceiling=BEST_PSNR),
        Result.of(titles[1], bootstrap(columns["ssim"]), "higher", said, label, ceiling=1.0),
        Result.of(titles[2], distance, "lower", seen, label, ceiling=0.0),
    ]
    worst = np.argsort(columns["psnr"], kind="stable")[:SHOWN].tolist()
    title = f"The {len(worst)} with the lowest PSNR of {count:,} pictures"
    exhibits = [
        Example(
            f"{columns['psnr'][n]:.1f} dB",
            [(pairs.picture(n), "original"), (made.image(n), "comes back")],
            group=title,
        )
        for n in worst
    ]
    return MetricResult(results, exhibits)


ABOUT = "PSNR, SSIM and Fréchet distance of reconstructions"
AUTOENCODER = Metric(
    "autoencoder",
    ABOUT,
    _check,
    _score,
    lambda bench: _titles(features_name(bench.options.features)),
    compared="Reference: the picture itself.",
)

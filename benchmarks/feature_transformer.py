# SPDX-License-Identifier: Apache-2.0

"""Two predictions of a cell's features from the cells around it: FeatureInpainting's regressions, InTra's transformer.

``python -m benchmarks.feature_transformer --root DATA --categories screw --weights tf_efficientnet_b4.safetensors``

Both see the same features in windows of 7 x 7 cells. The transformer is InTra's network with a cell for a patch and
channels for colours; it is trained by the squared error, in one cycle within ``--minutes``. Beside them stands the mean
of the place. What they miss is measured by its L2 norm and by the Mahalanobis distance. "missed" is the mean squared
residual of the good test images, in units of what the mean of the place leaves. Prints tables and writes them as
JSON, of which what is there is not measured again.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anomalib_recon.models.feature_inpainting.context_regression import ContextRegression
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.intra.windows import draw_windows
from anomalib_recon.training.schedule import one_cycle_factor
from benchmarks.rows import Rows
from benchmarks.untrained import BATCH_SIZE, add_features, load_scaled, measure_distances

SEED = 0
WINDOW_SIZE = 7
# of the 49 cells of a window in training, and the windows of a step
TRAIN_COVERED = 12
WINDOWS_PER_STEP = 128
WEIGHT_DECAY = 0.05


def fit_regressions(features: Tensor, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """The defaults of FeatureInpainting."""
    del args
    regression = ContextRegression(
        features.shape[1], context_dim=64, window_size=WINDOW_SIZE, hole_size=1, rank=128, num_units=1024
    )
    regression.fit(features.split(BATCH_SIZE))
    return regression


def train_transformer(features: Tensor, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(SEED)
    _, num_channels, rows, columns = features.shape
    network = InTraModel(
        (rows, columns), patch_size=1, window_size=WINDOW_SIZE, embed_dim=args.embed_dim, depth=args.depth, num_heads=4,
        readout="token", sigmoid=False, covered_per_window=9, in_channels=num_channels,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=WEIGHT_DECAY)
    patches, generator = network.embed(features), torch.Generator().manual_seed(SEED)
    begun, seconds, steps = time.monotonic(), 60 * args.minutes, 0
    while (share := (time.monotonic() - begun) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = args.learning_rate * one_cycle_factor(share)
        images = torch.randint(len(patches), (WINDOWS_PER_STEP, 1), generator=generator)
        places, covered = draw_windows((rows, columns), WINDOW_SIZE, WINDOWS_PER_STEP, generator, TRAIN_COVERED)
        windows = patches[images, places]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network.inpaint(windows, places, covered)
        loss = (predicted - windows.gather(1, covered[:, :, None].expand_as(predicted))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    print(f"{steps} steps, loss {loss.item():.3f} after the last", flush=True)
    return lambda part: network.eval().reconstruct(network.embed(part)).mT.reshape(part.shape)


def zeros(features: Tensor, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    del features, args
    return torch.zeros_like


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_features(parser)
    parser.set_defaults(feature_scale="whiten")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--embed_dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=0.001)
    parser.add_argument("--output", type=Path, default=Path("results/feature_transformer"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    predictions = {
        "mean of the place": zeros,
        "regressions": fit_regressions,
        f"transformer, {args.minutes:g} min": train_transformer,
    }
    for category in args.categories:
        train, test, masks = load_scaled(category, args)
        place_mean = train.mean(dim=0)
        train, test = train - place_mean, test - place_mean
        good = ~masks.flatten(1).any(dim=1)
        rows = Rows(args.output / f"{category}.json", args)
        for name, fit in predictions.items():
            begun = time.monotonic()
            predict = fit(train, args)
            seconds = time.monotonic() - begun
            with torch.no_grad():
                normal, tested = (
                    torch.cat([part - predict(part) for part in features.split(BATCH_SIZE)])
                    for features in (train, test)
                )
            missed = float(tested[good].square().mean() / test[good].square().mean())
            measure_distances(name, normal, tested, masks, rows, args.top_fractions)
            rows.measure(f"{name}, fit", partial(dict, seconds=seconds, missed=missed))


if __name__ == "__main__":
    main()

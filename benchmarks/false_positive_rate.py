# SPDX-License-Identifier: Apache-2.0

"""False-positive rates asked for against those measured, on training images and on normal images held out of them.

``python -m benchmarks.false_positive_rate --config padim.yaml --output rates``, with a configuration as for
``anomalib train``, such as::

    model:
      class_path: anomalib.models.Padim
      init_args: {backbone: resnet18, pre_trained: false}
    data:
      class_path: anomalib_recon.data.DemoAD
      init_args: {category: grid}

Holds out a share of the normal training images, trains the model once on the rest, and scores both. Prints a Markdown
table and writes it to ``rates.md``, and the rates in between as a picture to ``rates.png``. The post-processor and the
validation split of the configuration are replaced.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from anomalib_recon.deploy.highest_scores import HighestScores
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
from anomalib_recon.training import normal_images, score_images

Scores = dict[str, list[torch.Tensor]]


def fit(config: Path, held_out: float, seed: int) -> tuple[Engine, AnomalibModule, AnomalibDataModule]:
    """Train on all normal training images but a share ``held_out``, which becomes the validation set."""
    engine, model, datamodule = Engine.from_config(config)
    datamodule.val_split_mode, datamodule.val_split_ratio, datamodule.seed = ValSplitMode.FROM_TRAIN, held_out, seed
    datamodule.prepare_data()
    datamodule.setup(TrainerFn.FITTING)
    model.post_processor = FalsePositiveRatePostProcessor()
    engine.fit(model, datamodule=datamodule)
    model.to(engine.trainer.strategy.root_device)
    return engine, model, datamodule


def raw_scores(engine: Engine, model: AnomalibModule, dataset: AnomalibDataset) -> Scores:
    """Raw scores and maps of the normal images of a dataset, batch by batch."""
    scores: Scores = {"image": [], "pixel": []}
    dataset = normal_images(dataset, model)
    for batch in score_images(engine.trainer, model, dataset):
        scores["image"].append(batch.pred_score.cpu())
        scores["pixel"].append(batch.anomaly_map.cpu())
    return scores


def measured_rates(training: list[torch.Tensor], other: list[torch.Tensor], asked: Sequence[float]) -> list[float]:
    """Share of the ``other`` scores above the thresholds that hold the asked rates on the training scores."""
    highest = HighestScores(max(asked), sum(map(len, training)))
    for batch in training:
        highest.update(batch.numpy())
    ordered: NDArray[np.float32] = np.sort(torch.cat([batch.flatten() for batch in other]).float().numpy())
    thresholds = np.array([highest.threshold(rate) for rate in asked], dtype=np.float32)
    return list(1 - np.searchsorted(ordered, thresholds, side="right") / len(ordered))


def table(training: Scores, held_out: Scores, asked: Sequence[float]) -> str:
    """Asked and measured rates in Markdown."""
    lines = ["| scores | asked | training images | held-out images |", "|---|---|---|---|"]
    for kind in training:
        columns = [measured_rates(training[kind], scores[kind], asked) for scores in (training, held_out)]
        counts = [sum(batch.numel() for batch in scores[kind]) for scores in (training, held_out)]
        lines.append(f"| {kind}s | | {counts[0]} | {counts[1]} |")
        lines += [f"| | {rate} | {seen:.6f} | {new:.6f} |" for rate, seen, new in zip(asked, *columns, strict=True)]
    return "\n".join(lines) + "\n"


def plot(training: Scores, held_out: Scores, asked: Sequence[float], path: Path) -> None:
    """Draw measured against asked rates, pixels and images side by side."""
    rates = np.geomspace(min(asked), max(asked), 50).tolist()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, kind in zip(axes, training, strict=True):
        for label, scores in (("training images", training), ("held-out images", held_out)):
            axis.loglog(rates, measured_rates(training[kind], scores[kind], rates), label=label)
        axis.loglog(rates, rates, "k:", label="asked")
        axis.set(title=f"{kind}s", xlabel="false-positive rate asked for", ylabel="measured")
        axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="anomalib's configuration of model and data")
    parser.add_argument("--held_out", type=float, default=0.3, help="share of the normal training images")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.005, 0.0005])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="path of the results, without ending")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)

    seed_everything(args.seed)
    engine, model, datamodule = fit(args.config, args.held_out, args.seed)
    training, held_out = (raw_scores(engine, model, part) for part in (datamodule.train_data, datamodule.val_data))
    text = table(training, held_out, args.rates)
    print(text)
    args.output.with_suffix(".md").write_text(text)
    plot(training, held_out, args.rates, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0

"""Train, test, export and run a small InTra on synthetic data, in minutes: ``python -m anomalib_recon.quickstart``.

The commands that do the work are ``anomalib train`` and ``anomalib export``; they are printed as they are run, so that
they can be run again with other data. Further arguments are passed on to ``anomalib train``, such as
``--data.category leather`` or ``--default_root_dir results/leather``.
"""

import contextlib
import io
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from anomalib.cli.cli import AnomalibCLI
from anomalib.deploy import OpenVINOInferencer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from anomalib_recon.config_files import config_path
from anomalib_recon.data import DemoAD
from anomalib_recon.experiments.compare.training_images import (
    oddest,
    score_training_images,
    short_names,
    training_picture,
)
from anomalib_recon.files import write_whole
from anomalib_recon.visualization import ReconstructionVisualizer

SEED = 0
ODDEST_SHOWN = 3


def run(*args: str, shows_output: bool = True) -> AnomalibCLI:
    """Print and run an ``anomalib`` command in this process."""
    print(f"\n$ anomalib {shlex.join(args)}", flush=True)
    with contextlib.nullcontext() if shows_output else contextlib.redirect_stdout(io.StringIO()):
        return AnomalibCLI(args)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what libraries say of themselves."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_of_each_type(folder: Path) -> Iterator[Path]:
    """The first test image of each type in MVTec AD's layout."""
    for kind in sorted(folder.iterdir()):
        yield from sorted(kind.glob("*.png"))[:1]


def predict_with_openvino(model: Path, images: Path, output: Path) -> None:
    """Score test images with an exported model, print the scores and save pictures.

    Args:
        model (Path): OpenVINO model, an ``.xml`` file.
        images (Path): Folder of test images, with a folder for each type.
        output (Path): Folder for the pictures.
    """
    # some CPUs would otherwise compute in bfloat16, which moves the scores
    inferencer = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": "f32"})
    visualizer = ReconstructionVisualizer()
    output.mkdir(parents=True, exist_ok=True)
    print(f"\n{'image':<28} score  anomalous")
    for path in first_of_each_type(images):
        prediction = inferencer.predict(path)
        name = f"{path.parent.name}/{path.name}"
        score, label = (np.asarray(field).item() for field in (prediction.pred_score, prediction.pred_label))
        print(f"{name:<28} {score:.3f}  {label}")
        picture = cast("Image.Image", visualizer.visualize(prediction))
        picture.save(output / name.replace("/", "_"))


def show_training_images(training: AnomalibCLI, output: Path) -> None:
    """Name the training images with the highest scores, and save a picture of them and of all scores.

    Args:
        training (AnomalibCLI): The training.
        output (Path): PNG file.
    """
    datamodule = training.datamodule
    scores = score_training_images(training.model, datamodule.train_data, datamodule.eval_batch_size)
    names = short_names(scores.paths)
    print(f"\n{'oddest training images':<28} raw score")
    for index in oddest(scores)[:ODDEST_SHOWN]:
        print(f"{names[index]:<28} {scores.scores[index]:.3g}")
    write_whole(output, training_picture(scores))


@quiet()
def main(args: Sequence[str] = ()) -> dict[str, float]:
    """Run the whole course of a model.

    Args:
        args (Sequence[str]): Further arguments of ``anomalib train``.

    Returns:
        dict[str, float]: Test metrics.

    Raises:
        ValueError: If an argument names another model or other data.
    """
    for name in ("--model", "--data"):
        if any(argument == name or argument.startswith(f"{name}=") for argument in args):
            msg = f"{name} cannot be chosen: the quickstart is InTra on synthetic data; use `anomalib train {name}`."
            raise ValueError(msg)
    start = time.monotonic()
    seed_everything(SEED)  # `anomalib train` reads an argument of this name and does nothing with it
    training = run("train", "--config", str(config_path("quickstart/intra.yaml")), *args)
    trainer = training.engine.trainer
    folder = Path(trainer.default_root_dir)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert isinstance(training.datamodule, DemoAD)

    training_images = folder / "training_images.png"
    show_training_images(training, training_images)
    export = ("export", "--model", "InTra", "--ckpt_path", checkpoint.best_model_path, "--export_type", "openvino")
    run(*export, "--export_root", str(folder), shows_output=False)  # torch's exporter prints its steps
    exported = folder / "weights" / "openvino" / "model.xml"
    datamodule = training.datamodule
    predict_with_openvino(exported, datamodule.root / datamodule.category / "test", folder / "openvino_images")

    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")
    for name, value in metrics.items():
        print(f"{name:<16} {value:.3f}")
    print(f"training images  {training_images}")
    print(f"pictures         {folder / 'images'}\ncheckpoint       {checkpoint.best_model_path}")
    print(f"OpenVINO model   {exported}\nits pictures     {folder / 'openvino_images'}")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])

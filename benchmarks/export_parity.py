# SPDX-License-Identifier: Apache-2.0

"""By how much exports of anomalib's models differ from their checkpoints, with and without this package's parts.

Trains PatchCore, PaDiM and Dinomaly with random weights on synthetic images, and prints two tables: differences of the
exports; and AUROC by anomalib's evaluator and by ours, and good test images called anomalous with anomalib's thresholds
and with those from the training images at a false-positive rate.
"""

import argparse
import logging
from pathlib import Path
from unittest import mock

import pandas as pd
import timm
from anomalib.engine import Engine
from anomalib.models import Dinomaly, Padim, Patchcore
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_recon.data import DemoAD
from anomalib_recon.deploy import ExportedModel, find_images, find_thresholds, read_image, set_thresholds
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.parity import export, find_difference, load_model, predict

# of these sizes the one is a multiple of Dinomaly's patches; torch exports PatchCore at the other alone
SIZES = {"Patchcore": (128, 128), "Padim": (112, 112), "Dinomaly": (112, 112)}
IMAGE_FPR = 0.05
MODELS = {
    "Patchcore": (Patchcore, {"backbone": "resnet18", "pre_trained": False, "coreset_sampling_ratio": 0.02}, {}),
    "Padim": (Padim, {"backbone": "resnet18", "pre_trained": False}, {}),
    "Dinomaly": (Dinomaly, {"encoder_name": "vit_small_patch14_reg4_dinov2"}, {"max_steps": 20}),
}


def train(name, folder, datamodule):
    """Train a model, and test it by anomalib's evaluator and by ours."""
    seed_everything(0)
    model_class, arguments, trainer = MODELS[name]
    normalize = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    pre_processor = PreProcessor(Compose([Resize(SIZES[name], antialias=True), normalize]))
    model = model_class(**arguments, pre_processor=pre_processor, visualizer=False)
    engine = Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **trainer)
    engine.fit(model, datamodule=datamodule)
    [theirs] = engine.test(model, datamodule=datamodule, verbose=False)
    model.evaluator = RawScoreEvaluator()
    [ours] = engine.test(model, datamodule=datamodule, verbose=False)
    accuracy = {
        f"{kind} AUROC, {by}": metrics[f"{kind}_AUROC"]
        for kind in ("image", "pixel")
        for by, metrics in (("anomalib's", theirs), ("raw scores", ours))
    }
    return Path(engine.trainer.checkpoint_callback.best_model_path), accuracy


def called_anomalous(exported, paths):
    """How many images an export calls anomalous."""
    return f"{sum(bool(exported(read_image(path)[None])['pred_label'].item()) for path in paths)} of {len(paths)}"


def compare(name, checkpoint, exact, folder, images):
    """Differences of the exports of a checkpoint, and the OpenVINO one."""
    model = load_model(name, checkpoint, exact)
    expected = predict(model, images)
    paths = export(model, folder)
    resize = "ours" if exact else "anomalib's"
    return paths[0], [
        {"model": name, "resize": resize, "export": path.suffix, **vars(find_difference(expected, ExportedModel(path)))}
        for path in paths
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.export_parity", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--output", type=Path, default=Path("results/export_parity"))
    options = parser.parse_args()
    logging.disable(logging.INFO)
    datamodule = DemoAD(root=options.output / "data")
    images = datamodule.root / datamodule.category
    differences, accuracies = [], []
    create = timm.create_model
    random_weights = mock.patch.object(
        timm, "create_model", lambda *args, **kw: create(*args, **kw | {"pretrained": False})
    )
    for name in options.models:
        folder = options.output / name
        with random_weights:
            checkpoint, accuracy = train(name, folder, datamodule)
            for exact in (False, True):
                path, rows = compare(name, checkpoint, exact, folder / str(exact), images / "test")
                differences += rows
        good, trained_on = find_images(images / "test" / "good"), find_images(images / "train" / "good")
        before = called_anomalous(ExportedModel(path), good)
        set_thresholds(path, find_thresholds(ExportedModel(path), trained_on, IMAGE_FPR))
        after = called_anomalous(ExportedModel(path), good)
        accuracies.append({"model": name, **accuracy, "good called anomalous": before, f"at {IMAGE_FPR}": after})
        print(pd.DataFrame(differences).to_markdown(index=False, floatfmt=".1e"), flush=True)
        print(pd.DataFrame(accuracies).to_markdown(index=False, floatfmt=".3f"), flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0

"""Resident memory and open files of a process while a model predicts thousands of images.

``python -m benchmarks.long_run --images 5000 --output long_run.json``

Each model is a small one with random weights; one image of 64 x 64 pixels is scored at a time, as ``anomalib predict``
does, and no prediction is kept. Linux only. Writes the figures as JSON and prints them.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch.callbacks import Callback

from anomalib_recon.files import write_whole
from benchmarks.feature_cache import write_pictures
from benchmarks.scale import MODELS, build

IMAGE_SIZE = 64


class Watch(Callback):
    """Notes resident memory in MiB and the number of open files, ten times in a run."""

    def __init__(self, num_images: int) -> None:
        self.interval = num_images // 10
        self.resident_mib: list[float] = []
        self.open_files: list[int] = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *args) -> None:
        if (batch_idx + 1) % self.interval == 0:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            resident = next(line for line in lines if line.startswith("VmRSS"))
            self.resident_mib.append(round(int(resident.split()[1]) / 1024, 1))
            self.open_files.append(len(list(Path("/proc/self/fd").iterdir())))


def copy_images(image: Path, folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        shutil.copy(image, folder / f"{index:05d}.png")
    return folder


def predict(model: AnomalibModule, images: Path, folder: Path) -> Watch:
    """Predict all images of a folder, each in a batch of its own."""
    watch = Watch(len(list(images.iterdir())))
    engine = Engine(
        default_root_dir=folder, callbacks=[watch], accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    engine.predict(model, data_path=images, return_predictions=False)
    return watch


def measure(name: str, num_images: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder / "picture", 1, IMAGE_SIZE)
        images = copy_images(folder / "picture" / "000.png", folder / "images", num_images)
        watch = predict(build(name, IMAGE_SIZE, "resnet18"), images, folder)
    return {
        "model": name,
        "images": num_images,
        "resident_mib": watch.resident_mib,
        "open_files": watch.open_files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--images", type=int, default=5000, help="at least 10")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(measure(name, arguments.images))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        write_whole(arguments.output, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()

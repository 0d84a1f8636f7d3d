# SPDX-License-Identifier: Apache-2.0

"""Training speed of InTra against that of the usual loop, and against the rate of a large matrix product.

``python -m benchmarks.intra_training --precision bf16-mixed --output intra_training.json``

The default network with 2 of its 13 blocks, which are alike, on pictures of noise, by anomalib's engine. The usual
loop, with a data set that decodes and resizes a file for each window, and with PyTorch's linear layers, and the matrix
products take their turns between the optimiser steps, so that the ratios hold on a machine whose speed drifts. Times
are CPU seconds of all threads by the number of threads: those of the clock, but for other work on the machine, and for
files decoded by as many processes. Writes the figures as JSON and prints them. With ``--depth 13``, a turn in fp32
takes a minute on two cores, and the usual loop 10 GB of memory.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import encode_png, write_file
from torchvision.transforms.v2 import Resize

from anomalib_recon.files import write_whole
from anomalib_recon.models import InTra
from anomalib_recon.models.intra.loss import InTraLoss
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.intra.windows import draw_windows
from benchmarks.intra_inference import MATRIX_SIZE, clock, seconds, with_usual_layers

NUM_PICTURES = 32
WINDOWS_PER_STEP = 256
WINDOWS_PER_IMAGE = 600


def write_pictures(folder: Path, side: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{index:03d}.png" for index in range(NUM_PICTURES)]
    for path in paths:
        write_file(str(path), encode_png(torch.randint(256, (3, side, side), dtype=torch.uint8)))
    return paths


class OneWindowOfEachFile(Dataset):
    """The usual data set: an item decodes and resizes its file, and cuts one window."""

    def __init__(self, paths: Sequence[Path], model: InTraModel) -> None:
        self.paths = paths
        self.model = model
        self.resize = Resize(model.image_size, antialias=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches ``(L * L, K * K * 3)``, their numbers ``(L * L,)``, and which is covered ``(1,)``."""
        image = self.resize(read_image(self.paths[index], as_tensor=True))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        places, covered = draw_windows(self.model.grid_size, self.model.window_size, 1, generator)
        return self.model.embed(image[None])[0, places[0]], places[0], covered[0]


class UsualLoop:
    """Steps on one window of each file, each timed in its two parts.

    Args:
        paths (Sequence[Path]): As many files as windows in a step.
        precision (str): That of the trainer.
        depth (int): Blocks of the network.
    """

    def __init__(self, paths: Sequence[Path], precision: str, depth: int) -> None:
        self.model = with_usual_layers(InTraModel(depth=depth))
        self.loss = InTraLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.autocast = precision == "bf16-mixed"
        self.loader = DataLoader(OneWindowOfEachFile(paths, self.model), len(paths))

    def load(self) -> None:
        (self.batch,) = self.loader

    def step(self) -> None:
        patches, places, covered = self.batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            inpainted = self.model.inpaint(patches, places, covered)
        original = patches[torch.arange(len(patches)), covered[:, 0]]
        loss = self.loss(self.model.pixels(original), self.model.pixels(inpainted))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Done(Exception):  # noqa: N818
    """All turns have been taken."""


class Turns(Callback):
    """Time optimiser steps, and other functions in between.

    Args:
        others (Sequence[Callable[[], object]]): Functions to be timed after each step.
        count (int): Turns.
    """

    def __init__(self, others: Sequence[Callable[[], object]], count: int) -> None:
        self.others = others
        self.count = count
        self.rows: list[tuple[float, ...]] = []

    def on_train_batch_start(self, *args) -> None:
        self.start = clock()

    # from after the backward pass of one step to there in the next one
    def on_before_optimizer_step(self, *args) -> None:
        step = clock() - self.start
        with torch.autocast("cpu", enabled=False):  # the trainer's
            self.rows.append((step, *map(seconds, self.others)))
        print("seconds:", *(f"{value:.2f}" for value in self.rows[-1]), flush=True)
        if len(self.rows) == self.count:
            raise Done
        self.start = clock()


def flops_per_step(depth: int) -> int:
    """Of the matrix products of a step; backward they are twice those of the forward pass."""
    model = InTraModel(depth=depth).to("meta")
    places, covered = model.places[:WINDOWS_PER_STEP], model.covered[:WINDOWS_PER_STEP]
    patches = model.embed(torch.empty(1, 3, *model.image_size, device="meta"))
    with FlopCounterMode(display=False) as counter:
        model.inpaint(patches[0, places], places, covered)
    return 3 * counter.get_total_flops()


def measure(precision: str, depth: int, threads: int, turns: int, side: int) -> dict[str, float | int | str]:
    torch.set_num_threads(threads)
    seed_everything(0)
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE)
    bfloat16 = matrix.bfloat16()
    with TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder) / "good", side)
        usual = UsualLoop(list(itertools.islice(itertools.cycle(paths), WINDOWS_PER_STEP)), precision, depth)
        callback = Turns([usual.load, usual.step, lambda: matrix @ matrix, lambda: bfloat16 @ bfloat16], turns)
        datamodule = Folder(
            name="noise", root=folder, normal_dir="good", normal_test_dir="good", train_batch_size=NUM_PICTURES,
            num_workers=0,
        )  # fmt: skip
        engine = Engine(
            default_root_dir=folder, accelerator="cpu", precision=precision, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with contextlib.suppress(Done):
            engine.fit(InTra(image_size=256, depth=depth), datamodule=datamodule)
    rows = callback.rows
    ours, load, step, fp32, bf16 = (statistics.median(column) for column in zip(*rows, strict=True))
    flops, product = flops_per_step(depth), 2 * MATRIX_SIZE**3
    return {
        "machine": f"{platform.machine()}, {threads} threads, torch {torch.__version__}",
        "precision": precision,
        "depth": depth,
        "windows_per_second": WINDOWS_PER_STEP / ours,
        "windows_per_second_of_the_usual_loop": WINDOWS_PER_STEP / (load + step),
        "speed_up": statistics.median((row[1] + row[2]) / row[0] for row in rows),
        "speed_up_without_decoding": statistics.median(row[2] / row[0] for row in rows),
        "gflops": flops / ours / 1e9,
        "fp32_matrix_product_gflops": product / fp32 / 1e9,
        "bf16_matrix_product_gflops": product / bf16 / 1e9,
        "share_of_fp32_rate": statistics.median(flops / row[0] / (product / row[3]) for row in rows),
        "share_of_bf16_rate": statistics.median(flops / row[0] / (product / row[4]) for row in rows),
        "ms_to_decode_an_image": 1e3 * load / WINDOWS_PER_STEP,
        # an image is decoded once an epoch
        "share_of_decoding": load / (load + WINDOWS_PER_IMAGE * ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["32", "bf16-mixed"], default="32")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--output", type=Path)
    args = vars(parser.parse_args())
    output = args.pop("output")
    text = json.dumps(measure(**args), indent=2)
    print(text)
    if output:
        write_whole(output, text.encode())


if __name__ == "__main__":
    main()

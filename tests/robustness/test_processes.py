# SPDX-License-Identifier: Apache-2.0

"""Two processes train, fit and test to the figures of one that sees the same halves of each batch."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anomalib.data import Batch, MVTecAD
from anomalib.models import AnomalibModule
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from anomalib_recon.models import InTra, PatchAE
from anomalib_recon.models.intra.augmentation import rotate_and_flip
from anomalib_recon.models.intra.windows import draw_windows
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
from tests.conftest import write_stripes
from tests.tiny_models import TINY, build, engine_in

# Processes draw dropout, defects and coresets of their own, so there are none. InTra's windows are drawn as in each.
# Features are kept in half precision, but not where one process sees the batches of two.
COMPARED = {
    "InTra": ("InTra", {}),
    "ADTR": ("ADTR", {"dropout": 0.0, "feature_cache_gib": 0}),
    "SAAE": ("SAAE", {"feature_cache_gib": 0}),
    "PatchAE": ("PatchAE", {"defect_probability": 0.0, "coreset_ratio": 1.0}),
    # thresholds of the training images, of which each process scores a part
    "SAAE without validation": (
        "SAAE",
        {"feature_cache_gib": 0, "post_processor": FalsePositiveRatePostProcessor(0.1, 0.2)},
    ),
}
RUNS = {
    **COMPARED,
    "ADTR, features kept": ("ADTR", {}),
    "SAAE, features kept": ("SAAE", {}),
    "InTra by its distance": ("InTra", {"distance": "mahalanobis"}),
}
LEARNING_RATE = {"InTra": 1.0, "ADTR": 1e-3, "SAAE": 1e-3, "PatchAE": 0.1}
# of the way that the weights have gone, of the spread of the bank, of thresholds, and of metrics. Sums of single
# precision in another order differ by 1e-7; steps and PatchAE's whitening have made up to 3e-5 of that.
TOLERANCE = 1e-4
EPOCHS = 2
# of a process: 11 images, of which one is there twice, are batches of 4 and 2 in each
BATCH_SIZE = 4
SCRIPT = """
import sys
from pathlib import Path
from anomalib.data import MVTecAD
from tests.robustness.test_processes import RUNS, build_for, data, train

root, folder = map(Path, sys.argv[1:])
for run in RUNS:
    train(build_for(run), data(MVTecAD, root, run), folder / run, devices=2, strategy="ddp")
"""


class Write(Callback):
    """Writes what a process starts with, and what it comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer, pl_module) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"start{trainer.global_rank}.pt")

    def on_test_start(self, trainer, pl_module) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")

    def on_test_end(self, trainer, pl_module) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(metrics))


def build_for(run: str) -> AnomalibModule:
    """The same model on every call, trained by gradient descent.

    A step of Adam is as long where a gradient is zero but for rounding (as those of biases before a normalisation or a
    softmax are) as elsewhere, and would make these few weights random ones.
    """
    name, arguments = RUNS[run]
    model = build(name, **arguments)

    def configure_optimizers() -> torch.optim.Optimizer:
        return torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), LEARNING_RATE[name])

    model.configure_optimizers = configure_optimizers
    seed_everything(0)  # as Lightning does when processes meet
    return model


def data(kind: type[MVTecAD], root: Path, run: str) -> MVTecAD:
    val_split_mode = "none" if run.endswith("without validation") else "same_as_test"
    sizes = {"train_batch_size": BATCH_SIZE, "eval_batch_size": 3, "num_workers": 0}
    return kind(root=root, category="stripes", val_split_mode=val_split_mode, **sizes)


def train(model: AnomalibModule, datamodule: MVTecAD, folder: Path, **trainer) -> None:
    # processes that make the same versioned folder at the same moment may fail in anomalib
    engine = engine_in(
        folder / f"results{os.environ.get('LOCAL_RANK', '0')}", max_epochs=EPOCHS, callbacks=[Write(folder)], **trainer
    )
    engine.train(model, datamodule=datamodule)


class BothShares(Sampler[int]):
    """Batch by batch, the images that the first of two processes draws, and those that the second does."""

    def __init__(self, dataset: Dataset) -> None:
        self.shares = [DistributedSampler(dataset, num_replicas=2, rank=rank) for rank in (0, 1)]

    def set_epoch(self, epoch: int) -> None:
        for share in self.shares:
            share.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        first, second = map(list, self.shares)
        for start in range(0, len(first), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            yield from first[part] + second[part]

    def __len__(self) -> int:
        return sum(map(len, self.shares))


class DataOfBoth(MVTecAD):
    """Gives one process the batches of two, joined."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_data,
            batch_size=2 * BATCH_SIZE,
            sampler=BothShares(self.train_data),
            collate_fn=self.train_data.collate_fn,
        )


def halves(batch: Batch) -> list[Batch]:
    items = list(batch)
    return [batch.collate(part) for part in (items[: len(items) // 2], items[len(items) // 2 :])]


def statistics_of(model: AnomalibModule) -> list[Tensor]:
    """What batch normalisation changes in a step."""
    trained = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d) and part.training]
    return [statistic for part in trained for statistic in (part.running_mean, part.running_var)]


def set_statistics(model: AnomalibModule, values: list[Tensor]) -> None:
    for statistic, value in zip(statistics_of(model), values, strict=True):
        statistic.data.copy_(value)  # the backward pass would take any other change for one of its inputs


def step_in_halves(model: AnomalibModule) -> None:
    """Let a model take its steps on the mean loss of both halves of a batch.

    Running statistics are those of the first half, with which processes begin their next step, and in the end the mean.
    """
    step = model.training_step

    def training_step(batch: Batch, *args) -> Tensor:
        losses, statistics = [], []
        before = [statistic.clone() for statistic in statistics_of(model)]
        for half in halves(batch):
            set_statistics(model, before)
            losses.append(step(half))
            statistics.append([statistic.clone() for statistic in statistics_of(model)])
        last = model.trainer.is_last_batch and model.current_epoch == EPOCHS - 1
        mean = [(first + second) / 2 for first, second in zip(*statistics, strict=True)]
        set_statistics(model, mean if last else statistics[0])
        return (losses[0] + losses[1]) / 2

    model.training_step = training_step


def step_with_windows_of_both(model: InTra) -> None:
    """Let InTra draw the windows of two processes, each from its half of a batch, and step on their mean loss."""

    def draw(images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        network = model.model
        patches = network.embed(rotate_and_flip(images, generator))
        places, covered = draw_windows(network.grid_size, network.window_size, len(index), generator)
        windows = patches[index[:, None], places]
        inpainted = network.inpaint(windows, places, covered)
        original = windows.gather(1, covered[:, :, None].expand_as(inpainted))
        return model.loss(network.pixels(original), network.pixels(inpainted))

    def training_step(batch: Batch, *args) -> None:
        seed = int(torch.randint(2**31, ()))
        generators = [torch.Generator().manual_seed(seed + rank) for rank in (0, 1)]
        shares = [half.image for half in halves(batch)]
        count = model.windows_per_image * max(map(len, shares))
        orders = [
            torch.randperm(count, generator=generator) % len(images)
            for images, generator in zip(shares, generators, strict=True)
        ]
        for indices in zip(*(order.split(model.windows_per_step // 2) for order in orders), strict=True):
            losses = [draw(*share) for share in zip(shares, indices, generators, strict=True)]
            model.optimizers().zero_grad()
            model.manual_backward(sum(losses) / 2)
            model.optimizers().step()

    model.training_step = training_step


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven training images."""
    return write_stripes(tmp_path_factory.mktemp("uneven"), num_train=11)


@pytest.fixture(scope="module")
def two_processes(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes have come to, for all models."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    project = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, folder / "script.py", uneven, folder],
        check=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    return folder


def read_state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def distance(state: dict[str, Tensor], other: dict[str, Tensor], keys: set[str]) -> float:
    return sum(float((state[key] - other[key]).square().sum()) for key in keys) ** 0.5


@pytest.mark.parametrize("run", COMPARED)
def test_two_processes_come_to_the_result_of_one(two_processes: Path, run: str, uneven: Path, tmp_path: Path) -> None:
    of_both = build_for(run)
    (step_with_windows_of_both if run == "InTra" else step_in_halves)(of_both)
    train(of_both, data(DataOfBoth, uneven, run), tmp_path)

    start = read_state(tmp_path / "start0.pt")
    one, two = read_state(tmp_path / "0.pt"), read_state(two_processes / run / "0.pt")
    assert one.keys() == two.keys()
    trained = {key for key, weight in of_both.named_parameters() if weight.requires_grad}
    thresholds = {key for key in one if key.startswith("post_processor.")}
    assert distance(one, two, trained) <= TOLERANCE * distance(one, start, trained)
    assert distance(one, two, thresholds) <= TOLERANCE * max(one[key] for key in thresholds)
    for key in one.keys() - trained - thresholds:
        if key == "model.bank.vectors":  # in another order, and shifted alike with what is compared with them
            vectors, others = (state[key] - state[key].mean(dim=0) for state in (one, two))
            assert others.shape == vectors.shape  # each image once
            distances = torch.cdist(vectors, others, compute_mode="donot_use_mm_for_euclid_dist")
            for nearest in (distances.amin(dim=0), distances.amin(dim=1)):
                assert nearest.max() <= TOLERANCE * vectors.std(dim=0).norm()
        elif one[key].is_floating_point():  # statistics, and what has been fitted
            assert distance(one, two, {key}) <= TOLERANCE * one[key].norm(), key
    metrics, others = (
        json.loads((folder / "0.json").read_text(encoding="utf-8")) for folder in (tmp_path, two_processes / run)
    )
    assert others == pytest.approx(metrics, abs=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_have_one_model(two_processes: Path, run: str) -> None:
    first, second = (read_state(two_processes / run / f"{rank}.pt") for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        assert value.isfinite().all(), key
    metrics, others = ((two_processes / run / f"{rank}.json").read_text(encoding="utf-8") for rank in (0, 1))
    assert metrics == others


def test_two_processes_train_from_the_command_line(uneven: Path, tmp_path: Path) -> None:
    arguments = [f"--model.{argument}={value}" for argument, value in TINY["PatchAE"].items()]
    trainer = [f"--trainer.{option}" for option in ("accelerator=cpu", "devices=2", "strategy=ddp", "max_epochs=1")]
    options = [f"--data.root={uneven}", "--data.category=stripes", "--data.num_workers=0"]
    command = Path(sys.executable).with_name("anomalib")
    output = subprocess.run(
        [command, "train", "--model=PatchAE", *arguments, "--data=MVTecAD", *options, *trainer],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    ).stdout
    assert output.count("pixel_AUPRO") == 1
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert PatchAE.load_from_checkpoint(checkpoint).model.bank.vectors.isfinite().all()

# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.files import write_whole
from anomalib_recon.models.intra import image_size

MODEL = {"patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2, "windows_per_image": 10}


def arguments(stripes: Path, output: Path, sizes: list[int]) -> list[str]:
    data = {"root": stripes, "category": "stripes", "num_workers": 0}
    return [
        *("--image_sizes", str(sizes), "--epochs", "2", "--output", str(output), "--data", "MVTecAD"),
        *(f"--data.{name}={value}" for name, value in data.items()),
        *(f"--model.{name}={value}" for name, value in MODEL.items()),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    ]


def test_loss_is_averaged_around_the_best_epoch() -> None:
    losses = [9.0] * 10 + [float(loss) for loss in (6, 5, 4, 3, 2, 1, 2, 3, 4, 5, 6)] + [9.0] * 10
    assert image_size.best_held_out_loss(losses) == pytest.approx(sum((6, 5, 4, 3, 2, 1, 2, 3, 4, 5, 6)) / 11)
    assert image_size.best_held_out_loss([3.0, 2.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("losses", "chosen", "compared"),
    [
        ((0.5, 0.4, 0.3), 96, [48, 64, 96]),
        ((0.5, 0.4, 0.39995), 64, [48, 64, 96]),
        ((0.5, 0.49995, 0.1), 48, [48, 64]),
        ((0.5, 0.6, 0.1), 48, [48, 64]),
        ((0.5, 0.4998, 0.4996), 96, [48, 64, 96]),
    ],
)
def test_the_next_size_is_taken_while_it_is_better(
    stripes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    losses: tuple[float, ...],
    chosen: int,
    compared: list[int],
) -> None:
    sizes = [48, 64, 96]
    for size, loss in zip(sizes, losses, strict=True):  # the results of runs that have finished
        write_whole(tmp_path / str(size) / "held_out_losses.json", json.dumps([loss]).encode())
    assert image_size.main(arguments(stripes, tmp_path, sizes)) == chosen
    table = capsys.readouterr().out.splitlines()[1:-1]
    assert [int(line.split()[0]) for line in table] == compared
    assert [line.split()[0] for line in table if "chosen" in line] == [str(chosen)]


def test_sizes_are_trained_once_and_the_config_is_ready(stripes: Path, tmp_path: Path) -> None:
    chosen = image_size.main(arguments(stripes, tmp_path, [48, 64]))
    result = tmp_path / "48" / "held_out_losses.json"
    losses = json.loads(result.read_text())
    assert len(losses) == 2

    cli = AnomalibCLI(["train", "--config", str(tmp_path / "intra.yaml")], run=False)
    assert cli.model.model.image_size == (chosen, chosen)
    assert cli.datamodule.category == "stripes"
    assert cli.config.train.trainer.accelerator == "cpu"

    result.unlink()  # as if the run had been killed just before it
    image_size.main(arguments(stripes, tmp_path, [48, 64]))
    assert json.loads(result.read_text()) == losses


def test_a_size_that_does_not_fit_is_refused_before_training(stripes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 60 x 60 and 8"):
        image_size.main(arguments(stripes, tmp_path, [48, 60]))
    assert not list(tmp_path.rglob("*.ckpt"))

# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.experiments import image_size

MODEL = {
    "patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2, "windows_per_image": 10,
    "held_out_fraction": 0.4,
}  # fmt: skip


def arguments(stripes: Path, output: Path, *sizes: int) -> list[str]:
    data = {"root": stripes, "category": "stripes", "num_workers": 0}
    return [
        *("--image_sizes", *map(str, sizes), "--epochs", "2", "--output", str(output), "--data", "MVTecAD"),
        *(f"--data.{name}={value}" for name, value in data.items()),
        *(f"--model.{name}={value}" for name, value in MODEL.items()),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    ]


def held_out_paths(folder: Path) -> list[str]:
    [checkpoint] = folder.rglob("model.ckpt")
    return torch.load(checkpoint, weights_only=False)["callbacks"]["HeldOutImages"]["paths"]


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
def test_the_next_size_is_taken_while_it_is_better(losses: tuple[float, ...], chosen: int, compared: list[int]) -> None:
    loss_of = dict(zip((48, 64, 96), losses, strict=True))
    assert image_size.choose([48, 64, 96], loss_of.__getitem__) == (chosen, {size: loss_of[size] for size in compared})


def test_sizes_are_trained_once_on_the_same_images_and_the_config_is_ready(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chosen = image_size.main(arguments(stripes, tmp_path, 48, 64))
    table = capsys.readouterr().out.splitlines()[-3:-1]
    assert [int(line.split()[0]) for line in table] == [48, 64]
    assert [line.split()[0] for line in table if "chosen" in line] == [str(chosen)]
    result = tmp_path / "48" / "result.json"
    losses = json.loads(result.read_text(encoding="utf-8"))["held_out_losses"]
    assert len(losses) == 2
    assert held_out_paths(tmp_path / "48") == held_out_paths(tmp_path / "64")

    cli = AnomalibCLI(["train", "--config", str(tmp_path / "intra.yaml")], run=False)
    assert cli.model.model.image_size == (chosen, chosen)
    assert cli.model.held_out_arguments[-1] == 50  # the patience of a training, not of the rule
    assert cli.datamodule.category == "stripes"
    assert cli.config.train.trainer.accelerator == "cpu"

    result.unlink()  # as if the run had been killed just before it
    before = (tmp_path / "64" / "result.json").stat().st_mtime_ns
    image_size.main(arguments(stripes, tmp_path, 48, 64))
    assert json.loads(result.read_text(encoding="utf-8"))["held_out_losses"] == losses
    assert (tmp_path / "64" / "result.json").stat().st_mtime_ns == before

    other_seed = ["--seed", "1", "--output", str(tmp_path / "other")]
    image_size.main([*arguments(stripes, tmp_path, 48), *other_seed])
    assert held_out_paths(tmp_path / "other" / "48") != held_out_paths(tmp_path / "48")


def test_a_result_of_other_settings_is_not_reused(stripes: Path, tmp_path: Path) -> None:
    given = arguments(stripes, tmp_path, 48)
    image_size.main(given)
    for path in tmp_path.rglob("*.ckpt"):  # a result alone counts, too
        path.unlink()
    for different, other in {
        "data": ["--data.category", "screw"],
        "model": ["--model.depth", "1"],
        "epochs": ["--epochs", "1"],
        "seed": ["--seed", "1"],
    }.items():
        message = rf"48 holds a run with other settings \({different}; see its settings.json\): choose another --output"
        with pytest.raises(ValueError, match=message):
            image_size.main([*given, *other])


def test_a_size_that_does_not_fit_is_refused_before_training(stripes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 60 x 60 and 8"):
        image_size.main(arguments(stripes, tmp_path, 48, 60))
    assert not list(tmp_path.rglob("*.ckpt"))

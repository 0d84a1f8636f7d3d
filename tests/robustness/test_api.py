# SPDX-License-Identifier: Apache-2.0

"""anomalib's ways to use a model, for each of ours: those of its engine and those of its command line."""

import re
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import PredictDataset
from anomalib.models import AnomalibModule, get_model, list_models

from anomalib_recon import models

from .conftest import TINY, build, checkpoint_of, data, engine_in

METRICS = {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO", "pixel_F1Score"}


def test_every_model_of_ours_is_in_the_list(name: str) -> None:
    assert isinstance(get_model(name, **TINY[name]), getattr(models, name))
    listed = {model.replace("_", "") for model in list_models()}
    assert {model.lower() for model in models.__all__} <= listed
    assert set(models.__all__) == set(TINY)


def test_fit_validate_test_and_predict(
    name: str, trained: tuple[AnomalibModule, str], stripes: Path, tmp_path: Path
) -> None:
    fitted, path = trained
    engine, model = engine_in(tmp_path), build(name)
    engine.validate(model, datamodule=data(stripes), ckpt_path=path)
    torch.testing.assert_close(model.post_processor.image_threshold, fitted.post_processor.image_threshold)
    [tested] = engine.test(model, datamodule=data(stripes), ckpt_path=path)
    assert tested.keys() == METRICS
    by_datamodule = engine.predict(model, datamodule=data(stripes), ckpt_path=path)
    by_dataset = engine.predict(model, dataset=PredictDataset(stripes / "stripes" / "test"), ckpt_path=path)
    scores = [
        {Path(image).name + Path(image).parent.name: score for batch in batches for image, score in zip(
            batch.image_path, batch.pred_score.tolist(), strict=True)}
        for batches in (by_datamodule, by_dataset)
    ]  # fmt: skip
    assert len(scores[0]) == 10
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def command(name: str, subcommand: str, *args: str | Path) -> AnomalibCLI:
    """Run ``anomalib`` in this process."""
    arguments = [f"--model.{argument}={value}" for argument, value in TINY[name].items()]
    return AnomalibCLI([subcommand, "--model", name, *arguments, *map(str, args)])


def test_command_line(name: str, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    options = ("--data=MVTecAD", f"--data.root={stripes}", "--data.category=stripes", "--data.num_workers=0")
    trained = command(name, "train", *options, *trainer)
    assert trained.engine.trainer.callback_metrics.keys() >= METRICS
    checkpoint = checkpoint_of(trained.engine)
    assert Path(checkpoint).is_relative_to(tmp_path)
    command(name, "predict", *trainer[1:], f"--data={stripes}/stripes/test/hole", f"--ckpt_path={checkpoint}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("learning_rate=-1", "learning_rate must be positive, got -1.0"),
        ("image_size=0", "image_size must be positive"),
    ],
)
def test_a_wrong_argument_on_the_command_line_is_named_on_a_line_of_its_own(
    name: str, argument: str, words: str
) -> None:
    # jsonargparse puts its own lines around ours
    with pytest.raises(ValueError, match=rf"(?m)^ *-? *{re.escape(words)}"):
        command(name, "train", "--data=DemoAD", f"--model.{argument}")

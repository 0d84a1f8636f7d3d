# SPDX-License-Identifier: Apache-2.0

"""The recommended arguments of PatchAE, trained, saved, exported and run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType

from anomalib_recon.config_files import read_config
from anomalib_recon.models import PatchAE
from tests.exports import expected_from, export, images_of, run
from tests.tiny_models import checkpoint_of, engine_in

SMALL = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False, "image_size": 64}


def recipe() -> dict:
    config = read_config("recommended/patch_ae.yaml")
    return {**config["model"]["init_args"], **SMALL, "coreset_ratio": 0.2, "visualizer": False}


@pytest.fixture(scope="module")
def checkpoints(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of two trainings that differ in their seed."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model, engine = PatchAE(**recipe()), engine_in(tmp_path_factory.mktemp("results"), max_epochs=1)
        torch.manual_seed(seed)
        data = MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)
        engine.fit(model, datamodule=data)
        found.append(checkpoint_of(engine))
    return found


def test_the_seed_has_no_influence_on_scores(checkpoints: list[str], stripes: Path) -> None:
    images = images_of(stripes, (64, 64))
    first, second = (expected_from(PatchAE.load_from_checkpoint(path).eval(), images) for path in checkpoints)
    assert np.ptp(first["pred_score"]) > 0.01
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_array_equal(first[name], second[name])


def test_holes_score_above_stripes_in_checkpoint_and_export(
    checkpoints: list[str], stripes: Path, tmp_path: Path
) -> None:
    model = PatchAE.load_from_checkpoint(checkpoints[0]).eval()
    images = images_of(stripes, (64, 64))
    expected = expected_from(model, images)
    assert expected["pred_score"][4:].min() > expected["pred_score"][:4].max()  # 4 good images come first
    result = run(export(model, tmp_path, ExportType.OPENVINO), images, 3)
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name].reshape(expected[name].shape), expected[name], atol=1e-3)

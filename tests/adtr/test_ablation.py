# SPDX-License-Identifier: Apache-2.0

"""The baselines of tables 4a and 4b: a CNN in place of the transformer, and pixels in place of features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from lightning import seed_everything
from torch import nn
from torchvision.models.resnet import BasicBlock

from anomalib_recon.models import ADTR
from anomalib_recon.models.adtr.torch_model import ADTRModel
from tests.exports import expected_from, export, images_of, run

SMALL = {
    "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": (64, 96),
    "feature_size": (8, 12), "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24,
}  # fmt: skip
PIXELS = {**SMALL, "backbone": "pixels", "layers": None, "feature_size": None}


def test_the_cnn_is_of_the_residual_blocks_of_resnet() -> None:
    torch.manual_seed(0)
    model = ADTRModel(**SMALL, reconstruction="cnn").train()
    blocks = nn.Sequential(*(BasicBlock(16, 16) for _ in range(2))).train()
    blocks.load_state_dict(model.cnn.state_dict())
    features = torch.rand(3, 192, 8, 12)
    torch.testing.assert_close(model.reconstruct(features), model.recover(blocks(model.reduce(features))))


def test_the_cnn_has_no_weight_that_is_not_trained() -> None:
    model = ADTRModel(**SMALL, reconstruction="cnn").train()
    features = model.embed(torch.rand(2, 3, 64, 96))
    (features - model.reconstruct(features)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [name for name, _ in model.named_parameters() if name.startswith("backbone.")]


def test_features_of_a_cell_are_its_pixels() -> None:
    images = torch.rand(2, 3, 64, 96)
    features = ADTRModel(**PIXELS).embed(images)
    assert features.shape == (2, 768, 4, 6)
    cells = images.reshape(2, 3, 4, 16, 6, 16).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 6, 768)
    assert torch.equal(features.permute(0, 2, 3, 1), cells)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({**SMALL, "reconstruction": "rnn"}, "^reconstruction must be 'transformer' or 'cnn', got 'rnn'"),
        ({**SMALL, "reconstruction": "cnn", "query": "encoder"}, "^query='encoder'.* with reconstruction='cnn'"),
        ({**SMALL, "reconstruction": "cnn", "attention": "concat"}, "attention='concat'.* with reconstruction='cnn'"),
        ({**SMALL, "reconstruction": "cnn", "hole_size": 3}, "hole_size=3 .* with reconstruction='cnn'"),
        ({**PIXELS, "layers": ["layer1"]}, r"^backbone='pixels' has neither layers .*, got layers=\['layer1'\]"),
        ({**PIXELS, "image_size": (64, 100)}, r"^image_size must be multiples of 16 with .*, got \(64, 100\)"),
        ({**PIXELS, "feature_size": 8}, "^feature_size must be one of 4 x 6, .* got 8"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADTRModel(**arguments)


@torch.no_grad()
def error_of(model: ADTR, images: np.ndarray) -> float:
    features = model.eval().model.embed(torch.from_numpy(images))
    return float((features - model.model.reconstruct(features)).square().mean())


@pytest.mark.parametrize("arguments", [{**SMALL, "reconstruction": "cnn"}, PIXELS], ids=["cnn", "pixels"])
def test_it_learns_and_its_export_scores_alike(arguments: dict, stripes: Path, tmp_path: Path) -> None:
    seed_everything(0)
    model = ADTR(**arguments, learning_rate=2e-3, pool_size=8, visualizer=False)
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=4, eval_batch_size=1, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, max_epochs=20, accelerator="cpu", enable_progress_bar=False)
    images = images_of(stripes, (64, 96))
    before = error_of(model, images)
    engine.fit(model, datamodule=datamodule)
    assert error_of(model, images) < before / 4

    loaded = ADTR.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()
    result, expected = run(export(loaded, tmp_path, ExportType.OPENVINO), images, 1), expected_from(loaded, images)
    assert np.abs(result["pred_score"].flatten() - expected["pred_score"].flatten()).max() < 1e-3

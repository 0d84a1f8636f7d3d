# SPDX-License-Identifier: Apache-2.0

"""The arguments that SAAE and ADTR share: scaled features, distances in units of normal residuals, one cycle.

ADTR has them beside attention with a hole.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import CompressionType, ExportType

from anomalib_recon.models import ADTR, SAAE
from tests.exports import expected_from, export, images_of, run
from tests.robustness.conftest import data
from tests.tiny_models import build, checkpoint_of, engine_in

RECIPE = {"feature_scale": "whiten", "distance": "mahalanobis", "top_fraction": 0.02, "use_one_cycle": True}
HOLE = {"feature_size": 8, "patch_size": 2, "hole_size": 1}
ARGUMENTS = {"SAAE": {**RECIPE, "latent_dim": 8}, "ADTR": {**RECIPE, **HOLE}}


@pytest.fixture(scope="module", params=ARGUMENTS)
def fitted(request: pytest.FixtureRequest, stripes: Path, tmp_path_factory: pytest.TempPathFactory):
    """A model after four epochs, the learning rates of its steps, and its checkpoint."""
    model = build(request.param, **ARGUMENTS[request.param])
    rates: list[float] = []
    model.on_train_batch_end = lambda *_: rates.append(model.optimizers().param_groups[0]["lr"])
    engine = engine_in(tmp_path_factory.mktemp("results"), max_epochs=4)
    engine.fit(model, datamodule=data(stripes))
    return model.eval(), rates, checkpoint_of(engine)


def test_what_is_rebuilt_is_white(fitted, stripes: Path) -> None:
    model, _, _ = fitted
    training = np.stack([np.asarray(item.image) for item in data_of(stripes)])
    features = model.model.embed(torch.from_numpy(training)).movedim(1, -1).flatten(0, 2).double()
    covariance = torch.cov(features.T)
    assert covariance.diagonal()[:8].sub(1).abs().max() < 0.05
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.01


def data_of(stripes: Path) -> list:
    datamodule = data(stripes)
    datamodule.setup("fit")
    return list(datamodule.train_data)


def test_normal_residuals_are_about_one_away(fitted, stripes: Path) -> None:
    model, _, _ = fitted
    training = torch.stack([torch.as_tensor(np.asarray(item.image)) for item in data_of(stripes)])
    with torch.no_grad():
        features = model.model.embed(training)
        distances = model.model.anomaly_map_generator.mahalanobis(features, model.model.reconstruct(features))
    # below one, as few images leave much of the covariance to that of all places, and some is added
    assert 0.5 < distances.square().mean() < 1


def test_the_learning_rate_rises_and_falls(fitted) -> None:
    model, rates, _ = fitted
    assert len(rates) == 12
    highest = rates.index(max(rates))
    assert 0 < highest < 8
    assert rates[-1] < model.learning_rate / 20
    assert max(rates) <= model.learning_rate


def test_checkpoint_and_exports_hold_the_distance(fitted, stripes: Path, tmp_path: Path) -> None:
    model, _, checkpoint = fitted
    loaded = type(model).load_from_checkpoint(checkpoint).eval()
    images = images_of(stripes, (64, 64))
    expected = expected_from(model, images)
    torch.testing.assert_close(expected_from(loaded, images), expected, rtol=1e-5, atol=1e-5)
    for compression, bound in ((None, 1e-3), (CompressionType.INT8, 0.1)):
        path = export(
            loaded, tmp_path / str(compression), ExportType.OPENVINO, compression_type=compression,
            datamodule=data(stripes),
        )  # fmt: skip
        np.testing.assert_allclose(run(path, images, 5)["anomaly_map"], expected["anomaly_map"], atol=bound)


@pytest.mark.parametrize("scale", ["stage", "channel"])
@pytest.mark.parametrize(("name", "arguments"), [("SAAE", {"latent_dim": 8}), ("ADTR", {}), ("PatchAE", {})])
def test_a_scale_is_fitted_saved_and_used(
    name: str, arguments: dict, scale: str, stripes: Path, tmp_path: Path
) -> None:
    model, engine = build(name, **arguments, feature_scale=scale), engine_in(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=data(stripes))
    loaded = type(model).load_from_checkpoint(checkpoint_of(engine)).eval()
    images = torch.stack([torch.as_tensor(np.asarray(item.image)) for item in data_of(stripes)])
    with torch.no_grad():
        features = loaded.start_features(ImageBatch(image=images))
        scaled = loaded.model.scale(features).movedim(1, 0).flatten(1)
    parts = scaled.split(loaded.model.scale.num_channels) if scale == "stage" else [scaled]
    variances = [part.var(dim=1).mean() if scale == "stage" else part.var(dim=1).median() for part in parts]
    torch.testing.assert_close(torch.stack(variances), torch.ones(len(parts)), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("model_class", "arguments", "message"),
    [
        (SAAE, {"distance": "cosine"}, r"^distance must be 'norm', 'mse' or 'mahalanobis', got 'cosine'"),
        (SAAE, {"top_fraction": 1.5}, r"^top_fraction must be from 0 to 1, got 1\.5"),
        (SAAE, {"feature_scale": "all"}, r"^feature_scale must be 'none', 'stage', 'channel' or 'whiten', got 'all'"),
        (ADTR, {"distance": "mse"}, r"^distance must be 'norm' or 'mahalanobis', got 'mse'"),
    ],
)
def test_wrong_values_are_refused(model_class: type[SAAE | ADTR], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_class(backbone="resnet18", pre_trained=False, image_size=64, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ADTR", {"distance": "mahalanobis"}),
        ("SAAE", {"latent_dim": 8, "feature_scale": "stage"}),
        ("PatchAE", {}),
        ("FeatureInpainting", {}),
    ],
)
def test_what_needs_normal_images_needs_a_datamodule(name: str, arguments: dict, stripes: Path, tmp_path: Path) -> None:
    datamodule = data(stripes)
    datamodule.setup("fit")
    loaders = {"train_dataloaders": datamodule.train_dataloader(), "val_dataloaders": datamodule.val_dataloader()}
    with pytest.raises(ValueError, match=f"^{name}, with these arguments, takes statistics .* pass a datamodule"):
        engine_in(tmp_path).fit(build(name, **arguments), **loaders)

# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import NamedTuple

import pytest
from anomalib.models import AnomalibModule, Padim

from anomalib_recon.post_processing import FalsePositiveRatePostProcessor, RawScoreExport
from anomalib_recon.pre_processing import ExactResizePreProcessor
from tests.conftest import export_all
from tests.tiny_models import OWN_SIZE, Probe, Trained, build, checkpoint_of, demo_data, engine_in

IMAGE_FPR, PIXEL_FPR = 0.2, 0.01


class RawPadim(RawScoreExport, Padim):
    """A built-in model with our export and our resize, also when it is loaded from a checkpoint."""

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> ExactResizePreProcessor:
        return ExactResizePreProcessor(Padim.configure_pre_processor(image_size or OWN_SIZE).transform)


class Exported(NamedTuple):
    """A trained model and its exports, by the ending of their files."""

    model: AnomalibModule
    checkpoint: str
    files: dict[str, Path]


def build_padim() -> RawPadim:
    return RawPadim(backbone="resnet18", layers=["layer1"], n_features=16, pre_trained=False, visualizer=False)


@pytest.fixture(scope="session")
def saae() -> AnomalibModule:
    return build("SAAE", post_processor=FalsePositiveRatePostProcessor(PIXEL_FPR, IMAGE_FPR))


@pytest.fixture(scope="session", params=["SAAE", "Padim"])
def exported_model(
    request: pytest.FixtureRequest, saae: AnomalibModule, demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """A model of ours, with thresholds from normal images, and one of anomalib's, with its thresholds."""
    folder = tmp_path_factory.mktemp(request.param)
    model, engine = saae if request.param == "SAAE" else build_padim(), engine_in(folder)
    engine.fit(model, datamodule=demo_data(demo))
    trained = Trained(model.eval(), checkpoint_of(engine), Probe())
    paths = export_all(trained, folder)
    return Exported(trained.model, trained.checkpoint, {path.suffix: path for path in paths.values()})


@pytest.fixture(scope="session")
def good(demo: Path) -> Path:
    """Folder of the normal training images."""
    datamodule = demo_data(demo)
    return datamodule.root / datamodule.category / "train" / "good"


@pytest.fixture(params=[".onnx", ".xml"])
def path(request: pytest.FixtureRequest, exported_model: Exported) -> Path:
    """Each of the exports in turn."""
    if request.param == ".onnx":
        pytest.importorskip("onnxruntime")
    return exported_model.files[request.param]

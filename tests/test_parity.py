# SPDX-License-Identifier: Apache-2.0

"""The command that compares a checkpoint with its exports."""

import re
from pathlib import Path

import numpy as np
import pytest
from anomalib.cli.cli import AnomalibCLI
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_recon import parity
from tests.tiny_models import checkpoint_of, demo_data, engine_in


@pytest.fixture(scope="module")
def padim(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a built-in model, whose images are resized to a quarter."""
    resize = [Resize((64, 64), antialias=True), Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
    model = Padim(
        backbone="resnet18", layers=["layer1"], n_features=16, pre_trained=False,
        pre_processor=PreProcessor(Compose(resize)), visualizer=False,
    )  # fmt: skip
    engine = engine_in(tmp_path_factory.mktemp("padim"))
    engine.fit(model, datamodule=demo_data(demo))
    return checkpoint_of(engine)


def results(printed: str) -> list[str]:
    """What the table says of each export."""
    return re.findall(r"^\| (?:OpenVINO|ONNX) .*\| (\w+) +\|$", printed, re.MULTILINE)


def test_a_built_in_model_keeps_its_scores_with_our_resize(
    padim: str, demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = demo_data(demo).root / "grid" / "test"
    assert parity.main(["--model", "Padim", "--ckpt", padim, "--data", str(images), "--exact_resize"]) == 0
    printed = capsys.readouterr().out
    assert "Padim, 14 images" in printed
    assert set(results(printed)) == {"yes"}


def test_bounds_decide(padim: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = demo_data(demo).root / "grid" / "test" / "good"
    path = parity.load_model("Padim", Path(padim)).to_openvino(tmp_path)
    arguments = ["--model", "Padim", "--ckpt", padim, "--data", str(images), "--exports", str(path)]
    assert parity.main(arguments) == 1  # anomalib's resize in the export is another
    assert parity.main([*arguments, "--score_bound", "1", "--map_bound", "1"]) == 0
    assert parity.main([*arguments, "--score_bound", "1e-9", "--map_bound", "1"]) == 1
    assert parity.main([*arguments, "--score_bound", "1", "--map_bound", "1e-9"]) == 1
    assert results(capsys.readouterr().out) == ["NO", "yes", "NO", "NO"]
    # the command line still finds one class of this name
    data = ["--data", "Folder", "--data.name", "grid", "--data.normal_dir", str(images)]
    model = AnomalibCLI(["fit", "--model", "Padim", "--model.pre_trained", "false", *data], run=False).model
    assert type(model) is Padim


def test_an_export_without_numbers_breaks_every_bound(demo: Path) -> None:
    [path] = sorted((demo_data(demo).root / "grid" / "test" / "good").iterdir())[:1]
    values = {"pred_score": np.array(0.03), "anomaly_map": np.full((1, 8, 8), 0.02)}
    expected = {path: values | {"anomaly_map": np.linspace(0, 2, 64).reshape(1, 8, 8)}}

    def differs(**outputs: np.ndarray) -> parity.Difference:
        exported = {**expected[path], **outputs}
        return parity.find_difference(expected, lambda images: {key: value[None] for key, value in exported.items()})

    assert differs().score == differs().map == 0
    assert differs(pred_score=np.array(np.nan)).score == np.inf
    assert differs(anomaly_map=np.full((1, 8, 8), np.nan)).map == np.inf
    # a map beyond [0, 1] is not normalised: its difference is a share of its range
    assert differs(anomaly_map=expected[path]["anomaly_map"] + 0.1).map == pytest.approx(0.05)


def test_what_cannot_work_is_refused(padim: str, demo: Path, tmp_path: Path) -> None:
    images = demo_data(demo).root / "grid" / "test"
    with pytest.raises(
        ValueError, match="model must be the name of a class of anomalib, such as Padim or SAAE, got Padi"
    ):
        parity.main(["--model", "Padi", "--ckpt", padim, "--data", str(images)])
    with pytest.raises(ValueError, match="which is no file"):
        parity.main(["--model", "Padim", "--ckpt", str(tmp_path / "no.ckpt"), "--data", str(images)])
    with pytest.raises(ValueError, match="holds no images"):
        parity.main(["--model", "Padim", "--ckpt", padim, "--data", str(tmp_path)])

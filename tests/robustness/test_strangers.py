# SPDX-License-Identifier: Apache-2.0

"""Files from strangers: nothing in them is executed, and what does not fit is refused."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anomalib.models
import pytest
import torch
from anomalib.data import get_datamodule
from anomalib.models import UnknownModelError, get_model

from anomalib_recon import models
from anomalib_recon.data import DemoAD
from anomalib_recon.layers import FrozenBackbone
from tests.tiny_models import TINY, Trained, build, engine_in

from .conftest import data


class Planted:
    """Code that is executed when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.witness,)


def with_planted_code(path: Path, witness: Path, stranger: Path) -> Path:
    """The checkpoint with code where plain data is expected."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["layers"] = Planted(witness)
    torch.save(checkpoint, stranger)
    return stranger


def test_planted_code_is_not_executed(trained: Trained, stripes: Path, tmp_path: Path) -> None:
    model, path, _ = trained
    witness = tmp_path / "executed"
    stranger = with_planted_code(Path(path), witness, tmp_path / "stranger.ckpt")
    engine = engine_in(tmp_path)
    for load in (
        lambda: type(model).load_from_checkpoint(stranger),
        lambda: engine.test(model, datamodule=data(stripes), ckpt_path=stranger),
        lambda: engine.predict(model, datamodule=data(stripes), ckpt_path=stranger),
        # a copy, of which a fit takes the statistics of these images first
        lambda: engine.fit(type(model).load_from_checkpoint(path), datamodule=data(stripes), ckpt_path=stranger),
    ):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load()
    assert not witness.exists()
    torch.load(stranger, weights_only=False)
    assert witness.exists()


def test_planted_code_in_other_arguments_is_not_executed(stripes: Path, tmp_path: Path) -> None:
    witness, stranger = tmp_path / "executed", tmp_path / "stranger.pt"
    torch.save({"conv1.weight": Planted(witness)}, stranger)
    with pytest.raises(ValueError, match=r"^backbone_weights=.*stranger.pt cannot be read"):
        FrozenBackbone("resnet18", weights=stranger)
    model = build("ADTR", labels="pixel", confetti=0.5, normal_checkpoint=stranger)
    with pytest.raises(ValueError, match=r"^normal_checkpoint=.*stranger.pt is not a checkpoint of anomalib, or not a"):
        engine_in(tmp_path).fit(model, datamodule=data(stripes))
    assert not witness.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3)], ids=str)
def test_a_start_of_adtr_plus_that_is_no_checkpoint_is_refused(stripes: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "start.ckpt")
    model = build("ADTR", labels="pixel", confetti=0.5, normal_checkpoint=tmp_path / "start.ckpt")
    with pytest.raises(ValueError, match=r"not a checkpoint of anomalib|checkpoint is not one of ADTR"):
        engine_in(tmp_path).fit(model, datamodule=data(stripes))


@pytest.mark.parametrize(
    "class_path",
    ["os.system", "subprocess.run", "anomalib_recon.quickstart.run", "anomalib_recon.models.intra.InTra",
     "anomalib_recon.discovery.publish", "anomalib_recon.data.DemoAD"],
)  # fmt: skip
def test_a_config_imports_models_from_nowhere_else(class_path: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnknownModelError):
        get_model({"class_path": class_path})
    assert f"Module import from '{class_path.rpartition('.')[0]}' is not allowed." in caplog.text


def test_what_a_config_can_call_of_ours_is_the_models() -> None:
    assert {name for name in anomalib.models.ALLOWED_MODULES if "recon" in name} == {"anomalib_recon.models"}
    assert {name for name, value in vars(models).items() if callable(value) and name[0] != "_"} == set(TINY)


def test_a_config_of_demo_data_writes_in_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for category in ("../grid", "/tmp/grid", "grid/../..", ".", "", "GRID"):
        with pytest.raises(ValueError, match=f"^category={re.escape(repr(category))} is not drawn"):
            get_datamodule({"class_path": "DemoAD", "init_args": {"category": category}})
    for seed in ("../1", "1/../../2"):
        with pytest.raises(TypeError):
            DemoAD(picture_seed=seed)
    assert not list(tmp_path.iterdir())

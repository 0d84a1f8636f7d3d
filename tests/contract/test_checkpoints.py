# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: plain data that needs no other file, and is refused by whatever it does not fit."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.models import AnomalibModule, Padim
from lightning import Trainer

from tests.tiny_models import TINY, Trained, build, demo_data, demo_images, engine_in


@pytest.fixture
def checkpoint(trained: Trained) -> dict[str, Any]:
    """What the checkpoint holds, to be changed."""
    return torch.load(trained.checkpoint, weights_only=True)


def save(model: AnomalibModule, path: Path) -> Path:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def network_arguments(model: AnomalibModule) -> list[str]:
    """Arguments by which a checkpoint must be that of the same network."""
    free = {"pre_trained", "backbone_weights", *model.free_arguments, *model.score_arguments}
    return [argument for argument in inspect.signature(model.network).parameters if argument not in free]


def test_it_holds_what_the_model_was_built_with(name: str, trained: Trained, checkpoint: dict[str, Any]) -> None:
    saved = checkpoint["hyper_parameters"]
    assert saved["image_size"] == (64, 64)
    defaults = inspect.signature(type(trained.model)).parameters
    given = TINY[name] | {"image_size": (64, 64)}
    for argument in network_arguments(trained.model):
        assert saved[argument] == given.get(argument, defaults[argument].default), argument


def test_a_loaded_model_scores_as_the_trained_one(trained: Trained, demo: Path) -> None:
    loaded = type(trained.model).load_from_checkpoint(trained.checkpoint).eval()
    images = torch.from_numpy(demo_images(demo, (256, 256)))
    with torch.no_grad():
        expected, result = trained.model(images), loaded(images)
    assert len(expected.pred_score.unique()) > 3
    for field in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field


def test_it_needs_no_weights_of_the_backbone(
    trained: Trained, checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        msg = "no network here"
        raise OSError(msg)

    if "pre_trained" not in checkpoint["hyper_parameters"]:
        pytest.skip("has no backbone")
    monkeypatch.setattr("socket.socket.connect", refuse)
    for weights in (None, str(tmp_path / "gone.pth")):
        checkpoint["hyper_parameters"] |= {"pre_trained": True, "backbone_weights": weights}
        torch.save(checkpoint, tmp_path / "model.ckpt")
        loaded = type(trained.model).load_from_checkpoint(tmp_path / "model.ckpt")
        for key, value in trained.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_another_model_of_the_same_arguments_validates_and_tests_with_it(
    name: str, trained: Trained, demo: Path, tmp_path: Path
) -> None:
    engine, model = engine_in(tmp_path), build(name, seed=1)
    by_path = engine.test(model, datamodule=demo_data(demo), ckpt_path=trained.checkpoint)
    assert by_path == engine.test(trained.model, datamodule=demo_data(demo))
    engine.validate(model, datamodule=demo_data(demo), ckpt_path=trained.checkpoint)
    assert torch.equal(model.post_processor.image_threshold, trained.model.post_processor.image_threshold)
    trained.model.eval()


@pytest.mark.parametrize("is_ours", [True, False])
def test_one_of_another_model_is_refused(name: str, is_ours: bool, demo: Path, tmp_path: Path) -> None:
    other = next(other for other in TINY if other != name)
    stranger = build(other) if is_ours else Padim(backbone="resnet18", pre_trained=False)
    path = save(stranger, tmp_path / "stranger.ckpt")
    model = build(name)
    with pytest.raises(ValueError, match=rf"^The checkpoint is not one of {name}[^\n]*$"):
        engine_in(tmp_path).test(model, datamodule=demo_data(demo), ckpt_path=path)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        type(model).load_from_checkpoint(path)


def test_one_of_another_network_is_refused_by_its_arguments(
    name: str, trained: Trained, checkpoint: dict[str, Any], demo: Path, tmp_path: Path
) -> None:
    different = build(name, image_size=96)
    words = (
        r"^The checkpoint needs a model with image_size=\(64, 64\) \(not \(96, 96\)\); pass [^\n]*--model.image_size"
    )
    with pytest.raises(ValueError, match=words):
        engine_in(tmp_path).test(different, datamodule=demo_data(demo), ckpt_path=trained.checkpoint)
    model = build(name)
    for argument in network_arguments(model):
        value = model.hparams[argument]
        if argument in model.defaulted_arguments:  # without a value, a model takes any
            model.hparams[argument] = value or "one"
        other = {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], argument: "another"}}
        with pytest.raises(ValueError, match=rf"^The checkpoint needs a model with {argument}=another \(not [^\n]*$"):
            model.on_load_checkpoint(other)
        model.hparams[argument] = value


def test_one_of_another_version_is_refused(name: str, trained: Trained, checkpoint: dict[str, Any]) -> None:
    model, arguments = build(name), checkpoint["hyper_parameters"]
    for argument in set(network_arguments(model)) - model.added_arguments.keys():
        other = {key: value for key, value in arguments.items() if key != argument}
        with pytest.raises(ValueError, match=rf"^The checkpoint is not one of {name}, or of a version without some of"):
            model.on_load_checkpoint({**checkpoint, "hyper_parameters": other})

    first = {key: value for key, value in arguments.items() if key not in model.added_arguments}
    model.on_load_checkpoint({**checkpoint, "hyper_parameters": first})
    for argument, value in model.added_arguments.items():
        model.hparams[argument] = "another"
        with pytest.raises(ValueError, match=rf"^The checkpoint needs a model with {argument}={value} \(not another\)"):
            model.on_load_checkpoint({**checkpoint, "hyper_parameters": first})
        model.hparams[argument] = value

    state = checkpoint["state_dict"]
    weight = next(key for key, _ in trained.model.named_parameters() if key.startswith("model."))
    without = {key: value for key, value in state.items() if key != weight}
    for changed in (without, {**state, "model.new": torch.ones(1)}, {**state, weight: torch.ones(1, 2, 3)}):
        words = (
            rf"^The checkpoint and {name} differ in 1 tensors, (model.new|{weight}) for one: it is of a network with"
        )
        with pytest.raises(ValueError, match=words):
            model.on_load_checkpoint({**checkpoint, "state_dict": changed})


def test_scores_that_the_thresholds_are_not_of_are_said(
    name: str, trained: Trained, checkpoint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = trained.model
    value = model.hparams["top_fraction"]
    model.on_load_checkpoint(checkpoint)
    assert "thresholds" not in caplog.text
    model.hparams["top_fraction"] = 0.5
    model.on_load_checkpoint(checkpoint)
    model.hparams["top_fraction"] = value
    assert (
        f"The checkpoint has top_fraction={value}, and its thresholds are of such scores; this model has 0.5."
        in caplog.text
    )

# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn

from anomalib_recon.data import DemoAD
from anomalib_recon.models import PatchAE
from anomalib_recon.models.patch_ae import lightning_model
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
from tests.conftest import images_in

SMALL = {
    "backbone": "resnet18", "pre_trained": False, "image_size": 64, "embed_dim": 16, "learning_rate": 1e-2,
    "coreset_ratio": 0.25, "sigma": 2.0,
}  # fmt: skip


def data(root: Path, **kwargs) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **kwargs})


def train(
    root: Path, folder: Path, seed: int = 0, ckpt_path: str | None = None, model: PatchAE | None = None, **trainer
) -> tuple[PatchAE, Engine]:
    seed_everything(seed)
    model = model or PatchAE(**SMALL)
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, engine


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations = 0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.validations += 1


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchAE, Engine, Probe]:
    probe = Probe()
    model, engine = train(stripes, tmp_path_factory.mktemp("results"), callbacks=[probe], max_epochs=6)
    return model, engine, probe


def features_of(model: PatchAE, root: Path) -> torch.Tensor:
    """Whitened features of the normal training images, (12 * 8 * 8, D)."""
    network = model.eval().model
    with torch.no_grad():
        features = network.whitening(network.embed(images_in(root / "stripes" / "train" / "good")))
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def test_training_lowers_the_loss_and_validates_once(trained: tuple[PatchAE, Engine, Probe]) -> None:
    model, _, probe = trained
    assert probe.losses[-1] < 0.8 * probe.losses[0]
    assert probe.validations == 1
    assert bool(model.post_processor.image_threshold.isfinite())
    assert bool(model.post_processor.pixel_threshold.isfinite())


def test_a_step_moves_the_outputs_of_each_new_layer_as_far(stripes: Path, tmp_path: Path) -> None:
    model = PatchAE(**SMALL)
    layers = [layer for layer in (*model.model.project, *model.model.decoder) if isinstance(layer, nn.Conv2d)]
    before = [layer.weight.clone() for layer in layers]
    train(stripes, tmp_path, model=model, max_steps=1)
    moved = [float((layer.weight - old).abs().max()) for layer, old in zip(layers, before, strict=True)]
    # the first step of Adam moves a weight by the learning rate
    reach = [step * layer.in_channels for step, layer in zip(moved, layers, strict=True)]
    assert len(reach) == 4
    assert layers[0].in_channels > 2 * layers[1].in_channels
    assert reach == pytest.approx([SMALL["learning_rate"] * SMALL["embed_dim"]] * 4, rel=0.01)


def test_bank_holds_features_of_the_normal_training_images(
    trained: tuple[PatchAE, Engine, Probe], stripes: Path
) -> None:
    model = trained[0]
    bank, features = model.model.bank.vectors, features_of(model, stripes)
    assert bank.shape == (len(features) // 4, 16)
    assert float(torch.cdist(bank, features, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max()) < 1e-4


def test_statistics_of_batch_normalisation_stay_those_of_the_weights(trained: tuple[PatchAE, Engine, Probe]) -> None:
    norms = [part for part in trained[0].model.backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert all(bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all()) for norm in norms)
    assert any(bool((norm.weight != norm.weight[0]).any()) for norm in norms)


def test_statistics_are_those_of_all_training_images_before_training(stripes: Path, tmp_path: Path) -> None:
    seed_everything(0)
    model = PatchAE(**SMALL)
    with torch.no_grad():
        stages = model.model.extract_stages(images_in(stripes / "stripes" / "train" / "good")).double().numpy()
    train(stripes, tmp_path, model=model, max_steps=1)
    means, variances = stages.mean((0, 2, 3)), stages.var((0, 2, 3))
    parts = np.split(variances, np.cumsum([64, 128, 256]))
    stds = np.sqrt(np.concatenate([part + 0.01 * part.mean() for part in parts]))
    np.testing.assert_allclose(model.model.scale.mean.flatten(), means, rtol=1e-4, atol=1e-5 * stds.max())
    np.testing.assert_allclose(model.model.scale.std.flatten(), stds, rtol=1e-4)


def test_bank_of_ratio_one_holds_them_all(stripes: Path, tmp_path: Path) -> None:
    model, _ = train(stripes, tmp_path, model=PatchAE(**{**SMALL, "coreset_ratio": 1.0}), max_epochs=1)
    torch.testing.assert_close(model.model.bank.vectors, features_of(model, stripes), rtol=1e-4, atol=1e-4)
    images = images_in(stripes / "stripes" / "train" / "good")
    with torch.no_grad():
        assert float(model.model(images).pred_score.max()) < 1e-4


def test_bank_is_selected_from_as_many_vectors_of_each_image(stripes: Path, tmp_path: Path) -> None:
    arguments = {**SMALL, "coreset_ratio": 1.0, "coreset_candidates": 60}
    model, _ = train(stripes, tmp_path, model=PatchAE(**arguments), max_epochs=1)
    bank = model.model.bank.vectors
    distances = torch.cdist(bank, features_of(model, stripes), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    assert float(nearest.values.max()) < 1e-4
    assert nearest.indices.unique().numel() == len(bank)
    per_image = torch.bincount(nearest.indices // model.model.num_patches)
    assert per_image.tolist() == [5] * 12


def test_checkpoint_round_trip(trained: tuple[PatchAE, Engine, Probe], stripes: Path) -> None:
    model, engine, _ = trained
    path = engine.trainer.checkpoint_callback.best_model_path
    assert "model.bank.vectors" in torch.load(path, weights_only=True)["state_dict"]
    loaded = PatchAE.load_from_checkpoint(path)
    images = images_in(stripes / "stripes" / "test" / "hole")
    with torch.no_grad():
        expected, result = model.eval()(images), loaded.eval()(images)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


def test_pictures_have_a_reconstruction(trained: tuple[PatchAE, Engine, Probe], stripes: Path, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    batches = engine.predict(trained[0], datamodule=data(stripes))
    for batch in batches:
        assert batch.reconstruction.shape == (len(batch.image), 3, 64, 64)
        assert batch.reconstruction.min() >= 0
        assert batch.reconstruction.max() <= 1
    assert len(list(tmp_path.rglob("*.png"))) == 10


def test_killed_run_resumes_to_the_same_result(stripes: Path, tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.current_epoch == 1 and args[-1] == 1:
                raise KeyError

    whole, _ = train(stripes, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(stripes, tmp_path / "killed", callbacks=[Kill()])
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["model.bank.vectors"].numel() == 0
    resumed, _ = train(stripes, tmp_path / "killed", seed=123, ckpt_path=str(checkpoint))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_finished_run_goes_on_with_more_epochs_and_a_new_bank(stripes: Path, tmp_path: Path) -> None:
    first, engine = train(stripes, tmp_path / "first", max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    second, _ = train(stripes, tmp_path / "second", ckpt_path=checkpoint, max_epochs=2)
    assert second.model.bank.vectors.shape == first.model.bank.vectors.shape
    assert not torch.equal(second.model.bank.vectors, first.model.bank.vectors)


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_steps": 2, "max_epochs": -1},
        {"limit_val_batches": 0, "max_epochs": 1},
        {"callbacks": [EarlyStopping(monitor="train_loss", patience=1, min_delta=1e9)], "max_epochs": 20},
    ],
    ids=["max_steps", "no validation", "early stopping"],
)
def test_bank_is_filled_and_saved_however_training_ends(stripes: Path, tmp_path: Path, trainer: dict) -> None:
    model, engine = train(stripes, tmp_path, **trainer)
    assert engine.trainer.current_epoch < 3
    loaded = PatchAE.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    assert len(loaded.model.bank.vectors) == 192
    assert torch.equal(loaded.model.bank.vectors, model.model.bank.vectors)


def test_thresholds_at_a_false_positive_rate(stripes: Path, tmp_path: Path) -> None:
    # all vectors are in the bank, so that each training image has a score of about 0
    model = PatchAE(**{**SMALL, "coreset_ratio": 1.0}, post_processor=FalsePositiveRatePostProcessor())
    train(stripes, tmp_path, model=model, max_epochs=1)
    assert float(model.post_processor.image_threshold) < 1e-3


def test_a_model_without_bank_says_so(stripes: Path, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="no normal features to compare images with"):
        engine.predict(PatchAE(**SMALL), datamodule=data(stripes))


def test_scores_by_reconstruction_need_no_bank(stripes: Path, tmp_path: Path) -> None:
    model = PatchAE(**SMALL, patch_wise=False, defect_probability=0.0, score_by="reconstruction")
    train(stripes, tmp_path, model=model, max_epochs=1)
    assert len(model.model.bank.vectors) == 0
    assert bool(model.post_processor.image_threshold.isfinite())


def test_a_bank_that_takes_long_is_told_before_training(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_model, "MANY_DISTANCES", 10_000)
    for candidates, told in ((None, True), (100, False)):
        caplog.clear()
        train(stripes, tmp_path, model=PatchAE(**{**SMALL, "coreset_candidates": candidates}), max_epochs=1)
        assert any("lower coreset_ratio" in message for message in caplog.messages) == told


def test_a_bank_that_would_be_empty_is_refused_before_training(stripes: Path, tmp_path: Path) -> None:
    model = PatchAE(**{**SMALL, "coreset_ratio": 0.001})
    with pytest.raises(ValueError, match=r"coreset_ratio=0.001 leaves none of the 768 normal features; raise it"):
        train(stripes, tmp_path, model=model)
    model = PatchAE(**{**SMALL, "coreset_ratio": 0.01, "coreset_candidates": 100})  # 8 of each
    with pytest.raises(ValueError, match=r"coreset_ratio=0.01 leaves none of the 96 normal features; raise it"):
        train(stripes, tmp_path, model=model)


def test_a_checkpoint_of_another_network_is_refused(trained: tuple[PatchAE, Engine, Probe]) -> None:
    checkpoint = torch.load(trained[1].trainer.checkpoint_callback.best_model_path, weights_only=True)
    with pytest.raises(ValueError, match=r"needs a model with embed_dim=16 \(not 8\); pass these arguments"):
        PatchAE(**{**SMALL, "embed_dim": 8}).on_load_checkpoint(checkpoint)


def test_bf16_mixed_precision_trains(stripes: Path, tmp_path: Path) -> None:
    model, _ = train(stripes, tmp_path, precision="bf16-mixed", max_epochs=1)
    assert model.model.bank.vectors.dtype == torch.float32
    assert bool(model.post_processor.image_threshold.isfinite())


def test_demo_data_floor_with_an_untrained_backbone(drawn: Path, tmp_path: Path) -> None:
    seed_everything(0)
    model = PatchAE(
        backbone="resnet18", pre_trained=False, image_size=64, embed_dim=64, coreset_ratio=0.05, sigma=1.0,
        visualizer=False,
    )  # fmt: skip
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    datamodule = DemoAD(root=drawn, category="grid")
    engine.fit(model, datamodule=datamodule)
    (figures,) = engine.test(model, datamodule=datamodule, verbose=False)
    assert figures["image_AUROC"] > 0.7
    assert figures["pixel_AUROC"] > 0.8

# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_recon.data import LabelledFolder
from anomalib_recon.models import ADTR
from anomalib_recon.models.adtr.confetti import ConfettiNoise
from anomalib_recon.models.adtr.loss import pseudo_huber
from tests.conftest import images_in

SMALL = {
    "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64, "feature_size": 8,
    "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "learning_rate": 2e-3, "pool_size": 8,
}  # fmt: skip


def data(root: Path) -> MVTecAD:
    return MVTecAD(root=root, category="stripes", train_batch_size=5, eval_batch_size=4, num_workers=0)


def labelled_data(root: Path, **arguments) -> LabelledFolder:
    """Half of the holes of ``stripes`` are there to be trained on."""
    folders = {
        "normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole",
        "mask_dir": "ground_truth/hole", "train_abnormal_dir": "test/hole", "train_mask_dir": "ground_truth/hole",
    }  # fmt: skip
    return LabelledFolder(
        name="stripes", root=root / "stripes", num_train_abnormal=3, val_split_mode="same_as_test",
        train_batch_size=5, num_workers=0, **{**folders, **arguments},
    )  # fmt: skip


def train(
    datamodule: AnomalibDataModule,
    folder: Path,
    arguments: dict | None = None,
    seed: int = 0,
    ckpt_path: Path | None = None,
    **trainer,
) -> tuple[ADTR, Engine]:
    seed_everything(seed)
    model = ADTR(**{**SMALL, **(arguments or {})})
    trainer = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return model, engine


def checkpoint_of(engine: Engine) -> str:
    return engine.trainer.checkpoint_callback.best_model_path


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.first: dict[str, Tensor] = {}
        self.validations = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.first = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, *args) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.validations += 1


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ADTR, Engine, Probe]:
    probe = Probe()
    model, engine = train(data(stripes), tmp_path_factory.mktemp("results"), callbacks=[probe], max_epochs=40)
    return model, engine, probe


@pytest.fixture(scope="module")
def normal_checkpoint(trained: tuple[ADTR, Engine, Probe]) -> str:
    return checkpoint_of(trained[1])


def is_finite(model: ADTR) -> bool:
    return bool(model.post_processor.image_threshold.isfinite() and model.post_processor.pixel_threshold.isfinite())


def test_reconstruction_improves(trained: tuple[ADTR, Engine, Probe], stripes: Path) -> None:
    model, engine, probe = trained
    assert len(probe.losses) == engine.trainer.global_step == 40 * 3
    assert np.mean(probe.losses[-3:]) < 0.2 * np.mean(probe.losses[:3])
    assert "train_loss" in engine.trainer.callback_metrics
    [metrics] = engine.test(model, datamodule=data(stripes), verbose=False)
    assert metrics["image_AUROC"] > 0.9
    assert metrics["pixel_AUROC"] > 0.85


def test_validation_runs_once_and_sets_the_thresholds(trained: tuple[ADTR, Engine, Probe]) -> None:
    model, _, probe = trained
    assert probe.validations == 1
    assert is_finite(model)


def test_training_changes_all_of_the_transformer_and_nothing_of_the_backbone(
    trained: tuple[ADTR, Engine, Probe],
) -> None:
    model, _, probe = trained
    for name, tensor in model.state_dict().items():
        if name.startswith("model."):
            assert torch.equal(tensor, probe.first[name]) == name.startswith("model.backbone."), name


def test_optimizer_and_checkpoint_hold_each_tensor_once(normal_checkpoint: str, trained) -> None:
    model = trained[0].model
    checkpoint = torch.load(normal_checkpoint, weights_only=True)
    transformer = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    [states] = checkpoint["optimizer_states"]
    shapes = [state["exp_avg"].shape for state in states["state"].values()]
    assert shapes == [parameter.shape for parameter in transformer]

    saved = [name for name in checkpoint["state_dict"] if name.startswith("model.")]
    assert sorted(saved) == sorted(f"model.{name}" for name in model.state_dict())
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    size += 2 * sum(parameter.numel() * parameter.element_size() for parameter in transformer)
    assert Path(normal_checkpoint).stat().st_size < 1.1 * size


def test_learning_rate_is_a_tenth_after_the_given_epoch(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    train(data(stripes), tmp_path, {"lr_drop_epoch": 2}, callbacks=[probe], limit_train_batches=1)
    assert probe.learning_rates == pytest.approx([2e-3, 2e-3, 2e-4, 2e-4])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("moment", ["in the middle of an epoch", "at the last epoch so far"])
def test_interrupted_run_resumes_to_the_same_result(
    stripes: Path, tmp_path: Path, normal_checkpoint: str, moment: str, plus: bool
) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.current_epoch == 2 and args[-1] == 1:
                raise KeyError(moment)

    arguments: dict = {"dropout": 0.3}
    if plus:
        arguments |= {"labels": "pixel", "confetti": 0.5, "normal_checkpoint": normal_checkpoint}
    probe = Probe()
    whole, _ = train(data(stripes), tmp_path / "whole", arguments, callbacks=[probe])
    if moment == "in the middle of an epoch":
        with pytest.raises(KeyError, match=moment):
            train(data(stripes), tmp_path / "killed", arguments, callbacks=[Kill()])
    else:
        train(data(stripes), tmp_path / "killed", arguments, max_epochs=2)
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    if plus:  # whose start a run that goes on needs no more
        arguments["normal_checkpoint"] = str(tmp_path / "gone.ckpt")
    rest = Probe()
    resumed, _ = train(data(stripes), tmp_path / "rest", arguments, seed=9, ckpt_path=checkpoint, callbacks=[rest])
    assert rest.losses == probe.losses[6:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("trainer", [{"max_steps": 4, "max_epochs": -1}, {"max_time": {"seconds": 1}}])
def test_a_run_that_is_stopped_has_its_thresholds(stripes: Path, tmp_path: Path, trainer: dict) -> None:
    probe = Probe()
    model, engine = train(data(stripes), tmp_path, callbacks=[probe], **{"max_epochs": 10_000, **trainer})
    assert len(probe.losses) == engine.trainer.global_step > 0
    assert probe.validations == 1
    assert is_finite(model)
    loaded = ADTR.load_from_checkpoint(checkpoint_of(engine))
    assert torch.equal(loaded.post_processor.image_threshold, model.post_processor.image_threshold)


def differences(model: ADTR, images: Tensor, masks: Tensor) -> tuple[float, float]:
    """Mean phi of the cells inside and outside of the masks (B, H, W)."""
    model.eval()
    with torch.no_grad():
        features = model.model.embed(images)
        phi = pseudo_huber(features, model.model.reconstruct(features))
    inside = functional.adaptive_max_pool2d(masks[:, None].float(), phi.shape[-2:])[:, 0] > 0
    return float(phi[inside].mean()), float(phi[~inside].mean())


def test_confetti_is_pushed_away(stripes: Path, tmp_path: Path, normal_checkpoint: str) -> None:
    probe = Probe()
    arguments = {"labels": "pixel", "confetti": 0.5, "alpha": 0.01, "normal_checkpoint": normal_checkpoint}
    model, _ = train(data(stripes), tmp_path, arguments, callbacks=[probe], max_epochs=10)
    start = ADTR.load_from_checkpoint(normal_checkpoint)
    for name, tensor in start.model.state_dict().items():
        assert torch.equal(probe.first[f"model.{name}"], tensor), name

    generator = torch.Generator().manual_seed(1)
    noisy = ConfettiNoise(1.0)(images_in(stripes / "stripes" / "test" / "good"), generator)
    assert differences(model, *noisy)[0] > 1.2 * differences(start, *noisy)[0]


@pytest.mark.parametrize(("labels", "confetti"), [("pixel", 0.5), ("image", 0.0)])
def test_labelled_anomalies_are_pushed_away(
    stripes: Path, tmp_path: Path, normal_checkpoint: str, labels: str, confetti: float
) -> None:
    arguments = {"labels": labels, "confetti": confetti, "normal_checkpoint": normal_checkpoint}
    masks = {"train_mask_dir": None} if labels == "image" else {}
    model, _ = train(labelled_data(stripes, **masks), tmp_path, arguments, max_epochs=10)
    start = ADTR.load_from_checkpoint(normal_checkpoint)
    folder = stripes / "stripes"
    holes = images_in(folder / "test" / "hole"), images_in(folder / "ground_truth" / "hole")[:, 0]
    (pushed, pulled), (anomalous, normal) = differences(model, *holes), differences(start, *holes)
    assert pushed > 1.1 * anomalous
    assert pulled < normal
    assert is_finite(model)


def test_the_recommended_adtr_continues_with_labelled_anomalies(stripes: Path, tmp_path: Path) -> None:
    """With a hole, whitened features, one cycle, and a distance that is measured anew."""
    recipe = {
        "patch_size": 2, "hole_size": 1, "dropout": 0.0, "feature_scale": "whiten", "distance": "mahalanobis",
        "pool_size": 1, "top_fraction": 0.01, "use_one_cycle": True,
    }  # fmt: skip
    start, engine = train(data(stripes), tmp_path / "normal", recipe)
    plus = {**recipe, "labels": "pixel", "normal_checkpoint": checkpoint_of(engine)}
    model, _ = train(labelled_data(stripes), tmp_path / "plus", plus)
    assert is_finite(model)
    # the scale is that of the ADTR, and residuals are those of the new weights
    assert torch.equal(model.model.scale.whitening.matrix, start.model.scale.whitening.matrix)
    before, after = (network.model.anomaly_map_generator.mahalanobis.whitening for network in (start, model))
    assert not torch.equal(before, after)
    folder = stripes / "stripes" / "test"
    with torch.no_grad():
        good, holes = (model.eval()(images_in(folder / name)).pred_score for name in ("good", "hole"))
    assert holes.mean() > good.mean()


@pytest.mark.parametrize(
    ("arguments", "labelled", "words"),
    [
        ({"labels": "pixel"}, {"train_abnormal_dir": None}, "^labels='pixel' trains ADTR.*needs anomalies, but .*none"),
        ({"labels": "image"}, {"train_abnormal_dir": None}, "^labels='image' trains ADTR.*pass confetti=0.5, or anoma"),
        ({"labels": "pixel"}, {"train_mask_dir": None}, "^labels='pixel' needs a mask for each anomalous training ima"),
        ({"labels": "pixel", "confetti": 0.5}, {"train_mask_dir": None}, "^labels='pixel' needs a mask for each"),
        ({}, {}, "^labels=None trains on normal images alone, but the training set has 3 anomalous ones; pass labels="),
        ({"labels": "pixel"}, {}, "^normal_checkpoint=None is not a file; ADTR. starts from the checkpoint of an ADTR"),
        ({"labels": "image", "normal_checkpoint": "gone"}, {}, "^normal_checkpoint=.*gone is not a file"),
    ],
)  # fmt: skip
def test_training_that_cannot_start_is_refused(
    stripes: Path, tmp_path: Path, arguments: dict, labelled: dict, words: str
) -> None:
    datamodule = data(stripes) if "train_abnormal_dir" in labelled else labelled_data(stripes, **labelled)
    with pytest.raises(ValueError, match=words) as error:
        train(datamodule, tmp_path, arguments)
    assert "\n" not in str(error.value)


def test_bf16_mixed_precision_trains(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    model, _ = train(data(stripes), tmp_path, callbacks=[probe], precision="bf16-mixed", max_epochs=8)
    assert np.mean(probe.losses[-3:]) < 0.7 * np.mean(probe.losses[:3])
    assert is_finite(model)


def test_two_processes_train_one_model_with_confetti_of_their_own(
    stripes: Path, tmp_path: Path, normal_checkpoint: str
) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from tests.adtr.test_training import Probe, data, train\n"
        "class MaskProbe(Probe):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        self.masks = []\n"
        "        pl_module.loss.register_forward_pre_hook(lambda module, args: self.masks.append(args[2]))\n"
        "root, folder, checkpoint = map(Path, sys.argv[1:])\n"
        "arguments = {'labels': 'pixel', 'confetti': 1.0, 'normal_checkpoint': checkpoint}\n"
        "probe = MaskProbe()\n"
        "model, engine = train(data(root), folder, arguments, callbacks=[probe], devices=2, strategy='ddp',\n"
        "                      max_epochs=2)\n"
        "result = {'state': model.state_dict(), 'steps': engine.trainer.global_step, 'masks': probe.masks}\n"
        "torch.save(result, folder / f'rank{engine.trainer.global_rank}.pt')\n"
    )
    project = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, str(script), str(stripes), str(tmp_path), normal_checkpoint],
        check=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 4
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name
    assert [masks.shape for masks in first["masks"]] == 2 * [(5, 64, 64), (1, 64, 64)]
    for masks, others in zip(first["masks"], second["masks"], strict=True):
        assert masks.flatten(1).any(dim=1).all()
        assert not (masks == others).flatten(1).all(dim=1).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": "mask"}, "^labels must be None, 'pixel' or 'image', got 'mask'"),
        ({"labels": "image", "top_k": 65}, "^top_k must be from 1 to the 64 cells of the feature map, got 65"),
        ({"labels": "image", "top_k": 2.5}, "^top_k must be a whole number, got 2.5"),
        ({"alpha": 0.0}, "^alpha must be positive, got 0.0"),
        ({"learning_rate": -1.0}, "^learning_rate must be positive, got -1.0"),
        ({"lr_drop_epoch": 0}, "^lr_drop_epoch must be at least 1, got 0"),
        ({"image_size": 0}, "^image_size must be positive, got 0"),
        ({"feature_size": 7}, r"^feature_size must be one of 32 x 32, 16 x 16, .* image_size=\(64, 64\), got \(7, 7\)"),
        ({"confetti": 0.5}, "^confetti=0.5 and normal_checkpoint=None are for ADTR., but labels is None; pass labels="),
        ({"normal_checkpoint": "a.ckpt"}, "^confetti=0.0 and normal_checkpoint=a.ckpt are for ADTR., but labels is"),
        ({"pre_processor": ADTR.configure_pre_processor((32, 32))}, "^image_size must be the size that pre_processor"),
        ({"pre_processor": PreProcessor(Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)]))},
         r"^pre_processor must leave images in \[0, 1\], got one with Normalize"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADTR(**{**SMALL, **arguments})


def test_image_size_follows_the_pre_processor() -> None:
    pre_processor = ADTR.configure_pre_processor((64, 96))
    model = ADTR(**{**SMALL, "image_size": None, "feature_size": None}, pre_processor=pre_processor)
    assert model.model.feature_size == (4, 6)
    assert model.hparams["image_size"] == (64, 96)

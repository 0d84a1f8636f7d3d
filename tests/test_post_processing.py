# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib import LearningType
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, InferenceBatch, MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import RandomInvert, Resize

from anomalib_recon.deploy.highest_scores import HighestScores
from anomalib_recon.models import InTra
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor

SIZE = 16
NUM_IMAGES = 200


class ChannelSum(nn.Module):
    """Scores every pixel by a weighted sum of its channels, and the image by the sum of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([30.0, 3.0, 0.1]))

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        anomaly_map = (images * self.weight[:, None, None]).sum(dim=1, keepdim=True)
        return InferenceBatch(pred_score=anomaly_map.mean(dim=(1, 2, 3)), anomaly_map=anomaly_map)


class Tiny(AnomalibModule):
    """A model whose scores are known; each training step multiplies them."""

    learning_type = LearningType.ONE_CLASS
    trainer_arguments = {"num_sanity_val_steps": 0}  # noqa: RUF012  # a property in the base class

    def __init__(self, growth: float = 1.0, pre_processor=True, post_processor=True, evaluator=False, visualizer=False):
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.growth = growth
        self.model = ChannelSum()

    @staticmethod
    def configure_pre_processor(image_size=None) -> PreProcessor:
        return PreProcessor(Resize((SIZE, SIZE)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch, batch_idx):
        self.model.weight.data *= self.growth
        self.log("weight", self.model.weight[0])
        return 0 * self.model.weight.sum()

    def validation_step(self, batch, batch_idx):
        return self.test_step(batch, batch_idx)


def write_noise(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")


def images_in(folder: Path) -> torch.Tensor:
    return torch.stack([read_image(path, as_tensor=True) for path in sorted(folder.glob("*.png"))])


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise")
    write_noise(root / "good", NUM_IMAGES, seed=0)
    return root


def normal_only(root: Path, **kwargs) -> Folder:
    splits = {"test_split_mode": "none", "val_split_mode": "none", **kwargs}
    sizes = {"train_batch_size": 32, "eval_batch_size": 32, "num_workers": 0}
    return Folder(name="noise", root=root, normal_dir="good", **sizes, **splits)


def fit(model: AnomalibModule, datamodule, folder: Path, ckpt_path: Path | None = None, **trainer) -> Engine:
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return engine


def thresholds(model: AnomalibModule) -> list[float]:
    return [float(model.post_processor.image_threshold), float(model.post_processor.pixel_threshold)]


@pytest.fixture(scope="module")
def fitted(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    """A model that was fitted to normal images alone, with augmentation, and its checkpoint."""
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.01, image_fpr=0.05))
    datamodule = normal_only(noise, train_augmentations=RandomInvert(p=1.0))
    engine = fit(model, datamodule, tmp_path_factory.mktemp("fitted"))
    return model, Path(engine.best_model_path)


def test_exactly_the_asked_share_of_the_training_images_and_pixels_is_anomalous(
    fitted: tuple[Tiny, Path], noise: Path
) -> None:
    with torch.no_grad():
        predictions = fitted[0].eval()(images_in(noise / "good"))
    assert int(predictions.pred_label.sum()) == 0.05 * NUM_IMAGES
    assert int(predictions.pred_mask.sum()) == 0.01 * NUM_IMAGES * SIZE**2


def test_new_images_are_anomalous_at_the_asked_rate(fitted: tuple[Tiny, Path]) -> None:
    images = torch.randint(0, 256, (4000, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad():
        predictions = fitted[0].eval()(images)
    for labels, rate, num_training in (
        (predictions.pred_label, 0.05, NUM_IMAGES),
        (predictions.pred_mask, 0.01, NUM_IMAGES * SIZE**2),
    ):
        # a threshold drawn from one sample, a rate from another, both binomial
        deviation = (rate * (1 - rate) * (1 / num_training + 1 / labels.numel())) ** 0.5
        assert abs(float(labels.float().mean()) - rate) < 4 * deviation


def test_thresholds_are_one_half_of_the_normalised_scale(fitted: tuple[Tiny, Path], noise: Path) -> None:
    model = fitted[0]
    with torch.no_grad():
        raw = model.model(images_in(noise / "good"))
        scaled = model.post_processor(raw)
    for kind, scores, normalised in (
        ("image", raw.pred_score, scaled.pred_score),
        ("pixel", raw.anomaly_map, scaled.anomaly_map),
    ):
        threshold = getattr(model.post_processor, f"{kind}_threshold")
        assert normalised[scores == threshold].unique().tolist() == [0.5]
        assert float(normalised[scores == scores.min()][0]) == pytest.approx(0, abs=1e-6)
        order = scores.flatten().argsort()
        assert bool((normalised.flatten()[order].diff() >= 0).all())


def test_raw_scores_are_compared_with_raw_thresholds(noise: Path, tmp_path: Path) -> None:
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.01, enable_normalization=False))
    engine = fit(model, normal_only(noise), tmp_path)
    batches = engine.predict(model, dataloaders=normal_only_loader(noise))
    scores, masks = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("anomaly_map", "pred_mask"))
    assert float(scores.max()) > 30
    assert int(masks.sum()) == int(0.01 * masks.numel())
    assert torch.equal(masks.bool(), scores > model.post_processor.pixel_threshold)


def normal_only_loader(noise: Path):
    datamodule = normal_only(noise)
    datamodule.setup()
    return datamodule.train_dataloader()


@pytest.mark.parametrize("post_processor", [True, FalsePositiveRatePostProcessor(pixel_fpr=0.1)])
def test_checkpoint_holds_the_thresholds(
    fitted: tuple[Tiny, Path], noise: Path, post_processor: PostProcessor | bool
) -> None:
    loaded = Tiny.load_from_checkpoint(fitted[1], post_processor=post_processor)
    assert thresholds(loaded) == thresholds(fitted[0])
    images = images_in(noise / "good")
    with torch.no_grad():
        expected, result = fitted[0].eval()(images), loaded.eval()(images)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        assert torch.equal(getattr(result, name), getattr(expected, name))


def test_exported_model_gives_the_same_labels(fitted: tuple[Tiny, Path], noise: Path, tmp_path: Path) -> None:
    model = Tiny.load_from_checkpoint(fitted[1])
    path = Engine(default_root_dir=tmp_path).export(model, ExportType.OPENVINO, export_root=tmp_path)
    exported = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = images_in(noise / "good")
    result = exported(images.numpy())
    with torch.no_grad():
        expected = model.eval()(images)
    # an image or a pixel whose score is the threshold may be rounded to either side
    for name, scores in (("pred_label", expected.pred_score), ("pred_mask", expected.anomaly_map)):
        clear = scores.numpy() != 0.5
        assert (~clear).sum() == 1
        labels = getattr(expected, name).numpy()[clear]
        assert np.array_equal(result[name].reshape(clear.shape)[clear], labels)


def test_validation_has_no_influence(noise: Path, stripes: Path, tmp_path: Path) -> None:
    """The anomalous validation images of anomalib's default splits."""
    modes = "same_as_test", "none"
    datamodules = [MVTecAD(root=stripes, category="stripes", num_workers=0, val_split_mode=mode) for mode in modes]
    models = [Tiny(post_processor=FalsePositiveRatePostProcessor()) for _ in datamodules]
    for index, (model, datamodule) in enumerate(zip(models, datamodules, strict=True)):
        engine = fit(model, datamodule, tmp_path / str(index))
        before = thresholds(model)
        if index == 0:
            engine.validate(model, datamodule=datamodule)
        engine.test(model, datamodule=datamodule, ckpt_path=engine.best_model_path)
        assert thresholds(model) == before
    first, second = (model.post_processor.state_dict() for model in models)
    assert first == second


def test_each_checkpoint_gets_thresholds_of_its_own_weights(noise: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    callback = ModelCheckpoint(dirpath=kept, filename="{epoch}", monitor="weight", mode="min", save_top_k=2)
    model = Tiny(growth=2.0, post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.01))
    fit(model, normal_only(noise), tmp_path, max_epochs=2, callbacks=[callback])
    early, late = (Tiny.load_from_checkpoint(path) for path in sorted(kept.iterdir()))
    assert thresholds(late) == thresholds(model)
    assert thresholds(late)[1] > 100 * thresholds(early)[1]
    for loaded in (early, late):
        with torch.no_grad():
            predictions = loaded.eval()(images_in(noise / "good"))
        assert int(predictions.pred_mask.sum()) == 0.01 * NUM_IMAGES * SIZE**2


def test_fit_from_a_finished_training_sets_other_rates(fitted: tuple[Tiny, Path], noise: Path, tmp_path: Path) -> None:
    before = fitted[1].read_bytes()
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.2))
    engine = fit(model, normal_only(noise), tmp_path, ckpt_path=fitted[1])
    assert fitted[1].read_bytes() == before
    loaded = Tiny.load_from_checkpoint(engine.best_model_path)
    for result in (model, loaded):
        with torch.no_grad():
            predictions = result.eval()(images_in(noise / "good"))
        assert int(predictions.pred_mask.sum()) == 0.2 * NUM_IMAGES * SIZE**2


def test_a_fit_takes_the_values_of_the_constructor(fitted: tuple[Tiny, Path], noise: Path, tmp_path: Path) -> None:
    """Not those of the checkpoint that it goes on from."""
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(enable_normalization=False))
    engine = fit(model, normal_only(noise), tmp_path, ckpt_path=fitted[1])
    assert not model.post_processor.enable_normalization
    loaded = Tiny.load_from_checkpoint(engine.best_model_path)
    assert not loaded.post_processor.enable_normalization
    assert torch.equal(loaded.post_processor.image_threshold, model.post_processor.image_threshold.cpu())


def test_held_out_normal_images(noise: Path, tmp_path: Path) -> None:
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.01, split="val"))
    datamodule = normal_only(noise, val_split_mode="from_train", val_split_ratio=0.25, seed=0)
    fit(model, datamodule, tmp_path)
    images = torch.stack([item.image for item in datamodule.val_data])
    assert len(images) == NUM_IMAGES // 4
    with torch.no_grad():
        assert int(model.eval()(images).pred_mask.sum()) == 0.01 * images[:, 0].numel()


@pytest.mark.parametrize("name", ["Padim", "InTra"])
def test_models_whose_last_step_follows_the_epochs(stripes: Path, tmp_path: Path, name: str) -> None:
    post_processor = FalsePositiveRatePostProcessor(pixel_fpr=0.01, image_fpr=0.25)
    if name == "Padim":
        pre_processor = Padim.configure_pre_processor((64, 64))
        model = Padim("resnet18", pre_trained=False, pre_processor=pre_processor, post_processor=post_processor)
    else:
        model = InTra(
            image_size=64, patch_size=8, window_size=5, embed_dim=16, depth=2, num_heads=2, windows_per_image=10,
            post_processor=post_processor,
        )  # fmt: skip
    datamodule = MVTecAD(root=stripes, category="stripes", num_workers=0, val_split_mode="none", test_split_mode="none")
    engine = fit(model, datamodule, tmp_path)
    loaded = type(model).load_from_checkpoint(engine.best_model_path).eval()
    assert thresholds(loaded) == thresholds(model)
    images = images_in(stripes / "stripes" / "train" / "good")
    with torch.no_grad():
        predictions = loaded(images)
    assert int(predictions.pred_label.sum()) == 3
    assert int(predictions.pred_mask.sum()) == int(0.01 * images[:, 0].numel())


def test_two_processes_agree_with_one(fitted: tuple[Tiny, Path], noise: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.test_post_processing import FalsePositiveRatePostProcessor, Tiny, fit, normal_only, thresholds\n"
        "root, folder = map(Path, sys.argv[1:])\n"
        "model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.01, image_fpr=0.05))\n"
        "engine = fit(model, normal_only(root), folder, devices=2, strategy='ddp')\n"
        "(folder / f'rank{engine.trainer.global_rank}.json').write_text(json.dumps(thresholds(model)))\n"
    )
    project = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, str(script), str(noise), str(tmp_path)],
        check=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) == thresholds(fitted[0])


def test_post_processor_is_chosen_on_the_command_line(noise: Path) -> None:
    name = "anomalib_recon.post_processing.FalsePositiveRatePostProcessor"
    for model, *arguments in (["Padim", "--model.pre_trained", "false"], ["InTra"]):
        cli = AnomalibCLI(
            ["fit", "--model", model, *arguments, "--model.post_processor", name,
             "--model.post_processor.pixel_fpr", "0.01", "--data", "Folder", "--data.name", "noise",
             "--data.normal_dir", str(noise / "good")],
            run=False,
        )  # fmt: skip
        assert isinstance(cli.model.post_processor, FalsePositiveRatePostProcessor)
        assert cli.model.post_processor.pixel_fpr == 0.01


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.07, 0.29, 0.5])
def test_thresholds_of_a_stream_are_those_of_all_scores(rate: float) -> None:
    scores = torch.randn(50, 1, 4, 5, generator=torch.Generator().manual_seed(0)).mul(8).round()
    stream = HighestScores(0.5, len(scores))
    for batch in scores.split(7):
        stream.update(batch.numpy())
    allowed = [value for value in scores.unique() if int((scores > value).sum()) <= round(rate * 1000)]
    assert stream.threshold(rate) == float(min(allowed))


def test_maps_of_different_sizes_stay_below_the_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 1, 4, 4, generator=generator) + 3, torch.randn(1, 1, 64, 64, generator=generator)]
    stream = HighestScores(0.1, 2)
    for values in maps:
        stream.update(values.numpy())
    scores = torch.cat([values.flatten() for values in maps])
    assert float((scores > stream.threshold(0.1)).float().mean()) <= 0.1


def test_rates_that_the_images_cannot_resolve_are_announced(noise: Path, tmp_path: Path) -> None:
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(image_fpr=0.004))
    with pytest.warns(UserWarning, match="image_fpr 0.004 cannot be resolved with 200 normal images") as record:
        fit(model, normal_only(noise), tmp_path)
    assert sum("cannot be resolved" in str(warning.message) for warning in record) == 1
    with torch.no_grad():
        highest = model.model(images_in(noise / "good")).pred_score.max()
    assert thresholds(model)[0] == float(highest)


def test_at_a_rate_of_0_the_thresholds_are_the_highest_scores_of_normal_images(
    noise: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = Tiny(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0, image_fpr=0))
    fit(model, normal_only(noise), tmp_path)
    with torch.no_grad():
        raw = model.model(images_in(noise / "good"))
    assert thresholds(model) == [float(raw.pred_score.max()), float(raw.anomaly_map.max())]
    assert not any("cannot be resolved" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pixel_fpr": -0.1}, "pixel_fpr must be at least 0 and below 1, got -0.1"),
        ({"image_fpr": 5}, "image_fpr must be at least 0 and below 1, got 5"),
        ({"image_fpr": "0.05"}, "image_fpr must be a finite number, got '0.05'"),
        ({"split": "test"}, "split must be 'train' or 'val', got 'test'"),
    ],
)
def test_arguments_are_checked(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FalsePositiveRatePostProcessor(**arguments)


def test_missing_images_are_reported_before_training(noise: Path, tmp_path: Path) -> None:
    model = Tiny(growth=2.0, post_processor=FalsePositiveRatePostProcessor(split="val"))
    with pytest.raises(ValueError, match="needs a datamodule of anomalib with a val set"):
        fit(model, normal_only(noise), tmp_path)
    datamodule = normal_only(noise)
    datamodule.setup("fit")
    datamodule.train_data.samples = datamodule.train_data.samples.assign(label_index=1)
    datamodule._is_setup = True
    model.post_processor = FalsePositiveRatePostProcessor()
    with pytest.raises(
        ValueError, match="None of the 200 images of the training or validation set is normal; check the root"
    ):
        fit(model, datamodule, tmp_path)
    assert model.model.weight[0].item() == 30


def test_an_error_before_the_set_up_is_the_one_that_is_raised(noise: Path, tmp_path: Path) -> None:
    class Broken(Callback):
        def setup(self, *args, **kwargs) -> None:
            message = "no such image"
            raise OSError(message)

    model = Tiny(post_processor=FalsePositiveRatePostProcessor())
    with pytest.raises(OSError, match="no such image"):
        fit(model, normal_only(noise), tmp_path, callbacks=[Broken()])


def test_nan_scores_are_refused(noise: Path, tmp_path: Path) -> None:
    model = Tiny(growth=float("nan"), post_processor=FalsePositiveRatePostProcessor())
    with pytest.raises(ValueError, match="NaN or infinite, so no threshold can be set"):
        fit(model, normal_only(noise), tmp_path)


def test_models_without_training_are_refused(noise: Path, tmp_path: Path) -> None:
    class ZeroShot(Tiny):
        learning_type = LearningType.ZERO_SHOT

    model = ZeroShot(post_processor=FalsePositiveRatePostProcessor())
    with pytest.raises(ValueError, match=r"which ZeroShot .* has not; leave post_processor out"):
        fit(model, normal_only(noise, val_split_mode="from_train"), tmp_path)

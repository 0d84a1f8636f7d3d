# SPDX-License-Identifier: Apache-2.0

import logging
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import anomalib.data.datasets.base.image as anomalib_images
import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize

from anomalib_recon.data import LabelledFolder
from anomalib_recon.metrics import AUROC, RawScoreEvaluator
from anomalib_recon.models import ADTR, SAAE
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
from anomalib_recon.pre_processing import ExactResizePreProcessor
from anomalib_recon.training import FeatureBatch
from tests.conftest import images_in
from tests.decodes import count_decodes
from tests.tiny_models import build as build_tiny

ARGUMENTS: dict[type[ADTR | SAAE], dict[str, Any]] = {
    ADTR: {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": 32, "feature_size": 4, "embed_dim": 16,
        "depth": 1, "num_heads": 2, "mlp_dim": 16, "pool_size": 8,
    },
    SAAE: {
        "backbone": "vit_tiny_patch16_224", "layers": ["patch_embed", "blocks.0"], "image_size": 64, "latent_dim": 6,
    },
}  # fmt: skip
# of ADTR: twelve images' (64 + 128) * 4 * 4 features in half precision
ADTR_GIB = 12 * 192 * 16 * 2 / 2**30


def build(model_class: type[ADTR | SAAE], seed: int = 0, **arguments: Any) -> ADTR | SAAE:
    seed_everything(seed)
    common = {"pre_trained": False, "learning_rate": 2e-3, "visualizer": False}
    return model_class(**{**ARGUMENTS[model_class], **common, **arguments})


def build_without_cache(model_class: type[ADTR | SAAE], **arguments: Any) -> ADTR | SAAE:
    """A model that computes features in each step, and rounds them as the cache does."""
    model = build(model_class, feature_cache_gib=0, **arguments)
    exact = model.training_inputs

    def training_inputs(batch: Any) -> tuple[Tensor, ...]:
        features, *others = exact(batch)
        return features.half().to(features.dtype), *others

    model.training_inputs = training_inputs
    return model


def data(root: Path, **arguments: Any) -> MVTecAD:
    """Twelve training images in batches of 5, 5 and 2."""
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **arguments})


def labelled_data(root: Path) -> LabelledFolder:
    """Twelve normal training images and three with holes."""
    return LabelledFolder(
        name="stripes", root=root / "stripes", normal_dir="train/good", normal_test_dir="test/good",
        abnormal_dir="test/hole", mask_dir="ground_truth/hole", train_abnormal_dir="test/hole",
        train_mask_dir="ground_truth/hole", num_train_abnormal=3, train_batch_size=5, num_workers=0,
    )  # fmt: skip


class Watch(Callback):
    """Notes for each training batch whether it came from the cache."""

    def __init__(self) -> None:
        self.cached: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.cached.append(isinstance(batch, FeatureBatch))


class Kill(Callback):
    """Ends a run in the middle of its third epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise KeyError


def train(
    model: ADTR | SAAE, datamodule: Any, folder: Path, ckpt_path: Path | None = None, seed: int = 1, **trainer: Any
) -> tuple[dict[str, Tensor], Watch]:
    """Train; the results are the weights, and what was seen."""
    seed_everything(seed)
    watch = Watch()
    callbacks = [watch, *trainer.pop("callbacks", [])]
    defaults = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
    engine = Engine(default_root_dir=folder, callbacks=callbacks, **{**defaults, **trainer})
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in model.model.state_dict().items()}, watch


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"limit_train_batches": 2},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_weights_are_those_of_features_in_half_precision(
    stripes: Path, tmp_path: Path, model_class: type[ADTR | SAAE], trainer: dict
) -> None:
    weights, watch = train(build_without_cache(model_class), data(stripes), tmp_path, **trainer)
    assert not any(watch.cached)
    same, seen = train(build(model_class), data(stripes), tmp_path, **trainer)
    assert all(seen.cached)
    assert len(seen.cached) == len(watch.cached)
    assert_same(weights, same)


@pytest.mark.alone
def test_random_numbers_are_those_of_loading_in_worker_processes(stripes: Path, tmp_path: Path) -> None:
    weights, _ = train(build_without_cache(ADTR), data(stripes, num_workers=2), tmp_path)
    assert_same(weights, train(build(ADTR), data(stripes, num_workers=2), tmp_path)[0])


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_half_precision_changes_weights_and_scores_little(
    stripes: Path, tmp_path: Path, model_class: type[ADTR | SAAE]
) -> None:
    """In an epoch of gradient descent, the weights by less than 0.5 % of their way, the scores by less than 0.01 %.

    In many steps of Adam any difference grows, also one of 1e-7: where gradients are zero but for rounding, and in
    SAAE by batch normalisation.
    """
    images = images_in(stripes / "stripes" / "test" / "hole")
    start = build(model_class).model.state_dict()
    weights, scores = [], []
    for feature_cache_gib in (0.0, 2.0):
        model = build(model_class, feature_cache_gib=feature_cache_gib)
        names = [name for name, weight in model.model.named_parameters() if weight.requires_grad]
        descent = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-4)
        model.configure_optimizers = lambda descent=descent: descent
        weights.append(train(model, data(stripes), tmp_path, max_epochs=1)[0])
        with torch.no_grad():
            scores.append(model.eval().model(model.pre_processor(images)).pred_score)

    def distance(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((state[name] - other[name]).square().sum()) for name in names) ** 0.5

    exact, rounded = weights
    assert 0 < distance(exact, rounded) < 5e-3 * distance(exact, start)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("model_class", "arguments"), [(ADTR, {}), (SAAE, {"latent_dim": None})])
def test_a_fit_loads_each_image_and_runs_the_backbone_on_it_once(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_class: type[ADTR | SAAE], arguments: dict
) -> None:
    loaded, batch_sizes = [], []
    read_image = anomalib_images.read_image
    monkeypatch.setattr(
        anomalib_images, "read_image", lambda path, **kwargs: (loaded.append(path), read_image(path, **kwargs))[1]
    )
    model = build(model_class, **arguments)
    model.model.backbone.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    with count_decodes() as decodes:
        train(model, data(stripes), tmp_path)
    paths = sorted(str(path) for path in (stripes / "stripes" / "train" / "good").iterdir())
    assert sorted(map(str, loaded)) == paths
    assert sum(batch_sizes) == len(paths)
    # once more before, in search of files that cannot be read
    assert {path: decodes[path] for path in paths} == dict.fromkeys(paths, 2)


def test_the_latent_width_follows_from_the_cache(stripes: Path, tmp_path: Path) -> None:
    model = build(SAAE, latent_dim=None, explained_variance=0.9)
    train(model, data(stripes), tmp_path, max_epochs=1)
    features = model.model.embed(images_in(stripes / "stripes" / "train" / "good"))
    vectors = features.movedim(1, -1).flatten(0, 2).double().numpy()
    expected = PCA(n_components=0.9, svd_solver="full").fit(vectors).n_components_
    assert model.hparams["latent_dim"] == expected > 1


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_images_are_needed_before_the_first_step_only(
    stripes: Path, tmp_path: Path, model_class: type[ADTR | SAAE]
) -> None:
    root = Path(shutil.copytree(stripes, tmp_path / "data"))

    class Remove(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            shutil.rmtree(root / "stripes" / "train")

    weights, _ = train(build(model_class), data(root), tmp_path, callbacks=[Remove()])
    assert not list(root.glob("stripes/train/good/*"))
    assert_same(weights, train(build_without_cache(model_class), data(stripes), tmp_path)[0])


@pytest.mark.parametrize("labels", ["pixel", "image"])
def test_anomalies_are_learned_from_the_cache(stripes: Path, tmp_path: Path, labels: str) -> None:
    train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
    arguments = {"labels": labels, "alpha": 1.0, "top_k": 4, "normal_checkpoint": next(tmp_path.rglob("model.ckpt"))}
    weights, _ = train(build_without_cache(ADTR, **arguments), labelled_data(stripes), tmp_path)
    same, watch = train(build(ADTR, **arguments), labelled_data(stripes), tmp_path)
    assert all(watch.cached)
    assert_same(weights, same)
    other, _ = train(build(ADTR, **{**arguments, "alpha": 2.0}), labelled_data(stripes), tmp_path)
    assert not torch.equal(other["reduce.weight"], weights["reduce.weight"])


@pytest.mark.parametrize("arguments", [{}, {"labels": "image", "top_k": 4}], ids=str)
def test_a_fit_without_an_epoch_left_changes_nothing(stripes: Path, tmp_path: Path, arguments: dict) -> None:
    train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
    if arguments:
        arguments = {**arguments, "normal_checkpoint": next(tmp_path.rglob("model.ckpt"))}
    model = build(ADTR, **(arguments or {"feature_scale": "stage"}))
    engine = Engine(default_root_dir=tmp_path / "again", max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    datamodule = labelled_data(stripes) if arguments else data(stripes)
    engine.fit(model, datamodule=datamodule)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.backbone.register_forward_hook(lambda module, args, maps: [2 * features for features in maps])
    engine.fit(model, datamodule=datamodule)
    assert_same(before, dict(model.state_dict()))


def test_interrupted_run_resumes_to_the_same_weights(stripes: Path, tmp_path: Path) -> None:
    weights, _ = train(build(ADTR), data(stripes), tmp_path / "whole")
    with pytest.raises(KeyError):
        train(build(ADTR), data(stripes), tmp_path / "killed", callbacks=[Kill()])
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    resumed, watch = train(build(ADTR), data(stripes), tmp_path / "rest", ckpt_path=checkpoint, seed=9)
    assert watch.cached == 2 * 3 * [True]
    assert_same(weights, resumed)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_features_are_those_of_the_backbone_in_a_checkpoint(stripes: Path, tmp_path: Path, is_resumed: bool) -> None:
    """They may come after the cache is filled: in a run that is continued. ADTR+ starts from others, too."""
    train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    arguments = {} if is_resumed else {"labels": "image", "top_k": 4, "normal_checkpoint": checkpoint}
    results = []
    for make in (build_without_cache, build):
        model, sizes = make(ADTR, seed=5, **arguments), []
        model.model.backbone.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        datamodule = data(stripes) if is_resumed else labelled_data(stripes)
        weights, watch = train(
            model, datamodule, tmp_path / "other", ckpt_path=checkpoint if is_resumed else None, max_epochs=2
        )
        results.append(weights)
    assert all(watch.cached)
    assert_same(*results)
    assert is_resumed or sum(sizes) == len(datamodule.train_data)


class Look(Callback):
    """Notes what a datamodule loads training images with."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def setup(self, trainer, pl_module, stage) -> None:
        self.note(trainer.datamodule)

    def on_train_start(self, trainer, pl_module) -> None:
        self.note(trainer.datamodule)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.note(trainer.datamodule)

    def note(self, datamodule: MVTecAD) -> None:
        self.seen.append((datamodule.train_data, datamodule.num_workers, datamodule.external_collate_fn))


@pytest.mark.alone
def test_the_datamodule_stays_as_it_was(stripes: Path, tmp_path: Path) -> None:
    # in setup, at the start and in each step of the training, and after it
    ends = {"all epochs": 12, "an exception": 11, "no epoch": 2}
    for end, times in ends.items():
        datamodule, look = data(stripes, num_workers=2), Look()
        datamodule.external_collate_fn = ImageBatch.collate
        with pytest.raises(KeyError) if end == "an exception" else nullcontext():
            train(
                build(ADTR), datamodule, tmp_path, max_epochs=0 if end == "no epoch" else 3,
                callbacks=[look, *([Kill()] if end == "an exception" else [])],
            )  # fmt: skip
        look.note(datamodule)
        train_data = look.seen[0][0]
        assert len(train_data) == 12
        assert look.seen == times * [(train_data, 2, ImageBatch.collate)], end
        assert "train_dataloader" not in vars(datamodule)
        assert next(iter(datamodule.train_dataloader())).image.shape == (5, 3, 32, 32)


@pytest.mark.alone
def test_a_validation_amid_training_has_the_worker_processes_of_the_datamodule(stripes: Path, tmp_path: Path) -> None:
    seen = []

    class Loaders(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            seen.append((trainer.current_epoch, trainer.val_dataloaders.num_workers, trainer.train_dataloader))

    model = build(ADTR, evaluator=RawScoreEvaluator(val_metrics=[AUROC(["pred_score", "gt_label"])]))
    _, watch = train(
        model, data(stripes, num_workers=2), tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[Loaders()],
        num_sanity_val_steps=0,
    )  # fmt: skip
    assert all(watch.cached)
    assert [(epoch, workers) for epoch, workers, _ in seen] == [(0, 2), (1, 2)]
    assert {loader.num_workers for *_, loader in seen} == {0}


def test_warnings_stay_as_they_were(stripes: Path, tmp_path: Path) -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
        assert warnings.filters == filters
        assert not [warning for warning in record if "does not have many workers" in str(warning.message)]
    assert warnings.filters == before


def test_batches_are_read_into_the_same_memory(stripes: Path, tmp_path: Path) -> None:
    model = build(ADTR)
    kept = []  # memory that is held cannot be given out again

    def keep(module: Any, args: tuple[Tensor]) -> None:
        if model.training:
            kept.append(args[0])

    model.model.reduce.register_forward_pre_hook(keep)
    train(model, data(stripes), tmp_path, max_epochs=2)
    assert [len(features) for features in kept] == 2 * [5, 5, 2]
    assert len({features.data_ptr() for features in kept}) == 1


@pytest.mark.parametrize("callbacks", [[], [Kill()]], ids=["whole", "interrupted"])
def test_nothing_is_left_of_the_cache(stripes: Path, tmp_path: Path, callbacks: list[Callback]) -> None:
    model = build(SAAE)
    with pytest.raises(KeyError) if callbacks else nullcontext():
        train(model, data(stripes), tmp_path, callbacks=callbacks)
    assert model.feature_cache.read(FeatureBatch(torch.arange(2))) == ()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".ckpt"}


def test_a_second_fit_sees_new_images(stripes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(stripes, tmp_path / "data"))
    paths = sorted((root / "stripes" / "train" / "good").iterdir())
    model, datamodule = build(ADTR), data(root)
    train(model, datamodule, tmp_path)
    for path in paths:
        Image.open(path).rotate(90).save(path)
    # the same weights to start from
    model.load_state_dict(build(ADTR).state_dict())
    weights, watch = train(model, datamodule, tmp_path)
    assert all(watch.cached)
    assert_same(weights, train(build_without_cache(ADTR), data(root), tmp_path)[0])


FLIP = RandomHorizontalFlip()
SIZE = Resize((32, 32), antialias=True)
AUGMENTED = "the training images are not only resized to a fixed height and width"


class OwnLoader(MVTecAD):
    """Has a training dataloader of its own."""

    def train_dataloader(self) -> DataLoader:
        return super().train_dataloader()


@pytest.mark.parametrize(
    ("model", "datamodule", "trainer", "reason"),
    [
        ({"feature_cache_gib": 0}, {}, {}, "feature_cache_gib=0"),
        ({}, {"train_augmentations": FLIP}, {}, AUGMENTED),
        ({}, {"augmentations": Compose([SIZE, FLIP])}, {}, AUGMENTED),
        ({"pre_processor": ExactResizePreProcessor(Compose([SIZE, FLIP]))}, {}, {}, AUGMENTED),
        ({"pre_processor": ExactResizePreProcessor(Resize(32))}, {}, {}, AUGMENTED),
        ({"pre_processor": False, "image_size": 64}, {}, {}, AUGMENTED),
        ({"pre_processor": PreProcessor(SIZE)}, {}, {}, "the pre-processor is not an ExactResizePreProcessor"),
        ({"labels": "pixel", "confetti": 0.5}, {}, {}, "confetti is drawn on images"),
        ({}, {}, {"reload_dataloaders_every_n_epochs": 1}, "the dataloader changes between epochs"),
        ({"feature_cache_gib": 0.99 * ADTR_GIB}, {}, {}, "0.0 GiB are more than feature_cache_gib=6.79779e-05"),
    ],
)
def test_off_where_features_may_change_or_do_not_fit(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    model: dict, datamodule: dict, trainer: dict, reason: str,
) -> None:  # fmt: skip
    if "labels" in model:
        train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
        model = {**model, "normal_checkpoint": next(tmp_path.rglob("model.ckpt"))}
    caplog.clear()
    caplog.set_level(logging.INFO)
    _, watch = train(build(ADTR, **model), data(stripes, **datamodule), tmp_path, max_epochs=1, **trainer)
    assert watch.cached == 3 * [False]
    [line] = [message for message in caplog.messages if message.startswith("Features")]
    assert line == f"Features are computed anew in each epoch: {reason}."


@pytest.mark.parametrize(
    "arguments", [{"feature_cache_gib": 0.99 * ADTR_GIB}, {"pre_processor": PreProcessor(SIZE)}], ids=str
)
def test_what_is_not_cached_is_trained_on_as_without_a_cache(stripes: Path, tmp_path: Path, arguments: dict) -> None:
    weights, _ = train(build(ADTR, feature_cache_gib=0), data(stripes), tmp_path)
    assert_same(weights, train(build(ADTR, **arguments), data(stripes), tmp_path)[0])


def test_off_where_the_datamodule_has_a_loader_of_its_own(stripes: Path, tmp_path: Path) -> None:
    datamodule = OwnLoader(root=stripes, category="stripes", train_batch_size=5, num_workers=0)
    assert train(build(ADTR), datamodule, tmp_path, max_epochs=1)[1].cached == 3 * [False]


def test_off_where_features_are_beyond_half_precision(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def large() -> ADTR:
        model = build(ADTR, feature_scale="stage")  # the network itself gets numbers that it can compute with
        model.model.backbone.register_forward_hook(lambda module, args, maps: [1e5 * features for features in maps])
        return model

    caplog.set_level(logging.INFO)
    weights, watch = train(large(), data(stripes), tmp_path, max_epochs=1)
    assert watch.cached == 3 * [False]
    assert "computed anew in each epoch: features up to " in caplog.text
    assert all(value.isfinite().all() for value in weights.values())


def test_a_cycle_of_the_learning_rate_leaves_it_on(stripes: Path, tmp_path: Path) -> None:
    _, watch = train(build(ADTR, use_one_cycle=True), data(stripes), tmp_path, max_epochs=2)
    assert watch.cached == 6 * [True]


@pytest.mark.parametrize("feature_cache_gib", [0.0, 1.0])
def test_statistics_are_of_images_as_the_test_crops_them(
    stripes: Path, tmp_path: Path, feature_cache_gib: float
) -> None:
    models = [
        build_tiny("FeatureInpainting", image_size=32, rank=0, feature_cache_gib=feature_cache_gib) for _ in range(2)
    ]
    weights, _ = train(models[0], data(stripes, augmentations=CenterCrop(16)), tmp_path / "cropped", max_epochs=1)
    root = shutil.copytree(stripes, tmp_path / "data")
    for path in root.rglob("train/good/*.png"):
        with Image.open(path) as image:
            image.load()
            image.crop((24, 24, 40, 40)).save(path)
    expected, _ = train(models[1], data(root), tmp_path, max_epochs=1)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-4)


def test_off_without_a_datamodule(stripes: Path, tmp_path: Path) -> None:
    datamodule = data(stripes, augmentations=SIZE)
    datamodule.setup()
    watch = Watch()
    engine = Engine(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False, callbacks=[watch]
    )
    loaders = {"train_dataloaders": datamodule.train_dataloader(), "val_dataloaders": datamodule.val_dataloader()}
    engine.fit(build(ADTR), **loaders)
    assert watch.cached == 3 * [False]


@pytest.mark.parametrize(
    ("model", "datamodule"),
    [
        ({"feature_cache_gib": 1.01 * ADTR_GIB}, {}),
        ({}, {"augmentations": Resize((48, 48))}),
        ({"pre_processor": False}, {"augmentations": SIZE}),
    ],
)
def test_the_log_says_where_features_are(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, model: dict, datamodule: dict
) -> None:
    caplog.set_level(logging.INFO)
    _, watch = train(build(ADTR, **model), data(stripes, **datamodule), tmp_path, max_epochs=1)
    assert watch.cached == 3 * [True]
    assert "Features of 12 images are kept on cpu: 0.00 GiB." in caplog.messages


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_a_negative_size_is_refused(model_class: type[ADTR | SAAE]) -> None:
    with pytest.raises(ValueError, match="feature_cache_gib must not be negative, got -1"):
        build(model_class, feature_cache_gib=-1)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_thresholds_at_a_false_positive_rate_are_the_same(
    model_class: type[ADTR | SAAE], stripes: Path, tmp_path: Path, split: Literal["train", "val"]
) -> None:
    thresholds = []
    for make, is_cached in ((build_without_cache, False), (build, True)):
        post_processor = FalsePositiveRatePostProcessor(pixel_fpr=0.1, image_fpr=0.2, split=split)
        model = make(model_class, post_processor=post_processor)
        _, watch = train(model, data(stripes), tmp_path / str(is_cached))
        assert any(watch.cached) == is_cached
        thresholds.append((float(post_processor.image_threshold), float(post_processor.pixel_threshold)))
    assert thresholds[0] == thresholds[1]

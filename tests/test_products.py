# SPDX-License-Identifier: Apache-2.0

"""Several products in one model: trained together, with thresholds and metrics of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.utils.path import generate_output_filename
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from anomalib_recon.card import write_folder
from anomalib_recon.data import SeveralCategories
from anomalib_recon.deploy import ExportedModel
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models import SAAE
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor, ProductPostProcessor
from anomalib_recon.pretrained import load_pretrained
from tests.conftest import images_in, save
from tests.test_region import Tiny
from tests.tiny_models import TINY, checkpoint_of, engine_in

NAMES = ["dark", "bright"]
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec AD's layout; good images of the bright one are brighter than bad ones of the dark one."""
    root, random = tmp_path_factory.mktemp("products"), np.random.default_rng(0)
    for name, low in zip(NAMES, (0.1, 0.6), strict=True):
        for folder, count in {"train/good": 20, "test/good": 6, "test/spot": 5}.items():
            for index in range(count):
                image, mask = low + 0.1 * random.random((SIZE, SIZE)), np.zeros((SIZE, SIZE))
                if folder == "test/spot":
                    mask[4:8, 4:8] = 1
                    save(mask, root / name / "ground_truth" / "spot" / f"{index:03d}_mask.png")
                save(
                    np.where(mask > 0, image + 0.08 * random.random(), image), root / name / folder / f"{index:03d}.png"
                )
    return root


def datamodule(root: Path, names: list[str]) -> SeveralCategories:
    return SeveralCategories(root, names, num_workers=0, eval_batch_size=7)


def test_pictures_are_named_by_category_wherever_the_root_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (tmp_path / "link").symlink_to(root)
    for given in (Path(), tmp_path / "link"):
        data = datamodule(given, NAMES)
        data.setup()
        good = [item.image_path for item in data.test_data if not item.gt_label]
        assert data.name in Path(good[0]).parts
        names = {generate_output_filename(path, tmp_path, data.name, data.category, mkdir=False) for path in good}
        assert len(names) == len(good) == 12


def test_masks_of_some_defects_alone_are_refused(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("results"))
    shutil.rmtree(copy / "bright" / "ground_truth")
    with pytest.raises(ValueError, match=r"categories must all have masks, or none, but there is no folder .*bright"):
        datamodule(copy, NAMES).setup()
    shutil.rmtree(copy / "dark" / "ground_truth")
    data = datamodule(copy, NAMES)
    data.setup()
    assert data.test_data.task == TaskType.CLASSIFICATION


def run(root: Path, names: list[str], post_processor: PostProcessor, products: list[str] | None) -> tuple:
    model = Tiny(post_processor=post_processor, evaluator=RawScoreEvaluator(products=products))
    engine = Engine(default_root_dir=root / "results", accelerator="cpu", enable_progress_bar=False, logger=False)
    engine.fit(model, datamodule=datamodule(root, names))
    return model, engine, engine.test(model, datamodule=datamodule(root, names), verbose=False)[0]


@pytest.fixture(scope="module")
def together(root: Path) -> tuple:
    return run(root, NAMES, ProductPostProcessor(NAMES, pixel_fpr=0.01, image_fpr=0.1), NAMES)


def test_thresholds_and_metrics_are_those_of_each_product_alone(root: Path, together: tuple) -> None:
    model, _, metrics = together
    for index, name in enumerate(NAMES):
        single = FalsePositiveRatePostProcessor(pixel_fpr=0.01, image_fpr=0.1)
        alone, _, expected = run(root, [name], single, None)
        for buffer, value in alone.post_processor.named_buffers():
            assert torch.equal(model.post_processor.get_buffer(buffer)[index], value)
        assert {key: metrics[f"{name}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
    # a threshold for all finds no dark defect
    _, _, shared = run(root, NAMES, FalsePositiveRatePostProcessor(pixel_fpr=0.01, image_fpr=0.1), NAMES)
    assert shared["dark_image_F1Score"] == 0
    assert metrics["dark_image_F1Score"] > 0.5


def test_metrics_of_all_images_are_those_of_scikit_learn(root: Path, together: tuple) -> None:
    model, _, metrics = together
    scores, labels = [], []
    for name in NAMES:
        for kind in ("good", "spot"):
            raw = model.model(images_in(root / name / "test" / kind)).pred_score
            scores, labels = [*scores, *raw.tolist()], [*labels, *[kind == "spot"] * len(raw)]
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert len(metrics) == 15


def test_predictions_and_exports_have_the_thresholds_of_their_product(
    root: Path, together: tuple, tmp_path: Path
) -> None:
    model, engine, _ = together
    for name in NAMES:
        images = PredictDataset(root / name / "train" / "good")
        [batch] = engine.predict(model, dataloaders=DataLoader(images, batch_size=20, collate_fn=images.collate_fn))
        assert int(batch.pred_label.sum()) == 2
        assert int(batch.pred_mask.sum()) <= 0.01 * 20 * SIZE**2
        single = Tiny(post_processor=model.post_processor.for_product(name))
        exported = ExportedModel(single.to_openvino(tmp_path / name, input_size=(SIZE, SIZE)))
        alone = exported(images_in(root / name / "train" / "good").numpy())
        for scores, labels in (("pred_score", "pred_label"), ("anomaly_map", "pred_mask")):
            expected = getattr(batch, scores).numpy()
            np.testing.assert_allclose(alone[scores].reshape(expected.shape), expected, atol=1e-3)
            clear = np.abs(expected - 0.5) > 1e-3  # constants are stored in fp16, so a score may change sides
            same = alone[labels].reshape(expected.shape) == getattr(batch, labels).numpy()
            assert clear.mean() > 0.5
            assert same[clear].all()
    with pytest.raises(ValueError, match="for_product"):
        model(torch.rand(1, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"product must be one of \['dark', 'bright'\], got 'red'"):
        model.post_processor.for_product("red")


def test_a_callback_monitors_the_metric_of_a_product(root: Path, tmp_path: Path) -> None:
    arguments = {**TINY["SAAE"], "image_size": 32, "evaluator": RawScoreEvaluator(products=NAMES)}
    engine = engine_in(tmp_path, callbacks=[EarlyStopping(monitor="dark_image_AUROC", mode="max")])
    model = SAAE(**arguments)
    engine.fit(model, datamodule=datamodule(root, NAMES))
    watched = float(engine.trainer.callback_metrics["dark_image_AUROC"])
    metrics = engine.test(model, datamodule=datamodule(root, NAMES), verbose=False)[0]
    assert watched == pytest.approx(metrics["dark_image_AUROC"], abs=1e-6)


def test_a_command_trains_one_model_for_several_categories(root: Path, tmp_path: Path) -> None:
    arguments = {key: value for key, value in TINY["SAAE"].items() if key not in {"visualizer", "image_size"}}
    cli = AnomalibCLI([
        "train", "--data", "SeveralCategories", "--data.root", str(root), "--data.categories", str(NAMES),
        "--data.num_workers", "0", "--model", "SAAE", "--model.image_size", "32", "--trainer.max_epochs", "1",
        *(word for key, value in arguments.items() for word in (f"--model.{key}", str(value))),
        "--model.post_processor", "anomalib_recon.post_processing.ProductPostProcessor",
        "--model.post_processor.products", str(NAMES), "--model.evaluator", "anomalib_recon.metrics.RawScoreEvaluator",
        "--model.evaluator.products", str(NAMES), "--default_root_dir", str(tmp_path),
    ])  # fmt: skip
    assert {f"{name}_pixel_AUPRO" for name in NAMES} <= cli.engine.trainer.callback_metrics.keys()
    # pictures of images of the same name do not overwrite each other
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 22
    path = checkpoint_of(cli.engine)
    loaded = SAAE.load_from_checkpoint(path, post_processor=ProductPostProcessor(NAMES))
    assert torch.equal(loaded.post_processor.image_threshold, cli.model.post_processor.image_threshold.cpu())
    with pytest.raises(ValueError, match=r"post_processor must be ProductPostProcessor\(\['dark', 'bright'\]\)"):
        SAAE.load_from_checkpoint(path)
    write_folder("SAAE", Path(path), tmp_path / "published", "synthetic squares", "cc0-1.0", {})
    published = load_pretrained(tmp_path / "published")
    assert published.post_processor.products == NAMES
    assert torch.equal(published.post_processor.image_threshold, loaded.post_processor.image_threshold)
    with pytest.raises(ValueError, match="needs a checkpoint with thresholds of each product, and this one has"):
        ProductPostProcessor(NAMES).load_checkpoint_config(FalsePositiveRatePostProcessor().checkpoint_config())
    with pytest.raises(ValueError, match=r"products must be those of the checkpoint, \['dark', 'bright'\]"):
        SAAE.load_from_checkpoint(path, post_processor=ProductPostProcessor(["bright", "dark"]))


def test_a_product_without_test_images_has_no_figures(root: Path, tmp_path: Path) -> None:
    model = Tiny(evaluator=RawScoreEvaluator(products=NAMES))
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, logger=False)
    engine.fit(model, datamodule=datamodule(root, NAMES))
    with pytest.warns(UserWarning, match="needs both normal and anomalous values"):
        [metrics] = engine.test(model, datamodule=datamodule(root, NAMES[:1]), verbose=False)
    assert np.isnan(metrics["bright_image_AUROC"])
    assert metrics["dark_image_AUROC"] == metrics["image_AUROC"]


def test_products_that_are_no_folders_are_refused_before_the_training(root: Path, tmp_path: Path) -> None:
    model = Tiny(evaluator=RawScoreEvaluator(products=["dark", "red"]))
    engine = engine_in(tmp_path)
    with pytest.raises(ValueError, match="products must name one folder in the path of each image"):
        engine.fit(model, datamodule=datamodule(root, NAMES))
    assert engine.trainer.global_step == 0


def test_folders_of_any_layout_are_products(root: Path, tmp_path: Path) -> None:
    data = Folder(
        name="mine", root=root, normal_dir=[f"{name}/train/good" for name in NAMES],
        test_split_mode="none", val_split_mode="none", num_workers=0,
    )  # fmt: skip
    model = Tiny(post_processor=ProductPostProcessor(NAMES))
    engine_in(tmp_path).fit(model, datamodule=data)
    assert model.post_processor.image_threshold.isfinite().all()


def test_what_cannot_be_told_apart_is_refused(root: Path, tmp_path: Path) -> None:
    for products in ([], ["dark", "dark"]):
        with pytest.raises(ValueError, match="products must be the names of different folders"):
            ProductPostProcessor(products)
    for products, message in (
        (["dark"], r"of which 0 are in .*bright"),
        (["dark", "bright", "train"], r"of which 2 are in"),
        (["dark", "bright", "red"], r"no normal image of \['red'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_in(tmp_path).fit(
                Tiny(post_processor=ProductPostProcessor(products)), datamodule=datamodule(root, NAMES)
            )
    with pytest.raises(ValueError, match="check root"):
        datamodule(root, ["dark", "red"]).setup()

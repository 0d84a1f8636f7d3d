# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO as ANOMALIB_AUPRO
from anomalib.models import Padim
from lightning import seed_everything
from lightning.pytorch import Callback
from PIL import Image
from scipy import ndimage
from sklearn.metrics import auc, f1_score, roc_auc_score

from anomalib_recon.metrics import AUPRO, AUROC, RawScoreEvaluator

IMAGE_FIELDS = ("pred_score", "gt_label")
PIXEL_FIELDS = ("anomaly_map", "gt_mask")
SCALES = [(0, 1), (30, 0.1), (1000, 0.1), (0, 1e-6)]


def random_maps(n=6, size=32, offset=0.0, scale=1.0, seed=0):
    """Noise that is higher in the masks' regions, every fifth value tied with another."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), dtype=bool)
    for mask in masks[n // 2 :]:  # the good images come first
        for _ in range(3):
            (top, left), (height, width) = rng.integers(0, size - 8, 2), rng.integers(1, 8, 2)
            mask[top : top + height, left : left + width] = True
    maps = rng.normal(size=masks.shape) + 1.2 * masks
    maps[rng.random(masks.shape) < 0.2] = 0.5
    return torch.tensor(offset + scale * maps, dtype=torch.float32), torch.tensor(masks)


def feed(metric, maps, masks, batch_size=2):
    for start in range(0, len(maps), batch_size):
        batch = slice(start, start + batch_size)
        image = torch.zeros(len(maps[batch]), 3, *maps.shape[1:])
        metric.update(ImageBatch(image=image, anomaly_map=maps[batch], gt_mask=masks[batch]))
    return metric


def sklearn_auroc(scores, target):
    return roc_auc_score(target.flatten().numpy(), scores.flatten().double().numpy())


def slow_aupro(maps, masks, limit):
    """Per-region overlap, threshold by threshold and region by region, of images of any size."""
    regions, normal = [], []
    for image, mask in zip(map(np.asarray, maps), map(np.asarray, masks), strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [image[labels == label] for label in range(1, count + 1)]
        normal.append(image[~mask])
    normal = np.concatenate(normal)
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([normal, *regions]))[::-1]:
        fpr.append((normal >= threshold).mean())
        pro.append(np.mean([(region >= threshold).mean() for region in regions]))
    at_limit = np.interp(limit, fpr, pro)
    end = np.searchsorted(fpr, limit, side="right")
    return auc([*fpr[:end], limit], [*pro[:end], at_limit]) / limit


@pytest.mark.parametrize(("offset", "scale"), SCALES)
def test_areas_equal_independent_computations_at_any_offset_and_scale(offset, scale):
    maps, masks = random_maps(offset=offset, scale=scale)
    auroc = feed(AUROC(PIXEL_FIELDS), maps, masks).compute()
    aupro = feed(AUPRO(PIXEL_FIELDS), maps, masks).compute()
    assert 0.6 < auroc < 0.9
    assert auroc.item() == pytest.approx(sklearn_auroc(maps, masks), abs=1e-6)
    assert aupro.item() == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-6)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_anomalibs_on_scores_in_the_unit_interval(limit):
    maps, masks = random_maps()
    maps = maps.sigmoid()
    expected = feed(ANOMALIB_AUPRO(PIXEL_FIELDS, fpr_limit=limit), maps, masks).compute()
    assert feed(AUPRO(PIXEL_FIELDS, fpr_limit=limit), maps, masks).compute() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("offset", "scale"), SCALES)
def test_many_batches_are_held_in_bounded_memory(offset, scale):
    max_points = 4096
    maps, masks = random_maps(n=64, size=64, offset=offset, scale=scale)
    auroc, aupro = AUROC(PIXEL_FIELDS, max_points=max_points), AUPRO(PIXEL_FIELDS, max_points=max_points)
    for metric in (auroc, aupro):
        for i in range(len(maps)):
            feed(metric, maps[i : i + 1], masks[i : i + 1])
            assert sum(len(rows) for rows in metric.table) <= 2 * max_points
    assert auroc.compute().item() == pytest.approx(sklearn_auroc(maps, masks), abs=1e-4)
    exact_aupro = feed(AUPRO(PIXEL_FIELDS), maps, masks).compute().item()
    assert aupro.compute().item() == pytest.approx(exact_aupro, abs=1e-4)


def test_few_distinct_scores_stay_exact_however_many_values_there_are():
    maps, masks = random_maps(n=64, size=64)
    maps = maps.mul(100).round()
    metric = feed(AUROC(PIXEL_FIELDS, max_points=2048), maps, masks)
    assert metric.compute().item() == pytest.approx(sklearn_auroc(maps, masks), abs=1e-7)


@pytest.mark.parametrize("metric_class", [AUROC, AUPRO])
def test_gathered_processes_equal_one_process(metric_class):
    maps, masks = random_maps()
    other = feed(metric_class(PIXEL_FIELDS), maps[1:], masks[1:])
    gathering = metric_class(
        PIXEL_FIELDS,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda rows, **_: [rows, torch.cat(other.table)],
    )
    feed(gathering, maps[:1], masks[:1])
    assert gathering.compute() == feed(metric_class(PIXEL_FIELDS), maps, masks).compute()


@pytest.mark.parametrize("metric_class", [AUROC, AUPRO])
@pytest.mark.parametrize("all_anomalous", [False, True])
def test_one_class_gives_nan_and_a_warning(metric_class, all_anomalous):
    maps, masks = random_maps()
    metric = feed(metric_class(PIXEL_FIELDS), maps, torch.full_like(masks, all_anomalous))
    with pytest.warns(UserWarning, match="needs both normal and anomalous values"):
        assert metric.compute().isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_are_refused(value):
    maps, masks = random_maps()
    maps[0, 0, :3] = value
    with pytest.raises(ValueError, match="3 of 2048 scores are NaN or infinite"):
        feed(AUROC(PIXEL_FIELDS), maps, masks)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"fpr_limit .* got 0"):
        AUPRO(PIXEL_FIELDS, fpr_limit=0)
    with pytest.raises(ValueError, match=r"max_points .* got 0"):
        AUROC(PIXEL_FIELDS, max_points=0)
    with pytest.raises(ValueError, match=r"\(2, 16, 16\) .* \(2, 32, 32\)"):
        feed(AUROC(PIXEL_FIELDS), random_maps(size=16)[0], random_maps(size=32)[1])
    with pytest.raises(ValueError, match=r"^pixel_size must be 'model' or 'original', got 'mask'"):
        RawScoreEvaluator(pixel_size="mask")


def test_a_mask_without_a_file_has_no_original_size():
    maps, masks = random_maps()
    batch = ImageBatch(
        image=torch.zeros(6, 3, 32, 32), anomaly_map=maps, gt_mask=masks, image_path=[f"{i}.png" for i in range(6)]
    )
    evaluator = RawScoreEvaluator(test_metrics=AUROC(PIXEL_FIELDS), pixel_size="original")
    batch = batch.collate(list(batch)[3:])  # the anomalous ones
    with pytest.raises(ValueError, match=r"^pixel_size='original' needs a file with the mask of 3.png; choose pixel_s"):
        evaluator.on_test_batch_end(None, None, None, batch=batch, batch_idx=0)


def padim(evaluator):
    return Padim(
        backbone="resnet18",
        layers=["layer1"],
        pre_trained=False,
        n_features=8,
        pre_processor=Padim.configure_pre_processor((64, 64)),
        evaluator=evaluator,
    )


class Recorder(Callback):
    """Keeps the tested batches, which anomalib's callbacks go on to change in place."""

    def __init__(self):
        self.batches = []

    def on_test_batch_end(self, _trainer, _pl_module, _outputs, batch, *_):
        self.batches.append(batch)

    def all(self, field):
        return torch.cat([getattr(batch, field).flatten() for batch in self.batches])


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Noise images in MVTec AD's layout; the high contrasts in both classes are what anomalib clamps."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "toy/ground_truth/spot").mkdir(parents=True)
    contrasts = {"train/good": [0] * 8, "test/good": [0, 0, 0, 0, 0, 60, 90], "test/spot": [20, 20, 20, 20, 20, 50, 99]}
    for folder, image_contrasts in contrasts.items():
        (root / "toy" / folder).mkdir(parents=True)
        for i, contrast in enumerate(image_contrasts):
            patch = slice(8, 20 + i), slice(16, 32)
            image = rng.integers(100, 156, (64, 64, 3), dtype=np.uint8)
            image[patch] += contrast
            Image.fromarray(image).save(root / f"toy/{folder}/{i:03}.png")
            mask = np.zeros((64, 64), dtype=np.uint8)
            mask[patch] = 255
            if folder == "test/spot":
                Image.fromarray(mask).save(root / f"toy/ground_truth/spot/{i:03}_mask.png")
    return root


def mvtec(root):
    return MVTecAD(root=root, category="toy", train_batch_size=4, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """Results, pictures, labels and checkpoint of anomalib's own evaluator."""
    seed_everything(0)  # with some random weights clamped scores have the AUROC of raw ones
    recorder = Recorder()
    engine = Engine(callbacks=[recorder], accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("default"))
    model = padim(evaluator=True)
    engine.fit(model, datamodule=mvtec(data_root))
    (results,) = engine.test(model, datamodule=mvtec(data_root))
    return model, results, recorder, pictures(engine), engine.best_model_path


def pictures(engine):
    root = Path(engine.trainer.default_root_dir)
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")}


def raw_outputs(model, root):
    """The torch model's outputs and the ground truth, without trainer or post-processor."""
    datamodule = mvtec(root)
    datamodule.setup()
    batches = list(datamodule.test_dataloader())
    with torch.no_grad():
        outputs = [model.eval().model(model.pre_processor(batch.image)) for batch in batches]
    scores, maps = (torch.cat([getattr(o, name) for o in outputs]) for name in ("pred_score", "anomaly_map"))
    labels, masks = (torch.cat([getattr(b, name) for b in batches]) for name in ("gt_label", "gt_mask"))
    return scores, maps.squeeze(1), labels, masks.as_subclass(torch.Tensor)


def test_engine_reports_raw_scores_and_leaves_the_rest_to_anomalib(data_root, trained, tmp_path):
    model, default_results, default_recorder, default_pictures, checkpoint = trained
    recorder = Recorder()
    engine = Engine(callbacks=[recorder], accelerator="cpu", default_root_dir=tmp_path)
    raw_model = padim(evaluator=RawScoreEvaluator(val_metrics=AUROC(IMAGE_FIELDS, prefix="image_")))
    (results,) = engine.test(raw_model, datamodule=mvtec(data_root), ckpt_path=checkpoint)
    (validation_results,) = engine.validate(raw_model, datamodule=mvtec(data_root))

    scores, maps, labels, masks = raw_outputs(model, data_root)
    assert results["image_AUROC"] == pytest.approx(sklearn_auroc(scores, labels), abs=1e-6)
    assert validation_results["image_AUROC"] == results["image_AUROC"]  # the validation set is the test set here
    assert results["pixel_AUROC"] == pytest.approx(sklearn_auroc(maps, masks), abs=1e-6)
    assert results["pixel_AUPRO"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-6)
    assert results["image_F1Score"] == pytest.approx(f1_score(labels, default_recorder.all("pred_label")), abs=1e-6)
    assert results["pixel_F1Score"] == pytest.approx(
        f1_score(masks.flatten(), default_recorder.all("pred_mask")), abs=1e-6
    )
    # Without this the comparison would not tell raw from normalised scores.
    for name in ("image_AUROC", "pixel_AUROC"):
        assert default_results[name] != pytest.approx(results[name], abs=1e-4)

    for field in ("pred_label", "pred_mask", "pred_score", "anomaly_map"):
        assert torch.equal(recorder.all(field), default_recorder.all(field))
    assert len(default_pictures) == 14
    assert pictures(engine) == default_pictures
    assert raw_model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("barebones", [False, True])
def test_repeated_tests_with_one_engine_give_the_same_numbers(data_root, trained, tmp_path, barebones):
    default_model, default_results, *_, checkpoint = trained
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, barebones=barebones)
    model = padim(evaluator=RawScoreEvaluator())
    results = engine.test(model, datamodule=mvtec(data_root), ckpt_path=checkpoint)
    assert engine.test(model, datamodule=mvtec(data_root)) == results
    assert engine.test(default_model, datamodule=mvtec(data_root)) == [default_results]
    assert engine.test(model, datamodule=mvtec(data_root)) == results


def test_a_test_set_of_good_images_only_is_tested(data_root, trained, tmp_path):
    good_only = Folder(
        name="good",
        root=data_root / "toy",
        normal_dir="train/good",
        normal_test_dir="test/good",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
    (results,) = engine.test(padim(evaluator=RawScoreEvaluator()), datamodule=good_only, ckpt_path=trained[-1])
    assert np.isnan(results["image_AUROC"])
    assert results["image_F1Score"] == 0


SIZES = [(64, 64), (48, 20), (33, 61), (75, 45), (32, 90), (20, 30)]  # height and width


@pytest.fixture(scope="module")
def mixed_root(tmp_path_factory):
    """Images of mixed sizes in MVTec AD's layout, with defects that are lines of a pixel, and fall between others."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/line", "ground_truth/line"):
        (root / "toy" / folder).mkdir(parents=True)
    for i, (height, width) in enumerate(SIZES):
        image, mask = rng.integers(100, 156, (height, width, 3), dtype=np.uint8), np.zeros((height, width), np.uint8)
        for folder in ("train/good", "test/good"):
            Image.fromarray(rng.permuted(image, axis=0)).save(root / f"toy/{folder}/{i:03}.png")
        mask[height // 3, width // 4 : width // 2] = 255
        mask[height // 4 : height // 2, width // 3] = 255
        image[mask > 0] += 90
        Image.fromarray(image).save(root / f"toy/test/line/{i:03}.png")
        Image.fromarray(mask).save(root / f"toy/ground_truth/line/{i:03}_mask.png")
    return root


@pytest.fixture(scope="module")
def mixed_model(mixed_root, tmp_path_factory):
    seed_everything(0)
    model = padim(evaluator=RawScoreEvaluator())
    Engine(accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("fit")).fit(model, datamodule=mvtec(mixed_root))
    return model


def at_original_size(model, root):
    """Maps resized by Pillow, and masks as they are in their files, pixel by pixel; then image by image."""
    maps, masks = [], []
    for path in sorted((root / "toy/test").rglob("*.png")):
        image = Image.open(path)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            raw = model.eval().model(model.pre_processor.transform(pixels)).anomaly_map.squeeze().numpy()
        maps.append(np.array(Image.fromarray(raw).resize(image.size, Image.Resampling.BILINEAR)))
        mask = root / f"toy/ground_truth/{path.parent.name}/{path.stem}_mask.png"
        masks.append(np.array(Image.open(mask)) > 0 if mask.exists() else np.zeros(maps[-1].shape, bool))
    return maps, masks


@pytest.mark.parametrize("batch_size", [1, 5])
def test_pixel_metrics_at_the_original_size_equal_an_independent_computation(
    mixed_root, mixed_model, tmp_path, batch_size
):
    results = {}
    for pixel_size in ("model", "original"):
        mixed_model.evaluator = RawScoreEvaluator(pixel_size=pixel_size)
        datamodule = mvtec(mixed_root)
        datamodule.eval_batch_size = batch_size
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
        (results[pixel_size],) = engine.test(mixed_model, datamodule=datamodule)

    maps, masks = at_original_size(mixed_model, mixed_root)
    together = [np.concatenate([array.ravel() for array in arrays]) for arrays in (masks, maps)]
    assert results["original"]["pixel_AUROC"] == pytest.approx(roc_auc_score(*together), abs=1e-6)
    expected = slow_aupro(maps, masks, 0.3)
    assert results["original"]["pixel_AUPRO"] == pytest.approx(expected, abs=1e-6)
    for name in ("pixel_AUROC", "pixel_AUPRO", "pixel_F1Score"):
        assert results["original"][name] != pytest.approx(results["model"][name], abs=1e-3)
    for name in ("image_AUROC", "image_F1Score"):
        assert results["original"][name] == results["model"][name]


def test_the_evaluator_without_a_trainer_updates_all_metrics():
    maps, masks = random_maps()
    evaluator = RawScoreEvaluator(test_metrics=AUROC(PIXEL_FIELDS))
    batch = ImageBatch(image=torch.zeros(6, 3, 32, 32), anomaly_map=maps, gt_mask=masks)
    evaluator.on_test_batch_end(None, None, None, batch=batch, batch_idx=0)  # as anomalib's tiled ensemble does
    assert evaluator.test_metrics[0].compute().item() == pytest.approx(sklearn_auroc(maps, masks), abs=1e-6)


def test_the_command_line_takes_the_evaluator(data_root):
    model = ["--model", "Padim", "--model.pre_trained", "false"]
    evaluator = ["--model.evaluator=anomalib_recon.metrics.RawScoreEvaluator", "--model.evaluator.pixel_size=original"]
    data = ["--data", "MVTecAD", "--data.root", str(data_root), "--data.category", "toy"]
    cli = AnomalibCLI(args=["test", *model, *evaluator, *data], run=False)
    names = [metric.name for metric in cli.model.evaluator.test_metrics]
    assert isinstance(cli.model.evaluator, RawScoreEvaluator)
    assert cli.model.evaluator.pixel_size == "original"
    assert names == ["image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"]

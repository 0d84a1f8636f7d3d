# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch, ImageItem
from anomalib.models import Padim
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.tv_tensors import Mask

from anomalib_recon.visualization import (
    AttentionVisualizer,
    ContactSheetVisualizer,
    ReconstructionVisualizer,
    draw_attention,
)
from tests.tiny_models import build, demo_data, engine_in, train

SIDE = 256  # a panel's side in anomalib's pictures
PANELS = ["image", "gt_mask", "reconstruction", "anomaly_map", "image + anomaly_map", "image + pred_mask"]
BELOW_TITLE = SIDE // 4


def _reconstruct(images):
    return 1 - images


class _Inverter(LightningModule):
    """A model that takes the negative of an image for its reconstruction."""

    def test_step(self, batch):
        anomaly_map = batch.image.mean(dim=1)
        batch.update(pred_score=anomaly_map.amax(dim=(1, 2)), anomaly_map=anomaly_map, pred_mask=anomaly_map > 0.5)
        batch.reconstruction = _reconstruct(batch.image)
        return batch

    predict_step = test_step


@pytest.fixture
def items(tmp_path):
    items = []
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        items.append(ImageItem(image=image, image_path=str(path), gt_mask=Mask(image[0] > 0.5)))
    return items


@pytest.fixture
def batch(items):
    return _Inverter().test_step(ImageBatch.collate(items))


def _panel(picture, name):
    left = PANELS.index(name) * SIDE
    return np.asarray(picture.crop((left, BELOW_TITLE, left + SIDE, SIDE)))


def _pixels(image):
    return (image * 255).byte().permute(1, 2, 0)[BELOW_TITLE:].numpy()


def _assert_shows(picture, item):
    assert picture.size == (len(PANELS) * SIDE, SIDE)
    np.testing.assert_allclose(_panel(picture, "image"), _pixels(item.image), atol=1)
    np.testing.assert_array_equal(_panel(picture, "reconstruction"), _pixels(_reconstruct(item.image)))


def test_pictures_show_the_reconstruction(batch, items):
    pictures = ReconstructionVisualizer()(batch)
    for picture, item in zip(pictures, items, strict=True):
        _assert_shows(picture, item)
        np.testing.assert_array_equal(_panel(picture, "gt_mask")[..., 0] > 0, item.gt_mask[BELOW_TITLE:].numpy())


def test_batch_of_one_gives_one_picture(items):
    batch = _Inverter().test_step(ImageBatch.collate(items[:1]))
    _assert_shows(ReconstructionVisualizer()(batch), items[0])


def test_without_ground_truth_its_panel_is_left_out(batch):
    batch.update(gt_mask=None)
    assert [picture.size for picture in ReconstructionVisualizer()(batch)] == [(5 * SIDE, SIDE)] * 3


def test_without_reconstruction_pictures_are_anomalibs(batch):
    del batch.reconstruction
    visualizer = ReconstructionVisualizer(["image", "gt_mask"])
    expected_pictures = ImageVisualizer(text_config={"size": SIDE // 16})(batch)
    for own, expected in zip(visualizer(batch), expected_pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(own), np.asarray(expected))


def test_a_map_far_below_the_threshold_has_a_scale_of_its_own(items) -> None:
    items[0].anomaly_map = torch.linspace(0.1, 0.2, SIDE).expand(SIDE, SIDE)
    items[0].reconstruction = None
    picture = np.asarray(ReconstructionVisualizer(["anomaly_map"])(items[0])).astype(int)
    map_alone, over_image = picture[SIDE // 2, :SIDE], picture[SIDE // 2, SIDE:]
    red = map_alone[:, 0] - map_alone[:, 2]  # the colours go from blue to red
    assert red[0] < -100
    assert red[-1] > 100
    assert (over_image[:, 2] - over_image[:, 0]).mean() > 30


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_pictures_are_saved_during(stage, items, tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=ReconstructionVisualizer(),
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    getattr(trainer, stage)(_Inverter(), DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate))
    pictures = sorted((tmp_path / "images").rglob("*.png"))
    assert len(pictures) == len(items)
    for path, item in zip(pictures, items, strict=True):
        with Image.open(path) as picture:
            _assert_shows(picture, item)


def test_images_of_one_name_in_several_folders_have_a_picture_each(tmp_path) -> None:
    items = []
    for folder in ("left", "right"):
        path = tmp_path / folder / "0.png"
        path.parent.mkdir()
        Image.new("RGB", (SIDE, SIDE)).save(path)
        items.append(ImageItem(image=torch.zeros(3, SIDE, SIDE), image_path=str(path)))
    trainer = Trainer(
        accelerator="cpu", callbacks=ReconstructionVisualizer(), default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, logger=False,
    )  # fmt: skip
    for _ in range(2):  # the second run replaces the pictures of the first
        trainer.predict(_Inverter(), DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate))
        assert len(list((tmp_path / "images").rglob("*.png"))) == 2


def test_attention_is_drawn_where_it_is() -> None:
    shares = torch.zeros(4, 8)
    shares[1, 6], shares[2, 6] = 0.75, 0.25
    picture = draw_attention(torch.zeros(3, 40, 80), shares, row=2, col=5)
    assert picture.size == (80, 40)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[[20, 20, 29, 29], [50, 59, 50, 59]] == 255).all()  # the frame
    patches = pixels[5::10, 5::10]
    red = patches[..., 0] - patches[..., 2]  # the colours go from blue to red
    assert red[1, 6] == red.max() > 0
    assert np.unique(red).size == 3
    assert patches[2, 6].tolist() != patches[0, 0].tolist()


def test_pictures_of_a_test_show_where_the_most_anomalous_patch_was_painted_from(demo, tmp_path) -> None:
    seen = []

    class Watched(AttentionVisualizer):
        def visualize(self, predictions):
            picture = super().visualize(predictions)
            seen.append((predictions, picture))
            return picture

    model = train(build("InTra", visualizer=Watched(field_size=(64, 64))), demo, tmp_path / "trained").model
    engine_in(tmp_path / "test").test(model, datamodule=demo_data(demo), verbose=False)
    assert len(seen) == 14
    for item, picture in seen:
        assert picture.size == (7 * 64, 64)  # with attention, one more than without
        of_patches = item.anomaly_map.reshape(8, 8, 8, 8).mean(dim=(1, 3))
        row, col = divmod(int(of_patches.argmax()), 8)
        expected = draw_attention(item.image, model.model.attention_rollout(item.image, row, col), row, col)
        assert torch.equal(item.attention, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_attention_is_of_intra_alone(demo, tmp_path) -> None:
    model = build("ADTR", visualizer=AttentionVisualizer())
    with pytest.raises(ValueError, match="AttentionVisualizer is for InTra, got ADTR; leave visualizer out"):
        engine_in(tmp_path).test(model, datamodule=demo_data(demo))


def test_titles_are_not_cut_off() -> None:
    item = ImageItem(image=torch.zeros(3, SIDE, SIDE), anomaly_map=torch.zeros(SIDE, SIDE))
    plain, titled = (
        np.asarray(ReconstructionVisualizer(text_config={"enable": enable})(item)).astype(int)
        for enable in (False, True)
    )
    columns = np.flatnonzero(np.abs(titled - plain).sum(axis=(0, 2))[2 * SIDE :])  # of "Image + Anomaly Map"
    assert columns.min() > 0
    assert columns.max() < SIDE - 1


def test_contact_sheet_shows_what_the_model_was_wrong_about(demo, tmp_path) -> None:
    sheet = ContactSheetVisualizer()
    model = train(build("ADTR", visualizer=sheet), demo, tmp_path).model
    datamodule = demo_data(demo)
    engine = engine_in(tmp_path)
    engine.test(model, datamodule=datamodule, verbose=False)
    [path] = tmp_path.rglob("contact_sheet.png")
    with Image.open(path) as picture:
        assert picture.size[0] == 1600

    images = [item for batch in engine.predict(model, dataloaders=datamodule.test_dataloader()) for item in batch]
    scores = {item.image_path: float(item.pred_score) for item in images}
    wrong = [item for item in images if bool(item.pred_label) != bool(item.gt_label)]
    assert wrong
    for cases, is_defective in ((sheet.misses, True), (sheet.false_alarms, False)):
        expected = [item.image_path for item in wrong if bool(item.gt_label) == is_defective]
        expected.sort(key=lambda name: abs(scores[name] - 0.5), reverse=True)
        assert [case.path for case in cases] == expected[:10]
        assert all(case.score == pytest.approx(scores[case.path], abs=1e-6) for case in cases)


def test_contact_sheet_shows_the_files_of_a_model_that_normalises(demo, tmp_path) -> None:
    sheet = ContactSheetVisualizer()
    model = Padim("resnet18", layers=["layer1"], pre_trained=False, n_features=8, visualizer=sheet)
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=demo_data(demo))
    engine.test(model, datamodule=demo_data(demo), verbose=False)
    cases = [*sheet.misses, *sheet.false_alarms]
    assert cases
    for case in cases:
        picture = Image.open(case.path).convert("RGB")
        picture.thumbnail((192, 192))
        assert np.array_equal(case.image, np.asarray(picture))


def test_a_test_on_the_command_line_draws_a_contact_sheet(demo, tmp_path) -> None:
    checkpoint = train(build("SAAE"), demo, tmp_path / "trained").checkpoint
    arguments = [
        "test", "--model", "SAAE", "--ckpt_path", checkpoint, "--data", "anomalib_recon.data.DemoAD",
        "--data.root", str(demo), "--default_root_dir", str(tmp_path), "--model.backbone", "resnet18",
        "--model.layers", "[layer1, layer2]", "--model.pre_trained", "false", "--model.image_size", "64",
        "--model.visualizer", "anomalib_recon.visualization.ContactSheetVisualizer", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    AnomalibCLI(arguments)
    assert len(list(tmp_path.rglob("contact_sheet.png"))) == 1

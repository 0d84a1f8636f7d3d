# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import openvino as ov
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pipelines.tiled_ensemble.components.utils.helper_functions import drop_resize_transform
from lightning.pytorch import LightningModule
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_recon.pre_processing import ExactResizePreProcessor, flatten_transform
from anomalib_recon.training import FeatureBatch

SIZE = (48, 40)


@pytest.fixture
def pre_processor():
    normalize = Normalize(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    return ExactResizePreProcessor(Compose([Compose([Resize(SIZE, antialias=True)]), CenterCrop((44, 36)), normalize]))


def test_inference_resizes_as_training_does(pre_processor):
    image = torch.rand(2, 3, 150, 90)
    torch.testing.assert_close(pre_processor(image), pre_processor.transform(image))


def test_restored_and_copied_pre_processors_resize_as_training_does(pre_processor):
    restored = ExactResizePreProcessor()
    restored.load_checkpoint_config(pre_processor.checkpoint_config())
    image = torch.rand(1, 3, 150, 90)
    expected = pre_processor.transform(image)
    for other in (restored, copy.deepcopy(restored), pickle.loads(pickle.dumps(restored))):
        torch.testing.assert_close(other(image), expected)


@pytest.mark.parametrize(
    "resize",
    [Resize(40), Resize(SIZE, interpolation=InterpolationMode.NEAREST), Resize(SIZE, antialias=False)],
)
def test_other_resizes_are_left_to_anomalib(resize):
    image = torch.rand(1, 3, 90, 150)
    expected = copy.deepcopy(resize)
    expected.antialias = False
    assert torch.equal(ExactResizePreProcessor(resize)(image), expected(image))


def test_pre_processor_without_transform_passes_images_on():
    image = torch.rand(1, 3, 9, 8)
    assert ExactResizePreProcessor()(image) is image


def test_tiled_ensemble_can_drop_the_resize():
    pre_processor = ExactResizePreProcessor(Compose([Resize(SIZE), CenterCrop((30, 20))]))
    drop_resize_transform(pre_processor)
    image = torch.rand(1, 3, 90, 80)
    assert torch.equal(pre_processor(image), image[..., 30:60, 30:50])
    assert torch.equal(pre_processor.transform(image), image[..., 30:60, 30:50])


def test_training_batches_without_images_are_left_alone():
    """Such as those of cached features."""
    batch = FeatureBatch(torch.arange(3))
    ExactResizePreProcessor(Resize(SIZE)).on_train_batch_start(None, None, batch, 0)
    assert torch.equal(batch.index, torch.arange(3))
    images = ImageBatch(image=torch.rand(2, 3, 90, 80))
    ExactResizePreProcessor(Resize(SIZE)).on_train_batch_start(None, None, images, 0)
    assert images.image.shape == (2, 3, *SIZE)


def test_nested_transforms_are_listed_in_order():
    first, second, third = Resize(SIZE), CenterCrop((30, 20)), Resize((8, 8))
    nested = Compose([Compose([first, Compose([second])]), third])
    assert list(flatten_transform(nested)) == [first, second, third]
    assert list(flatten_transform(first)) == [first]
    assert list(flatten_transform(None)) == []


class _ResizeOnly(ExportMixin, LightningModule):
    """A model that returns what the pre-processor makes of the images."""

    def __init__(self):
        super().__init__()
        self.pre_processor = ExactResizePreProcessor(Resize(SIZE, antialias=True))

    def forward(self, images):
        return InferenceBatch(anomaly_map=self.pre_processor(images))


@pytest.fixture(scope="module")
def openvino_model(tmp_path_factory):
    path = _ResizeOnly().to_openvino(tmp_path_factory.mktemp("export"))
    # On many CPUs OpenVINO computes in bfloat16 unless told otherwise.
    return ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("in_size", "tolerance"),
    [(SIZE, 1e-6), ((150, 90), 1e-5), ((31, 200), 1e-5), ((20, 17), 1e-5)],
)
def test_exported_model_resizes_as_training_does(openvino_model, batch_size, in_size, tolerance):
    images = torch.rand(batch_size, 3, *in_size)
    exported = torch.from_numpy(openvino_model(images.numpy())["anomaly_map"])
    torch.testing.assert_close(exported, Resize(SIZE, antialias=True)(images), rtol=0, atol=tolerance)

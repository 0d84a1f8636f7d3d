# SPDX-License-Identifier: Apache-2.0

"""InTra with reconstructions compared in units of what is normal."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType, ExportType

from anomalib_recon.models import InTra
from anomalib_recon.models.intra.torch_model import InTraModel
from tests.exports import expected_from, export, images_of, run
from tests.intra.test_training import SCHEDULE, SMALL, data, train

SIZES = {"image_size": (48, 40), "patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2}
ARGUMENTS = {"distance": "mahalanobis", "top_fraction": 0.02}


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Path, dict[str, float]]:
    """A trained model, its checkpoint and its test metrics."""
    model = InTra(**SMALL, **SCHEDULE, **ARGUMENTS, visualizer=False)
    _, engine = train(stripes, tmp_path_factory.mktemp("results"), model=model)
    [metrics] = engine.test(model, datamodule=data(stripes), verbose=False)
    return model.eval(), Path(engine.best_model_path), metrics


@torch.no_grad()
def test_distances_lie_at_the_places_of_their_patches() -> None:
    torch.manual_seed(0)
    model = InTraModel(**SIZES, **ARGUMENTS)
    normal = torch.rand(300, 30, 192)
    pair = (normal, normal + 0.1 * torch.randn_like(normal))
    model.mahalanobis.fit([tuple(map(model.unpatchify, pair))])
    inpainted = torch.rand(1, 30, 192)
    patches = inpainted.clone()
    patches[0, 2 * 5 + 3] += 1  # row 2, column 3 of 6 x 5 patches
    predictions = model.compare(patches, inpainted)
    [[anomaly_map]] = predictions.anomaly_map
    row, column = divmod(int(anomaly_map.argmax()), 40)
    assert 16 <= row < 24
    assert 24 <= column < 32
    highest = anomaly_map.flatten().sort(descending=True).values[: round(0.02 * 48 * 40)]
    torch.testing.assert_close(predictions.pred_score, highest.mean()[None])


@torch.no_grad()
def test_reconstructions_of_the_training_images_are_measured(
    trained: tuple[InTra, Path, dict[str, float]], stripes: Path
) -> None:
    model, _, metrics = trained
    datamodule = data(stripes)
    datamodule.setup("fit")
    images = model.pre_processor.transform(torch.stack([item.image for item in datamodule.train_data]))
    patches = model.model.embed(images)
    pair = (patches, model.model.reconstruct(patches))
    distances = model.model.mahalanobis(*map(model.model.unpatchify, pair))
    assert 0.3 < distances.square().mean() < 1.1
    assert metrics["pixel_AUROC"] > 0.9


def operations_behind_the_loop(path: Path) -> list[openvino.Node]:
    """What an exported InTra computes from the inpainted patches."""
    ops = openvino.Core().read_model(path).get_ordered_ops()
    [loop] = [number for number, node in enumerate(ops) if node.get_type_name() in {"Loop", "TensorIterator"}]
    return ops[loop + 1 :]


def words_of(operations: list[openvino.Node]) -> set[str]:
    """Types of operations, those in the bodies of loops included, and of the constants that they read."""
    words = set()
    for node in operations:
        words.add(node.get_type_name())
        if node.get_type_name() in {"Loop", "TensorIterator"}:
            words |= words_of(node.get_function().get_ordered_ops())
        words |= {value.get_element_type().get_type_name() for value in node.input_values() if is_constant(value)}
    return words


def is_constant(value: openvino.Output) -> bool:
    return value.get_node().get_type_name() == "Constant"


def test_checkpoint_and_export_hold_the_distance(
    trained: tuple[InTra, Path, dict[str, float]], stripes: Path, tmp_path: Path
) -> None:
    _, checkpoint, _ = trained
    model = InTra.load_from_checkpoint(checkpoint).eval()
    images = images_of(stripes, (64, 64))
    expected = expected_from(model, images)
    result = run(export(model, tmp_path, ExportType.OPENVINO), images, 2)
    np.testing.assert_allclose(result["pred_score"].flatten(), expected["pred_score"].flatten(), atol=1e-3)
    difference = np.abs(result["anomaly_map"].reshape(expected["anomaly_map"].shape) - expected["anomaly_map"])
    # where two contexts are equally near, rounding takes the one or the other
    assert difference.max() < 1e-2
    assert (difference < 1e-3).mean() > 0.99
    for compression_type in (CompressionType.INT8, CompressionType.INT8_PTQ):
        path = export(
            model,
            tmp_path / compression_type.value,
            ExportType.OPENVINO,
            compression_type=compression_type,
            datamodule=data(stripes),
        )
        assert not {"u8", "FakeQuantize"} & words_of(operations_behind_the_loop(path))
        words = words_of(openvino.Core().read_model(path).get_ordered_ops())
        assert "u8" in words
        assert "FakeQuantize" not in words
        result = run(path, images, 2)
        np.testing.assert_allclose(result["pred_score"].flatten(), expected["pred_score"].flatten(), atol=0.05)
    with pytest.raises(ValueError, match=r"distance"):
        InTra(**SMALL).on_load_checkpoint(torch.load(checkpoint, weights_only=True))

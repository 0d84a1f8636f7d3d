# SPDX-License-Identifier: Apache-2.0

import os
import shutil
import subprocess
import sys
from pathlib import Path

# the workers of a parallel run, and what they start, share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from anomalib.deploy import ExportType
from PIL import Image

from anomalib_recon.data import DemoAD, drawing
from tests.tiny_models import TINY, Trained, build, engine_in, train


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run tests marked ``alone`` in a process of their own, if this is a worker of a parallel run.

    They start processes that load images. Forked from a worker with all that tests before have left, they have ended
    it, without a word.
    """
    if pyfuncitem.get_closest_marker("alone") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    result = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    return True


def draw_stripes(random: np.random.Generator, size: tuple[int, int], hole: bool) -> tuple[np.ndarray, np.ndarray]:
    """A striped texture (H, W) with values in [0, 1], with or without a flat hole, and the mask of the hole."""
    rows, cols = np.mgrid[: size[0], : size[1]]
    image = 0.5 + 0.25 * np.sin(2 * np.pi * cols / 8) + 0.2 * np.sign(np.sin(2 * np.pi * rows / 8))
    image += random.normal(0, 0.02, size)
    mask = np.zeros(size)
    if hole:
        top, left = random.integers(4, min(size) - 16, 2)
        mask[top : top + 12, left : left + 12] = 1
    return np.where(mask > 0, 0.6, image).clip(0, 1), mask


def save(values: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values * 255).astype(np.uint8)).save(path)


def write_stripes(root: Path, size: tuple[int, int] = (64, 64), num_train: int = 12) -> Path:
    """Write the category ``stripes`` in MVTec AD's layout: normal training images, 4 good and 6 holed test images."""
    random = np.random.default_rng(0)
    folder = root / "stripes"
    for index in range(num_train):
        save(draw_stripes(random, size, hole=False)[0], folder / "train" / "good" / f"{index:03d}.png")
    for index in range(4):
        save(draw_stripes(random, size, hole=False)[0], folder / "test" / "good" / f"{index:03d}.png")
    for index in range(6):
        image, mask = draw_stripes(random, size, hole=True)
        save(image, folder / "test" / "hole" / f"{index:03d}.png")
        save(mask, folder / "ground_truth" / "hole" / f"{index:03d}_mask.png")
    return root


def images_in(folder: Path) -> torch.Tensor:
    """All images of a folder, ``(N, 3, H, W)`` with values in [0, 1]."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="session")
def mixed_stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``stripes``, but every other training image is sharp noise of another size, larger or smaller."""
    root = write_stripes(tmp_path_factory.mktemp("mixed"))
    random = np.random.default_rng(1)
    paths = sorted((root / "stripes" / "train" / "good").glob("*.png"))
    for index, path in enumerate(paths[::2]):
        save(random.random([(150, 200), (40, 48), (96, 64)][index % 3]), path)
    return root


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in MVTec AD's layout, with the category ``stripes``, 64 x 64 pixels."""
    return write_stripes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of demo data with few pictures: 12 to train on, 4 good and 10 defective to test."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for constant, count in {"TRAIN_PICTURES": 12, "GOOD_TEST_PICTURES": 4, "PICTURES_PER_DEFECT": 2}.items():
            patch.setattr(drawing, constant, count)
        DemoAD(root=root).prepare_data()
    return root


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of demo data with all their pictures, which every category gets once, for all workers of a parallel run."""
    folder = tmp_path_factory.getbasetemp()
    root = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "drawn"
    root.mkdir(exist_ok=True)
    return root


def link_demo_data(drawn: Path, folder: Path) -> None:
    """Let demo data be drawn in a folder where ``DemoAD`` looks for them by default."""
    (folder / "datasets").mkdir()
    (folder / "datasets" / "DemoAD").symlink_to(drawn, target_is_directory=True)


@pytest.fixture(scope="session", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Each of the models in turn."""
    return request.param


@pytest.fixture(scope="session")
def all_trained() -> dict[str, Trained]:
    """Models that have been trained; pytest itself forgets all but the last of a fixture with parameters."""
    return {}


@pytest.fixture(scope="session")
def all_exported() -> dict[str, dict[ExportType, Path]]:
    """Models that have been exported."""
    return {}


@pytest.fixture
def trained(
    name: str, demo: Path, all_trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A tiny model, trained on demo data."""
    if name not in all_trained:
        all_trained[name] = train(build(name), demo, tmp_path_factory.mktemp(name))
    return all_trained[name]


@pytest.fixture
def exported(
    name: str,
    trained: Trained,
    all_exported: dict[str, dict[ExportType, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[ExportType, Path]:
    """Exports of the trained model."""
    if name not in all_exported:
        all_exported[name] = export_all(trained, tmp_path_factory.mktemp("exported"))
    return all_exported[name]


def export_all(trained: Trained, folder: Path) -> dict[ExportType, Path]:
    """Export a trained model. anomalib makes the OpenVINO model from one in ONNX, which is kept here."""
    model = type(trained.model).load_from_checkpoint(trained.checkpoint)
    paths = {ExportType.TORCH: engine_in(folder).export(model, ExportType.TORCH, export_root=folder)}
    to_onnx = model.to_onnx

    def to_onnx_and_keep(*args, **kwargs) -> Path:
        path = to_onnx(*args, **kwargs)
        paths[ExportType.ONNX] = shutil.copytree(path.parent, folder / "onnx") / path.name
        return path

    model.to_onnx = to_onnx_and_keep
    paths[ExportType.OPENVINO] = engine_in(folder).export(model, ExportType.OPENVINO, export_root=folder)
    return paths

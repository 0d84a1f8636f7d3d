# SPDX-License-Identifier: Apache-2.0

"""Exports run, and get other thresholds, where neither torch nor anomalib is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize as torch_resize

from anomalib_recon.deploy import ExportedModel, find_images, read_image, resize
from anomalib_recon.parity import predict
from tests.deploy.conftest import Exported

ROOT = Path(__file__).parents[2]
# the dependencies of anomalib that an edge box has not
WITHOUT = """
import sys

ABSENT = {"torch", "torchvision", "anomalib", "lightning", "timm", "onnx", "pandas", "scipy"}

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
SCORE = """
import numpy as np
from anomalib_recon.deploy import ExportedModel, find_images, read_image
from pathlib import Path

model = ExportedModel(sys.argv[1])
outputs = [model(read_image(path)[None]) for path in find_images(Path(sys.argv[2]))]
np.savez(sys.argv[3], **{name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]})
"""
SET_THRESHOLDS = """
import runpy
runpy.run_module("anomalib_recon.deploy.thresholds", run_name="__main__", alter_sys=True)
"""


def run(code: str, *arguments: Path | str, folder: Path) -> str:
    """Run code in a Python without torch."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_export_scores_as_its_checkpoint(exported_model: Exported, path: Path, good: Path, tmp_path: Path) -> None:
    folder = good.parents[1] / "test"
    run(SCORE, path, folder, tmp_path / "outputs.npz", folder=tmp_path)
    expected = predict(exported_model.model, folder)
    with np.load(tmp_path / "outputs.npz") as outputs:
        for index, file in enumerate(find_images(folder)):
            for name in ("pred_score", "anomaly_map"):
                np.testing.assert_allclose(outputs[name][index].squeeze(), expected[file][name].squeeze(), atol=1e-2)


def test_thresholds_are_set(exported_model: Exported, path: Path, good: Path, tmp_path: Path) -> None:
    output = tmp_path / path.name
    printed = run(
        SET_THRESHOLDS, "--model", path, "--images", good, "--image_fpr", "0.5", "--output", output, folder=tmp_path
    )
    scale = ExportedModel(output).thresholds.image
    assert f"image  {ExportedModel(path).thresholds.image.threshold:.6g} -> {scale.threshold:.6g}" in printed


def test_the_example_scores_what_arrives(exported_model: Exported, good: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(# watch\.py.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = exported_model.files[".xml"]
    printed = run(example, path, good, "2", folder=tmp_path).splitlines()
    model = ExportedModel(path)
    scores = {file.name: model(read_image(file)[None])["pred_score"].item() for file in find_images(good)}
    *lines, summary = printed
    found = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert found == pytest.approx(scores, abs=1e-3)
    assert re.fullmatch(rf"{len(scores)} images, \d+ streams?, [\d.]+ images per second", summary)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_the_example_in_cpp_scores_as_the_one_in_python(exported_model: Exported, good: Path, tmp_path: Path) -> None:
    package = Path(openvino.__file__).parent
    [library] = package.glob("libs/libopenvino.so.*")
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```cpp\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "score.cpp").write_text(example, encoding="utf-8")
    command = ["g++", "-std=c++17", f"-I{package / 'include'}", "score.cpp", "-o", "score", library]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}"], cwd=tmp_path, check=True)
    file, path = find_images(good)[0], exported_model.files[".xml"]
    Image.open(file).convert("RGB").save(tmp_path / "image.ppm")
    result = subprocess.run([tmp_path / "score", path, "image.ppm"], cwd=tmp_path, capture_output=True, check=True)
    score, raw_score, label = result.stdout.split()
    outputs = ExportedModel(path)(read_image(file)[None])
    assert float(score) == pytest.approx(outputs["pred_score"].item(), abs=1e-3)
    assert float(raw_score) == pytest.approx(outputs["raw_score"].item(), rel=1e-3)
    assert label == (b"anomalous" if outputs["pred_label"].item() else b"good")


def test_model_api_reads_the_export(exported_model: Exported, good: Path) -> None:
    models = pytest.importorskip("model_api.models")
    adapters = pytest.importorskip("model_api.adapters")
    path = exported_model.files[".xml"]
    # OpenVINO would compute in bfloat16 where the CPU can
    adapter = adapters.OpenvinoAdapter(
        adapters.create_core(), str(path), plugin_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    wrapper = models.Model.create_model(adapter)
    model = ExportedModel(path)
    for file in find_images(good.parents[1] / "test"):
        result = wrapper(np.asarray(Image.open(file).convert("RGB")))
        outputs = model(read_image(file)[None])
        assert result.pred_score == pytest.approx(outputs["pred_score"].item(), abs=1e-3)
        if abs(result.pred_score - 0.5) > 1e-3:
            assert result.pred_label == str(outputs["pred_label"].item())


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (200, 150)])
def test_images_are_resized_as_in_training(good: Path, size: tuple[int, int]) -> None:
    image = read_image(find_images(good)[0])
    expected = torch_resize(torch.from_numpy(image), list(size), antialias=True)
    np.testing.assert_allclose(resize(image, size), expected.numpy(), atol=1e-5)


def test_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="pixels of mode I;16"):
        read_image(tmp_path / "deep.png")

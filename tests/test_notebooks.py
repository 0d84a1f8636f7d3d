# SPDX-License-Identifier: Apache-2.0

"""The notebooks, with shorter schedules. All run in this process: a kernel for each would import anomalib anew."""

import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output
from matplotlib import pyplot as plt
from traitlets.config import Config

from tests.conftest import link_demo_data

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))


class Shell(InteractiveShell):
    """IPython without a terminal."""

    def enable_gui(self, gui=None) -> None:
        """Pictures within the notebook need no window."""


@pytest.fixture(scope="module")
def shell(drawn: Path, tmp_path_factory: pytest.TempPathFactory):
    """One shell, whose folder the notebooks share."""
    folder = tmp_path_factory.mktemp("notebooks")
    link_demo_data(drawn, folder)
    backend = plt.get_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which the shell replaces
        shell = Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))
        shell.run_line_magic("matplotlib", "inline")
        yield shell
    Shell.clear_instance()
    plt.switch_backend(backend)


def execute(shell: Shell, name: str, **quick: Any) -> tuple[dict[str, Any], list[RichOutput]]:
    """Run a notebook with other values of its parameters; return its variables and the outputs of its last cell."""
    shell.reset()
    [path] = [path for path in NOTEBOOKS if path.stem == name]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        with capture_output() as captured:
            result = shell.run_cell(cell.source)
        result.raise_error()
        if "parameters" in cell.metadata.get("tags", ()):
            assert quick.keys() <= shell.user_ns.keys()
            shell.push(quick)
    return shell.user_ns, captured.outputs


def has_picture(outputs: list[RichOutput]) -> bool:
    return any("image/png" in output.data for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].metadata.tags == ["parameters"]


def test_getting_started(shell: Shell) -> None:
    names, outputs = execute(shell, "01_getting_started", EPOCHS=2, WINDOWS_PER_IMAGE=30, IMAGE_SIZE=64)
    assert names["metrics"]["pixel_AUROC"] > 0.6
    assert has_picture(outputs)


def test_your_own_images(shell: Shell) -> None:
    names, outputs = execute(shell, "02_your_own_images")  # quick as it is
    assert len(names["datamodule"].val_data) == 20
    assert names["pixel_rate"] < 4 * names["PIXEL_FPR"]
    assert names["found"] > 0
    assert has_picture(outputs)


def test_compare_models(shell: Shell) -> None:
    names, outputs = execute(shell, "03_compare_models", EPOCHS=1, IMAGE_SIZE=64)
    table = names["table"]
    assert list(table.index) == ["PatchAE", "PaDiM", "PatchCore"]
    assert (table[["image_AUROC", "pixel_AUROC"]] > 0.5).all(axis=None)
    assert has_picture(outputs)


def test_adtr_plus(shell: Shell) -> None:
    names, outputs = execute(shell, "04_adtr_plus", EPOCHS=2, PLUS_EPOCHS=1)
    table = names["table"]
    assert list(table.index) == ["ADTR", "ADTR, trained longer", "ADTR+"]
    assert (table["pixel_AUROC"] > 0.6).all()
    assert len(names["labelled"].test_data) == 40 - names["NUM_DEFECTS"]
    assert has_picture(outputs)


def test_openvino(shell: Shell) -> None:
    names, outputs = execute(shell, "05_openvino", EPOCHS=2)
    differences = names["table"]["largest score difference"]
    assert list(differences.index) == ["checkpoint", "fp32", "int8"]
    assert differences["fp32"] < 1e-3
    assert differences.max() < 0.5
    assert has_picture(outputs)


def test_sixteen_bit(shell: Shell) -> None:
    names, outputs = execute(shell, "06_sixteen_bit", EPOCHS=3)
    assert len(np.unique(names["eight_bits"])) == 1
    assert names["metrics"]["image_AUROC"] > 0.9
    assert names["metrics"]["pixel_AUROC"] > 0.8
    assert has_picture(outputs)


def test_small_defects(shell: Shell) -> None:
    names, outputs = execute(shell, "07_small_defects", SIDE=600, PIT=7, NUM_GOOD=4)
    image_auroc = names["table"]["image_AUROC"]
    assert image_auroc["tiles"] > 0.9
    assert image_auroc["tiles"] > image_auroc["made smaller"]
    assert has_picture(outputs)


def test_solar_cells(shell: Shell) -> None:
    pytest.importorskip("elpv_dataset", reason="needs pip install elpv-dataset, 90 MB")
    names, outputs = execute(shell, "08_solar_cells", MINUTES=0.2, NUM_TRAIN=16, MODELS=["InTra"])
    assert len(names["datamodule"].train_data) == 16
    assert 0 <= names["metrics"]["InTra"]["image_AUROC"] <= 1
    assert has_picture(outputs)

# SPDX-License-Identifier: Apache-2.0

"""Does the wheel work without the checkout?"""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import anomalib_recon

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path):
    """Python of a new environment that holds the wheel, and sees the packages of this one behind it."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel and cannot be fetched offline")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")

    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel], check=True)
    # Python reads no .pth file in a folder named by another: an editable install of the checkout stays unseen
    (site_packages,) = environment.glob("lib/*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    return python


def test_wheel_is_complete_and_found_by_anomalib(installed, tmp_path):
    script = """
import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from anomalib.models import get_model

model = get_model("in_tra", image_size=112, embed_dim=32, depth=1, num_heads=2)

import anomalib_recon

configs = Path(files("anomalib_recon")) / "configs"
print(json.dumps({
    "model": type(model).__name__,
    "versions": [anomalib_recon.__version__, version("anomalib-recon")],
    "typed": files("anomalib_recon").joinpath("py.typed").is_file(),
    "configs": sorted(path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")),
    "file": anomalib_recon.__file__,
}))
"""
    # -I: neither the current folder nor PYTHONPATH is searched
    output = subprocess.run([installed, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(output.stdout.splitlines()[-1])

    assert Path(answer.pop("file")).is_relative_to(tmp_path)
    assert answer == {
        "model": "InTra",
        "versions": [anomalib_recon.__version__] * 2,
        "typed": True,
        "configs": sorted(path.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/**/*.yaml")),
    }

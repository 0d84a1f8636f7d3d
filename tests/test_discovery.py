# SPDX-License-Identifier: Apache-2.0

"""Does anomalib find what this package adds? Fresh interpreters answer, in which the hook alone has been at work."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    "anomalib_recon.discovery:autoload" not in {hook.value for hook in entry_points(group="torch.backends")},
    reason="anomalib-recon is not installed, so torch does not call its hook",
)

SETUP = """
import json
small = {"image_size": 112, "embed_dim": 32, "depth": 1, "num_heads": 2}
options = [f"--model.{name}={value}" for name, value in small.items()]
"""
CONFIG = """
model:
  class_path: InTra
  init_args: {image_size: 112, embed_dim: 32, depth: 1, num_heads: 2}
data:
  class_path: DemoAD
"""


def ask(script: str, folder: Path, autoload: str = "1") -> tuple[Any, str]:
    """Run a script in a fresh interpreter; return what it has put in ``answer``, and its stderr."""
    process = subprocess.run(
        [sys.executable, "-c", f"{SETUP}\n{script}\nprint(json.dumps(answer))"],
        cwd=folder,
        env={**os.environ, "ANOMALIB_RECON_AUTOLOAD": autoload},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


def test_anomalib_finds_short_names(tmp_path):
    (tmp_path / "intra.yaml").write_text(CONFIG)
    # `anomalib.models` comes first, so that torch is imported, and the hook called, in the midst of its import
    script = """
from anomalib.models import get_model, list_models
from anomalib.cli import AnomalibCLI
from anomalib.data import get_datamodule

options_cli = AnomalibCLI(["train", "--model=InTra", *options, "--data=DemoAD"], run=False)
config_cli = AnomalibCLI(["train", "--config=intra.yaml"], run=False)
models = {
    "get_model, name": get_model("in_tra", **small),
    "get_model, class name": get_model({"class_path": "InTra", "init_args": small}),
    "get_model, full path": get_model({"class_path": "anomalib_recon.models.InTra", "init_args": small}),
    "options": options_cli.model,
    "config": config_cli.model,
}
datamodules = {
    "get_datamodule": get_datamodule({"class_path": "DemoAD"}),
    "options": options_cli.datamodule,
    "config": config_cli.datamodule,
}

from anomalib_recon.data import DemoAD
from anomalib_recon.models import InTra

answer = {
    "listed": {"in_tra", "a_d_t_r", "s_a_a_e", "patch_a_e"} <= set(list_models()),
    "not InTra": [way for way, model in models.items() if type(model) is not InTra],
    "not DemoAD": [way for way, datamodule in datamodules.items() if type(datamodule) is not DemoAD],
}
"""
    answer, _ = ask(script, tmp_path)
    assert answer == {"listed": True, "not InTra": [], "not DemoAD": []}


@pytest.mark.parametrize("first", ["torch", "anomalib.data", "anomalib_recon.models"])
def test_order_of_imports_does_not_matter(first, tmp_path):
    script = f"""
import {first}
import pickle
import anomalib.data
answer = {{"data": hasattr(anomalib.data, "DemoAD"), "pickled": pickle.loads(pickle.dumps(anomalib)) is anomalib}}
import anomalib.models
answer["models"] = hasattr(anomalib.models, "InTra") and "in_tra" in anomalib.models.list_models()
"""
    answer, _ = ask(script, tmp_path)
    assert answer == {"data": True, "pickled": True, "models": True}


def test_full_path_needs_no_hook(tmp_path):
    script = """
from anomalib.cli import AnomalibCLI
from anomalib.models import list_models

answer = {"listed": "in_tra" in list_models()}
try:
    AnomalibCLI(["train", "--model=InTra"], run=False)
except SystemExit as exit:
    answer["short"] = exit.code
cli = AnomalibCLI(["train", "--model=anomalib_recon.models.InTra", *options], run=False)
answer["full"] = type(cli.model).__name__
"""
    answer, stderr = ask(script, tmp_path, autoload="0")
    assert answer == {"listed": False, "short": 2, "full": "InTra"}
    assert "InTra" in stderr


def test_broken_package_only_warns(tmp_path):
    script = """
import sys
sys.modules["anomalib_recon.models"] = None  # any import of it fails
import anomalib.data
from anomalib.models import list_models

names = list_models()
answer = {"padim": "padim" in names, "in_tra": "in_tra" in names, "DemoAD": hasattr(anomalib.data, "DemoAD")}
"""
    answer, stderr = ask(script, tmp_path)
    assert answer == {"padim": True, "in_tra": False, "DemoAD": True}
    assert stderr.count("RuntimeWarning: anomalib goes without anomalib_recon.models") == 1


def test_without_anomalib_only_the_hook_is_imported(tmp_path):
    script = """
import sys
sys.modules["anomalib"] = None  # any import of it fails, as if it were not installed
import torch
answer = sorted(name for name in sys.modules if name.startswith("anomalib_recon"))
"""
    answer, stderr = ask(script, tmp_path)
    assert answer == ["anomalib_recon", "anomalib_recon.discovery"]
    assert "anomalib" not in stderr


def test_torch_alone_imports_the_hook_alone(tmp_path):
    script = """
import sys
import torch
answer = sorted(name for name in sys.modules if name.startswith("anomalib"))
"""
    assert ask(script, tmp_path)[0] == ["anomalib_recon", "anomalib_recon.discovery"]

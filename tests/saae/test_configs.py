# SPDX-License-Identifier: Apache-2.0

import inspect

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.config_files import config_path
from anomalib_recon.models import SAAE

TEXTURES = {"carpet", "grid", "leather", "tile", "wood"}


def test_every_mvtec_category_has_the_mlp_size_of_the_paper() -> None:
    configs = [yaml.safe_load(path.read_text()) for path in sorted(config_path("mvtec_ad/saae").glob("*.yaml"))]
    ratios = {config["data"]["init_args"]["category"]: config["model"]["init_args"]["mlp_ratio"] for config in configs}
    assert len(ratios) == 15
    assert {category for category, ratio in ratios.items() if ratio == 1} == TEXTURES
    assert set(ratios.values()) == {1, 2}


def test_the_paper_config_states_the_defaults() -> None:
    arguments = yaml.safe_load(config_path("model/saae.yaml").read_text())["model"]["init_args"]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(SAAE).parameters.items()
        if name not in {"pre_processor", "post_processor", "evaluator", "visualizer"}
    }
    assert arguments == {**defaults, "image_size": 384}


@pytest.mark.parametrize("name", ["model/saae.yaml", "mvtec_ad/saae/screw.yaml"])
def test_anomalib_reads_the_configs(name: str) -> None:
    # arguments are checked and objects built; `run=False` stops before training
    data = ["--data", "DemoAD"] if name.startswith("model") else []
    small = ["--model.init_args.backbone", "vit_tiny_patch16_224", "--model.init_args.pre_trained", "false"]
    cli = AnomalibCLI(["train", "--config", str(config_path(name)), *data, *small], run=False)
    assert isinstance(cli.model, SAAE)

# SPDX-License-Identifier: Apache-2.0

import inspect

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.models import InTra
from anomalib_recon.models.intra.torch_model import check_sizes
from anomalib_recon.quickstart import config_path

# table 1 of version 3
IMAGE_SIZES = {
    256: {"grid", "bottle", "cable", "hazelnut", "metal_nut", "toothbrush", "transistor"},
    320: {"capsule", "screw"},
    512: {"carpet", "leather", "tile", "wood", "pill", "zipper"},
}


def read(name: str) -> dict:
    return yaml.safe_load(config_path(name).read_text())


def test_every_mvtec_category_has_the_image_size_of_the_paper() -> None:
    configs = [yaml.safe_load(path.read_text()) for path in sorted(config_path("mvtec_ad/intra").glob("*.yaml"))]
    sizes = {config["data"]["init_args"]["category"]: config["model"]["init_args"]["image_size"] for config in configs}
    assert sizes == {category: size for size, categories in IMAGE_SIZES.items() for category in categories}
    for size in IMAGE_SIZES:
        check_sizes((size, size), patch_size=16, window_size=7)


def test_the_paper_config_states_the_defaults() -> None:
    arguments = read("model/intra.yaml")["model"]["init_args"]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(InTra).parameters.items()
        if name not in {"pre_processor", "post_processor", "evaluator", "visualizer"}
    }
    assert arguments == {**defaults, "image_size": 256}


@pytest.mark.parametrize("name", ["model/intra.yaml", "quickstart/intra.yaml", "mvtec_ad/intra/screw.yaml"])
def test_anomalib_reads_the_configs(name: str) -> None:
    args = ["train", "--config", str(config_path(name)), "--data", "DemoAD"]
    # arguments are checked and objects built; `run=False` stops before training
    args = args if name.startswith("model") else args[:3]
    small = ["--model.init_args.depth", "1", "--model.init_args.embed_dim", "16"]
    cli = AnomalibCLI([*args, *small], run=False)
    assert isinstance(cli.model, InTra)

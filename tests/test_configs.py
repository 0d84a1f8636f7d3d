# SPDX-License-Identifier: Apache-2.0

import inspect

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.models import ADTR, InTra, PatchAE
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


@pytest.mark.parametrize(
    ("model", "name", "given"),
    [
        (InTra, "model/intra.yaml", {"image_size": 256}),
        (ADTR, "model/adtr.yaml", {"image_size": 256, "feature_size": 16}),
        (PatchAE, "model/patch_ae.yaml", {"image_size": 256}),
    ],
)
def test_the_paper_config_states_the_defaults(model: type, name: str, given: dict) -> None:
    arguments = read(name)["model"]["init_args"]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model).parameters.items()
        if name not in {"pre_processor", "post_processor", "evaluator", "visualizer"}
    }
    assert arguments == {
        name: list(value) if isinstance(value, tuple) else value  # YAML has no tuples
        for name, value in {**defaults, **given}.items()
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("model/intra.yaml", ["--data", "DemoAD", "--model.depth", "1", "--model.embed_dim", "16"]),
        ("quickstart/intra.yaml", ["--model.depth", "1", "--model.embed_dim", "16"]),
        ("mvtec_ad/intra/screw.yaml", ["--model.depth", "1", "--model.embed_dim", "16"]),
        ("model/adtr.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
        ("model/adtr_512.yaml", ["--model.pre_trained", "false"]),
        ("model/adtr_cifar10.yaml", ["--data.normal_class", "dog", "--model.pre_trained", "false"]),
        ("model/adtr_plus.yaml", ["--model.normal_checkpoint", "model.ckpt", "--model.pre_trained", "false"]),
        ("model/adtr_plus_cifar10.yaml", ["--model.normal_checkpoint", "model.ckpt", "--model.pre_trained", "false"]),
        ("model/patch_ae.yaml", ["--data", "DemoAD", "--model.backbone", "resnet18", "--model.pre_trained", "false"]),
    ],
)
def test_anomalib_reads_the_configs(name: str, arguments: list[str]) -> None:
    # arguments are checked and objects built; `run=False` stops before training
    cli = AnomalibCLI(["train", "--config", str(config_path(name)), *arguments], run=False)
    assert type(cli.model).__name__ == read(name)["model"]["class_path"].split(".")[-1]

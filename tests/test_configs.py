# SPDX-License-Identifier: Apache-2.0

import inspect
import re
from importlib.util import find_spec

import pytest
import timm
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.config_files import config_path, read_config
from anomalib_recon.models import ADTR, SAAE, FeatureInpainting, InTra, PatchAE


@pytest.mark.parametrize(
    ("model", "name", "given"),
    [
        (InTra, "model/intra.yaml", {"image_size": 256}),
        (ADTR, "model/adtr.yaml", {"image_size": 256, "feature_size": 16}),
        (SAAE, "model/saae.yaml", {"image_size": 384}),
        (PatchAE, "model/patch_ae.yaml", {"image_size": 256}),
        (FeatureInpainting, "model/feature_inpainting.yaml", {"image_size": 256, "feature_stride": 8}),
    ],
)
def test_the_paper_config_states_the_defaults(model: type, name: str, given: dict) -> None:
    arguments = read_config(name)["model"]["init_args"]
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
        ("recommended/intra.yaml", ["--data", "DemoAD", "--model.depth", "1"]),
        ("model/adtr.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
        ("model/adtr_512.yaml", ["--model.pre_trained", "false"]),
        ("model/adtr_cifar10.yaml", ["--data.normal_class", "dog", "--model.pre_trained", "false"]),
        ("model/adtr_plus.yaml", ["--model.normal_checkpoint", "model.ckpt", "--model.pre_trained", "false"]),
        ("model/adtr_plus_cifar10.yaml", ["--model.normal_checkpoint", "model.ckpt", "--model.pre_trained", "false"]),
        (
            "model/saae.yaml",
            ["--data", "DemoAD", "--model.backbone", "vit_tiny_patch16_224", "--model.pre_trained", "false"],
        ),
        ("model/saae_author.yaml", ["--data", "DemoAD", "--model.pre_trained", "false"]),
        ("model/patch_ae.yaml", ["--data", "DemoAD", "--model.backbone", "resnet18", "--model.pre_trained", "false"]),
        ("model/feature_inpainting.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
        ("recommended/adtr.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
        (
            "recommended/feature_inpainting_textures.yaml",
            ["--data.category", "tile", "--model.pre_trained", "false"],
        ),
        ("recommended/patch_ae.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
        ("recommended/saae.yaml", ["--data.category", "screw", "--model.pre_trained", "false"]),
    ],
)
def test_anomalib_reads_the_configs(name: str, arguments: list[str]) -> None:
    # arguments are checked and objects built; `run=False` stops before training
    cli = AnomalibCLI(["train", "--config", str(config_path(name)), *arguments], run=False)
    assert type(cli.model).__name__ == read_config(name)["model"]["class_path"].split(".")[-1]


def test_the_weights_that_configs_name_can_be_had() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(config_path("").rglob("*.yaml")))
    backbones = set(re.findall(r"backbone: ([\w.]+)", text)) - {"pixels"}
    assert len(backbones) > 5
    with_weights = {*timm.list_pretrained(), *(name.split(".")[0] for name in timm.list_pretrained())}
    assert backbones <= with_weights


def test_the_commands_in_configs_name_what_there_is() -> None:
    for path in sorted(config_path("").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert find_spec(module), (path, module)
        for config in re.findall(r"--config (?:configs/)?(\S+\.yaml)", text):
            assert config_path(config).exists(), (path, config)


def test_the_comparison_takes_the_recommended_arguments() -> None:
    models = read_config("compare/folder.yaml")["models"]
    for name, file in (("ADTR", "adtr"), ("InTra", "intra"), ("PatchAE", "patch_ae"), ("SAAE", "saae")):
        recommended = read_config(f"recommended/{file}.yaml")
        assert models[name]["model"]["init_args"] == recommended["model"]["init_args"], name
        trainer = {"precision": "bf16-mixed", **recommended["trainer"]}
        assert models[name]["trainer"] == trainer, name


def test_adtr_plus_continues_the_adtr_of_its_config() -> None:
    """What the two configs say of the network, as it is resolved, is the same."""
    networks = []
    for name in ("model/adtr.yaml", "model/adtr_plus.yaml"):
        cli = AnomalibCLI(
            ["train", "--config", str(config_path(name)), "--data.category", "screw", "--model.pre_trained", "false"]
            + (["--model.normal_checkpoint", "model.ckpt"] if "plus" in name else []),
            run=False,
        )
        networks.append(cli.model)
    adtr, adtr_plus = networks
    checkpoint = {"hyper_parameters": dict(adtr.hparams), "state_dict": adtr.state_dict()}
    adtr_plus.refuse_other_networks(checkpoint)
    # a value that is left out is the default of the one that says it
    unsaid = ADTR(pre_trained=False)
    unsaid.refuse_other_networks(checkpoint)
    with pytest.raises(ValueError, match=r"needs a model with embed_dim=256 \(not 64\)"):
        ADTR(pre_trained=False, embed_dim=64).refuse_other_networks(checkpoint)

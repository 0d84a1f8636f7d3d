# SPDX-License-Identifier: Apache-2.0

"""anomalib finds every model by its name."""

from anomalib.cli.cli import AnomalibCLI
from anomalib.models import get_model, list_models

from anomalib_recon import models
from tests.tiny_models import TINY


def test_every_model_has_a_tiny_one() -> None:
    assert set(TINY) == set(models.__all__)


def test_get_model_takes_both_names_of_the_list(name: str) -> None:
    [listed] = [model for model in list_models() if model.replace("_", "") == name.lower()]
    assert name in list_models(case="pascal")
    for known in (name, listed):
        assert type(get_model(known, **TINY[name])) is getattr(models, name)


def test_the_command_line_takes_the_name_and_its_arguments(name: str) -> None:
    arguments = [f"--model.{argument}={value}" for argument, value in TINY[name].items()]
    model = AnomalibCLI(["train", "--model", name, *arguments, "--data", "DemoAD"], run=False).model
    assert type(model) is getattr(models, name)
    expected = get_model(name, **TINY[name]).hparams
    for argument in TINY[name].keys() & expected.keys():
        assert model.hparams[argument] == expected[argument]

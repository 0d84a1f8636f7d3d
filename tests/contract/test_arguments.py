# SPDX-License-Identifier: Apache-2.0

"""Arguments that all models have: what is refused, and which image size is taken."""

import inspect
import math
import re
from typing import Any

import pytest
from anomalib.cli.cli import AnomalibCLI
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_recon import models
from tests.tiny_models import TINY, build

NORMALIZED = PreProcessor(Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)]))
WRONG_SIZES = [0, -64, (64, 0), (64,), (64, 64, 64), 64.0, (64.0, 64.0), "64", math.nan, True]


def skip_without(name: str, argument: str) -> None:
    if argument not in inspect.signature(getattr(models, name)).parameters:
        pytest.skip(f"has no {argument}")


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("learning_rate", -1.0, "learning_rate must be positive, got -1.0"),
        ("learning_rate", math.nan, "learning_rate must be a finite number, got nan"),
        ("learning_rate", "1", "learning_rate must be a finite number, got '1'"),
        ("pre_processor", PreProcessor(Resize((32, 32))), "image_size must be the size that pre_processor resizes to"),
        ("pre_processor", NORMALIZED, "pre_processor must leave images in [0, 1], got one with Normalize"),
        *(("image_size", size, "image_size must be positive, got") for size in WRONG_SIZES),
    ],
)
def test_what_cannot_work_is_refused_by_name(name: str, argument: str, value: Any, words: str) -> None:
    skip_without(name, argument)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}[^\n]*$"):
        build(name, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "words"),
    [("learning_rate=-1", "learning_rate must be positive, got -1.0"), ("image_size=0", "image_size must be positive")],
)
def test_the_command_line_names_it_on_a_line_of_its_own(name: str, argument: str, words: str) -> None:
    skip_without(name, argument.split("=", maxsplit=1)[0])
    arguments = [f"--model.{argument}={value}" for argument, value in TINY[name].items()]
    # jsonargparse puts its own lines around ours
    with pytest.raises(ValueError, match=rf"(?m)^ *-? *{re.escape(words)}"):
        AnomalibCLI(["train", "--model", name, *arguments, "--data=DemoAD", f"--model.{argument}"], run=False)


@pytest.mark.parametrize("given", [96, (96, 128), None])
def test_the_image_size_is_the_given_one_or_that_of_the_pre_processor(name: str, given: Any) -> None:
    expected = (96, 96) if given == 96 else (96, 128)
    pre_processor = True if given else getattr(models, name).configure_pre_processor(expected)
    model = build(name, image_size=given, pre_processor=pre_processor)
    assert model.hparams["image_size"] == expected
    assert model.pre_processor.transform.size == list(expected)


def test_a_probe_of_the_tiled_ensemble_gets_the_default_size(name: str) -> None:
    model_class = getattr(models, name)
    for pre_processor in (model_class.configure_pre_processor((10, 10)), True, False):
        model = build(name, image_size=None, pre_processor=pre_processor)
        assert model.hparams["image_size"] == model_class.default_image_size

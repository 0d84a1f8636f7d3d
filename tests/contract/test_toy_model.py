# SPDX-License-Identifier: Apache-2.0

"""A model that is written from CONTRIBUTING.md alone keeps the contract: its example is read from there."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from anomalib.deploy import ExportType

from anomalib_recon import models
from tests.conftest import export_all
from tests.tiny_models import TINY, Trained, build, train

# these tests run again here, on the model below
from .test_checkpoints import (  # noqa: F401
    checkpoint,
    test_a_loaded_model_scores_as_the_trained_one,
    test_it_needs_no_weights_of_the_backbone,
    test_one_of_another_network_is_refused_by_its_arguments,
    test_one_of_another_version_is_refused,
)
from .test_exports import test_a_pickled_model_scores_as_the_checkpoint, test_graphs_score_as_the_checkpoint  # noqa: F401
from .test_names import (  # noqa: F401
    test_get_model_takes_both_names_of_the_list,
    test_the_command_line_takes_the_name_and_its_arguments,
)
from .test_network import (  # noqa: F401
    images,
    test_autocast_does_not_reach_the_comparison,
    test_the_three_in_a_row_are_forward_and_what_a_test_scores_with,
)
from .test_training import (  # noqa: F401
    test_an_interrupted_run_goes_on_to_the_same_model,
    test_the_loss_falls,
    test_the_loss_is_computed_without_autocast,
    test_validation_runs_once_and_sets_the_thresholds,
    test_what_a_test_and_a_prediction_give,
)

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The model of the page, named where the page says."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path_factory.mktemp("toy")
    (folder / "conv_ae.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(models, "ConvAE", import_module("conv_ae").ConvAE, raising=False)
        arguments = {"backbone": "resnet18", "pre_trained": False, "image_size": 64, "embed_dim": 8}
        patch.setitem(TINY, "ConvAE", {**arguments, "visualizer": False})
        yield "ConvAE"


@pytest.fixture(scope="module")
def trained(name: str, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(build(name), demo, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportType, Path]:
    return export_all(trained, tmp_path_factory.mktemp("exported"))


def test_what_is_fitted_before_training_is_in_the_checkpoint(trained: Trained) -> None:
    state = torch.load(trained.checkpoint, weights_only=True)["state_dict"]
    for statistic in ("mean", "std"):
        assert len(state[f"model.scale.{statistic}"].unique()) > 100

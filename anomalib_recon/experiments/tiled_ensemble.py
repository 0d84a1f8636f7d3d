# SPDX-License-Identifier: Apache-2.0

"""anomalib's tiled ensemble, one model for each place of a tile, for models with arguments.

``python -m anomalib_recon.experiments.tiled_ensemble --config configs/tiled_ensemble.yaml`` takes the configs of
anomalib's pipeline and writes the same files. In anomalib 2.7 it fails for any model with ``init_args``: these become a
container for plain values, into which the pre-processor of the tiles cannot be put.
"""

from argparse import Namespace
from typing import Any

from anomalib.pipelines import tiled_ensemble
from omegaconf import OmegaConf


class _ModelArguments:
    """Mixin that reads the arguments of the model into a container for any values."""

    def _get_args(self, args: Namespace | None) -> dict[str, Any]:
        config = super()._get_args(args)  # type: ignore[misc]
        trained = config["TrainModels"]
        trained["model"] = OmegaConf.create(trained["model"], flags={"allow_objects": True})
        return config


class TrainTiledEnsemble(_ModelArguments, tiled_ensemble.TrainTiledEnsemble):
    """anomalib's pipeline that trains an ensemble, for models with ``init_args``."""


class EvalTiledEnsemble(_ModelArguments, tiled_ensemble.EvalTiledEnsemble):
    """anomalib's pipeline that tests an ensemble, for models with ``init_args``."""


def main() -> None:
    """Train an ensemble and test it."""
    arguments = TrainTiledEnsemble.get_parser().parse_args()
    training = TrainTiledEnsemble()
    training.run(arguments)
    EvalTiledEnsemble(training.root_dir).run(arguments)


if __name__ == "__main__":
    main()

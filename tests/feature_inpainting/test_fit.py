# SPDX-License-Identifier: Apache-2.0

"""The fit by anomalib's engine."""

from pathlib import Path

import torch
from anomalib.engine import Engine

from tests.tiny_models import build, demo_data, demo_images


def test_it_takes_one_epoch_with_features_in_memory_or_computed_anew(demo: Path, tmp_path: Path) -> None:
    images = torch.from_numpy(demo_images(demo, (64, 64)))
    scores = []
    for gib in (4.0, 0.0):
        model = build("FeatureInpainting", feature_cache_gib=gib)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=demo_data(demo))
        assert engine.trainer.current_epoch == 1
        with torch.no_grad():
            scores.append(model.eval().model(images).pred_score)
    assert scores[0].std() > 0.1
    # features in memory have half precision
    assert (scores[0] - scores[1]).abs().max() < 0.05 * scores[0].std()

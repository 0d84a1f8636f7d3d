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
        # of few images, more units would be fitted to the rounding of the features
        model = build("FeatureInpainting", feature_cache_gib=gib, num_units=8)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=demo_data(demo))
        assert engine.trainer.current_epoch == 1
        with torch.no_grad():
            scores.append(model.eval().model(images).pred_score)
    assert scores[0].std() > 0.1
    torch.testing.assert_close(*scores, rtol=0.02, atol=0.02)  # features in memory have half precision

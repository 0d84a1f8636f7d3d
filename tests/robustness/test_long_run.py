# SPDX-License-Identifier: Apache-2.0

"""Many images leave neither memory nor files behind; ``benchmarks/long_run.py`` measures thousands."""

import sys
from pathlib import Path

import pytest
from anomalib.models import AnomalibModule

from benchmarks.long_run import copy_images, predict


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_stay_the_same(
    trained: tuple[AnomalibModule, str], stripes: Path, tmp_path: Path
) -> None:
    images = copy_images(stripes / "stripes" / "test" / "hole" / "000.png", tmp_path / "images", 200)
    watch = predict(trained[0], images, tmp_path)
    assert len(watch.open_files) == 10
    assert watch.open_files[-1] == watch.open_files[1]
    # 160 images of 64 x 64 pixels, with all that is made of them, would be 20 MiB
    assert watch.resident_mib[-1] - watch.resident_mib[1] < 8

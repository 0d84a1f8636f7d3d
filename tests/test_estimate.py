# SPDX-License-Identifier: Apache-2.0

"""The command that tells how long a training will take."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalib_recon import estimate
from anomalib_recon.data import drawing
from anomalib_recon.models import SAAE
from tests.tiny_models import TINY


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, count in {"TRAIN_PICTURES": 6, "GOOD_TEST_PICTURES": 2, "PICTURES_PER_DEFECT": 2}.items():
        monkeypatch.setattr(drawing, constant, count)


def config_of(name: str, folder: Path, **trainer) -> str:
    model = {"class_path": name, "init_args": TINY[name]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "trainer": {"accelerator": "cpu", **trainer}}))
    return str(path)


def test_a_training_is_estimated(few_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("SAAE", tmp_path, max_epochs=50)
    found = estimate.main(["--config", config, "--images", "1000", "--batch_size", "4"])
    assert found.steps == 50 * 250
    assert 0 < found.step < 10
    assert found.peak_bytes > 2**28  # torch alone takes as much
    printed = capsys.readouterr().out
    assert "SAAE, 1000 images in batches of 4" in printed
    assert f"12500 steps of {found.step:.3g} s" in printed
    # 192 channels on a grid of 8 x 8 places, in half precision
    assert found.features == f"{1000 * 192 * 8 * 8 * 2 / 2**30:.2f} GiB, kept"


def test_times_are_those_of_images_and_steps(
    few_pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for each image whose features are computed, and a tenth for each step, on whatever machine."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    inputs, step = SAAE.training_inputs, SAAE.training_step

    def slow_inputs(model: SAAE, batch: Any) -> Any:
        clock.now += len(batch.image)
        return inputs(model, batch)

    def slow_step(model: SAAE, *args: Any, **kwargs: Any) -> Any:
        clock.now += 0.1
        return step(model, *args, **kwargs)

    monkeypatch.setattr(estimate, "time", clock)
    monkeypatch.setattr(SAAE, "training_inputs", slow_inputs)
    monkeypatch.setattr(SAAE, "training_step", slow_step)
    config = config_of("SAAE", tmp_path, max_epochs=50)
    found = estimate.main(["--config", config, "--images", "1000", "--batch_size", "4"])
    assert found.before == pytest.approx(1000)
    assert found.step == pytest.approx(0.1)
    assert found.after == pytest.approx(0)
    assert found.seconds == pytest.approx(1000 + 50 * 250 * 0.1)


def test_features_that_do_not_fit_are_found_out(few_pictures: None, tmp_path: Path) -> None:
    config = config_of("SAAE", tmp_path, max_steps=10)
    found = estimate.main(["--config", config, "--images", "1000000", "--batch_size", "2"])
    assert found.steps == 10
    assert "more than feature_cache_gib=2: computed anew in each epoch" in found.features


def test_a_training_that_a_time_ends_is_estimated(few_pictures: None, tmp_path: Path) -> None:
    config = config_of("InTra", tmp_path, max_epochs=-1, max_time="00:00:05:00")
    found = estimate.main(["--config", config, "--images", "20", "--batch_size", "4"])
    assert found.steps * found.step == pytest.approx(300, rel=0.01)
    config = config_of("InTra", tmp_path, max_epochs=1, max_time="00:00:05:00")
    assert estimate.main(["--config", config, "--images", "20", "--batch_size", "4"]).steps == 5


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    config = config_of("SAAE", tmp_path)
    with pytest.raises(ValueError, match="config must be a file"):
        estimate.main(["--config", str(tmp_path / "no.yaml"), "--images", "10"])
    with pytest.raises(ValueError, match="images must be positive, got 0"):
        estimate.main(["--config", config, "--images", "0"])
    endless = config_of("InTra", tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"Nothing ends the training: pass --trainer\.max_epochs or"):
        estimate.main(["--config", endless, "--images", "10"])
    config = config_of("SAAE", tmp_path)
    with pytest.raises(ValueError, match="batch_size must be positive, got -1"):
        estimate.main(["--config", config, "--images", "10", "--batch_size", "-1"])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.52, "0.5 s"), (75, "1 min 15 s"), (7500, "2 h 5 min"), (500000, "5.8 days")]
)
def test_times_are_said_in_words(seconds: float, words: str) -> None:
    assert estimate.describe_time(seconds) == words

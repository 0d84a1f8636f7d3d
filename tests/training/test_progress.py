# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest

from anomalib_recon.training import progress
from tests.tiny_models import build, train


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "since the start" in record.message]


@pytest.mark.parametrize("name", ["InTra", "ADTR"])
def test_a_training_without_a_terminal_says_where_it_is(
    name: str, demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    train(build(name), demo, tmp_path)
    places = [re.match(r"epoch (\d)/3, batch (\d)/3", line).groups() for line in lines_of(caplog)]
    assert places == [(str(epoch), str(batch)) for epoch in (1, 2, 3) for batch in (1, 2, 3)]
    assert "loss of the last epoch" in lines_of(caplog)[-1]


def test_a_short_training_says_nothing(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(build("ADTR"), demo, tmp_path)
    assert not lines_of(caplog)

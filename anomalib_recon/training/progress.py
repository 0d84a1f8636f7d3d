# SPDX-License-Identifier: Apache-2.0

"""Progress of a long training in a log, where a progress bar cannot be seen."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

SECONDS_BETWEEN_LINES = 30.0


class ProgressLines(Callback):
    """Log a line at the end of a batch, at most every half minute, if the output does not go to a terminal."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._is_needed = not sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where the training is, if it is time."""
        del pl_module, outputs, batch
        now = time.monotonic()
        if not self._is_needed or now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        last_epoch = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        loss = trainer.callback_metrics.get("train_loss")
        rank_zero_info(
            f"epoch {trainer.current_epoch + 1}/{last_epoch}, batch {batch_idx + 1}/{trainer.num_training_batches}"
            + (f", loss of the last epoch {float(loss):.4g}" if loss is not None else "")
            + f", {timedelta(seconds=round(now - self._start))} since the start"
        )

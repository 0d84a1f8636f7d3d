# SPDX-License-Identifier: Apache-2.0

"""Large images as tiles, by anomalib's tiler."""

from typing import cast

from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor


class Tiling:
    """Mixin of networks to which anomalib's ``TilerConfigurationCallback`` can give a tiler.

    A tile then is what an image is otherwise: it is embedded, reconstructed and compared alone.

    Attributes:
        tiler (Tiler | None): Cuts images into tiles, if there is one.
    """

    tiler: Tiler | None = None

    def tile(self, images: Tensor) -> Tensor:
        """Cut images of shape ``(B, 3, H, W)`` into n tiles each, ``(B * n, 3, h, w)``, if there is a tiler."""
        return images if self.tiler is None else self.tiler.tile(images)

    def untile(self, predictions: InferenceBatch) -> InferenceBatch:
        """Put the predictions of the tiles of images together.

        Args:
            predictions (InferenceBatch): ``pred_score`` of shape ``(B * n,)`` and ``anomaly_map`` of shape
                ``(B * n, 1, h, w)``.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)``, that of the worst tile, and ``anomaly_map`` of shape
                ``(B, 1, H, W)``, the mean where tiles overlap.
        """
        if self.tiler is None:
            return predictions
        scores, maps = cast("Tensor", predictions.pred_score), cast("Tensor", predictions.anomaly_map)
        scores = scores.unflatten(0, (self.tiler.batch_size, -1)).amax(dim=1)
        return InferenceBatch(pred_score=scores, anomaly_map=self.untile_images(maps))

    def untile_images(self, tiles: Tensor) -> Tensor:
        """Put tiles of images together, ``(B * n, C, h, w) -> (B, C, H, W)``."""
        return tiles if self.tiler is None else self.tiler.untile(tiles)


def tiler_arguments(tiler: Tiler) -> dict[str, object]:
    """Arguments with which a tiler is built anew, as plain data."""
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": str(tiler.mode.value if hasattr(tiler.mode, "value") else tiler.mode),
    }

# SPDX-License-Identifier: Apache-2.0

"""What an exported file says about its scores: thresholds and bounds of normalisation."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

RAW_SCORE, RAW_MAP = "raw_score", "raw_map"
# share of the image that is inside the region of interest, for a model that has one
REGION_SHARE = "region_share"
# section of OpenVINO's rt_info, and first word of ONNX's keys; what model_api reads has its own
SECTION, MODEL_API_SECTION = "anomalib_recon", "model_info"
# where the numbers of the thresholds are in an ONNX graph
PREFIX = "post_processor.thresholding."
# the smallest float32 with all its digits: scores that differ at all are beyond the ends of so short a scale
SMALLEST = 2.0**-126


@dataclass(frozen=True)
class Scale:
    """How raw scores become scores: ``threshold`` becomes 0.5, and ``max - min`` is the length of the scale.

    Attributes:
        threshold (float): Raw score that is normalised to 0.5.
        min (float): Raw score from which the length of the scale counts.
        max (float): Raw score to which it counts.
        limit (float): What is above is anomalous, on the scale of the scores that are given out.
    """

    threshold: float
    min: float
    max: float
    limit: float

    @property
    def range(self) -> float:
        """Length of the scale in raw scores; positive."""
        return self.max - self.min or SMALLEST

    def raw_limit(self, *, normalized: bool) -> float:
        """Raw score above which something is anomalous.

        Args:
            normalized (bool): Whether scores are given out normalised.

        Returns:
            float: The raw score.
        """
        return self.threshold + (self.limit - 0.5) * self.range if normalized else self.limit

    def constants(self, *, normalized: bool) -> dict[str, float]:
        """Numbers that an exported graph computes with.

        Args:
            normalized (bool): Whether scores are given out normalised.

        Returns:
            dict[str, float]: Numbers by their name.
        """
        scale = {"threshold": self.threshold, "range": self.range} if normalized else {}
        return {**scale, "limit": self.limit}

    @classmethod
    def of_normal_scores(cls, lowest: float, threshold: float, *, normalized: bool) -> "Scale":
        """Put the lowest score of normal images at 0 and the threshold at 0.5.

        Args:
            lowest (float): Lowest raw score.
            threshold (float): Raw score above which something is anomalous.
            normalized (bool): Whether scores are given out on that scale; otherwise they are raw.

        Returns:
            Scale: The scale.
        """
        return cls(threshold, lowest, 2 * threshold - lowest, 0.5 if normalized else threshold)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of a model.

    Attributes:
        image (Scale): Of the scores of images.
        pixel (Scale | None): Of the scores of pixels; ``None`` for a model without maps.
        normalized (bool): Whether scores are given out normalised to [0, 1], or raw.
    """

    image: Scale
    pixel: Scale | None
    normalized: bool

    def to_metadata(self) -> dict[str, str]:
        """Text for a file, exact to the last digit."""
        scales = {"image": self.image, "pixel": self.pixel}
        values = {
            f"{kind}_{field.name}": repr(getattr(scale, field.name))
            for kind, scale in scales.items()
            if scale
            for field in fields(Scale)
        }
        return {"normalized": str(self.normalized), **values}

    def constants(self) -> dict[str, float]:
        """Numbers that an exported graph computes with.

        Returns:
            dict[str, float]: Numbers by their name in the graph.
        """
        scales = {"image": self.image, "pixel": self.pixel}
        return {
            f"{kind}_{name}": value
            for kind, scale in scales.items()
            if scale
            for name, value in scale.constants(normalized=self.normalized).items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Thresholds":
        """Read what :meth:`to_metadata` wrote.

        Args:
            metadata (Mapping[str, str]): Text by its key.

        Returns:
            Thresholds: The thresholds.

        Raises:
            ValueError: If there are none.
        """
        if "image_threshold" not in metadata:
            msg = (
                "The export says no thresholds; export it anew with RawScoreExport, from a model whose post-processor "
                "has set them."
            )
            raise ValueError(msg)

        def read(kind: str) -> Scale:
            return Scale(**{field.name: float(metadata[f"{kind}_{field.name}"]) for field in fields(Scale)})

        pixel = read("pixel") if "pixel_threshold" in metadata else None
        return cls(read("image"), pixel, metadata["normalized"] == "True")

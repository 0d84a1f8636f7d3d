# SPDX-License-Identifier: Apache-2.0

"""Set another false-positive rate on an exported model, from a folder of normal images.

Each threshold is the lowest at which at most the chosen fraction of the images, or of their pixels, is called
anomalous. Needs numpy, Pillow, and openvino for an .xml file or onnxruntime for an .onnx file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .calibration import check_output, find_thresholds, set_thresholds
from .grey_levels import add_level_arguments, levels_from
from .images import find_images
from .metadata import Thresholds
from .model import ExportedModel


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        "python -m anomalib_recon.deploy.thresholds", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="exported model, .xml or .onnx")
    parser.add_argument("--images", type=Path, required=True, help="folder of normal images not trained on")
    parser.add_argument("--image_fpr", type=float, default=0.05, help="highest fraction of images (default: 0.05)")
    parser.add_argument("--pixel_fpr", type=float, default=0.005, help="highest fraction of pixels (default: 0.005)")
    parser.add_argument("--output", type=Path, help="file to write (default: the model itself)")
    add_level_arguments(parser)
    return parser


def main(args: Sequence[str] | None = None) -> Thresholds:
    """Find the thresholds, write them to the model, and print both.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Returns:
        Thresholds: The new thresholds.

    Raises:
        ValueError: See :func:`anomalib_recon.deploy.find_thresholds` and
            :func:`anomalib_recon.deploy.set_thresholds`.
    """
    options = build_parser().parse_args(args)
    model = ExportedModel(options.model)
    check_output(options.model, options.output)
    paths = find_images(options.images)
    old = model.thresholds
    new = find_thresholds(model, paths, options.image_fpr, options.pixel_fpr, levels_from(options))
    set_thresholds(options.model, new, options.output)
    if 0 < options.image_fpr * len(paths) < 1:
        print(f"image_fpr {options.image_fpr:g} cannot be told apart from 0 with {len(paths)} images.")
    print(f"thresholds of raw scores, from {len(paths)} images")
    for kind in ("image", "pixel"):
        if after := getattr(new, kind):
            before = getattr(old, kind).raw_limit(normalized=old.normalized)
            print(f"{kind}  {before:.6g} -> {after.raw_limit(normalized=new.normalized):.6g}")
    print(f"written to {options.output or options.model}")
    return new


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        build_parser().error(str(error))

# SPDX-License-Identifier: Apache-2.0

"""Prepare a trained model for others: a folder with its checkpoint and a model card.

The folder can be handed on as it is, or uploaded to the Hugging Face Hub with `hf upload OWNER/NAME FOLDER`.
`anomalib_recon.pretrained.load_pretrained` loads it from either place. The card says what the model is, what it was
trained on, its figures, thresholds and licence. The licence of the backbone's weights, which a checkpoint holds, too,
remains.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import anomalib
from anomalib.models import AnomalibModule
from huggingface_hub import EvalResult, ModelCardData

from anomalib_recon import models
from anomalib_recon.data import DeepGreyPredictDataset
from anomalib_recon.deploy import GreyLevels
from anomalib_recon.files import write_whole
from anomalib_recon.pretrained import CHECKPOINT, CONFIG, load_model

CARD = "README.md"
TEMPLATE = """---
{data}
---

# {title}

{name} of [anomalib](https://github.com/open-edge-platform/anomalib), from the package anomalib-recon: it finds defects
in images by what it rebuilds badly, and was trained on good images of the product below.

**Trained on** {trained_on}

## Use

```python
from anomalib.engine import Engine
{imports}from anomalib_recon.pretrained import load_pretrained

model = load_pretrained("FOLDER OR owner/name")
predictions = Engine().predict(model, {images})
```

## Figures

{figures}

## Thresholds

{thresholds}

## Arguments

{arguments}

Written with anomalib-recon {own_version}, anomalib {anomalib_version} and torch {torch_version}.

## Licence

{licence}. The checkpoint holds the weights of its backbone, if it has one; their licence holds, too.
"""


def write_folder(
    name: str,
    checkpoint: Path,
    output: Path,
    trained_on: str,
    licence: str,
    figures: Mapping[str, float],
) -> AnomalibModule:
    """Write a checkpoint, its configuration and its model card.

    Args:
        name (str): Name of the model class, such as ``"SAAE"``.
        checkpoint (Path): The checkpoint.
        output (Path): Folder to write.
        trained_on (str): What it was trained on, in a sentence.
        licence (str): Identifier of the licence, such as ``"cc-by-nc-sa-4.0"``.
        figures (Mapping[str, float]): Metrics on test images by their names.

    Returns:
        AnomalibModule: The model.

    Raises:
        ValueError: If the checkpoint does not exist, or is not one of this model, or the folder has a README.md of
            something else.
    """
    if not checkpoint.is_file():
        msg = f"ckpt={checkpoint} is no file; pass the checkpoint that a training has written."
        raise ValueError(msg)
    if (output / CARD).exists() and not (output / CONFIG).exists():
        msg = f"output={output} has a {CARD} that is no model card; choose another folder."
        raise ValueError(msg)
    model = load_model(name, checkpoint)
    card = card_of(model, output.resolve().name, trained_on, licence, figures)
    output.mkdir(parents=True, exist_ok=True)
    if checkpoint.resolve() != (output / CHECKPOINT).resolve():
        temporary = output / f"{CHECKPOINT}.part"
        shutil.copyfile(checkpoint, temporary)
        temporary.replace(output / CHECKPOINT)
    versions = {"anomalib-recon": version("anomalib-recon"), "anomalib": anomalib.__version__}
    write_whole(output / CONFIG, json.dumps({"model": name, "versions": versions}, indent=2).encode())
    write_whole(output / CARD, card.encode())
    return model


def card_of(model: AnomalibModule, title: str, trained_on: str, licence: str, figures: Mapping[str, float]) -> str:
    """Write a model card.

    Args:
        model (AnomalibModule): The model.
        title (str): Its heading.
        trained_on (str): What it was trained on.
        licence (str): Identifier of the licence.
        figures (Mapping[str, float]): Metrics on test images by their names.

    Returns:
        str: Markdown with the metadata of the Hugging Face Hub.
    """
    name = type(model).__name__
    results = [EvalResult("anomaly-detection", "image", trained_on, metric, value) for metric, value in figures.items()]
    data = ModelCardData(
        license=licence,
        library_name="anomalib",
        tags=["anomaly-detection", "anomalib-recon", name],
        model_name=title,
        eval_results=results or None,
    )
    hidden = {"pre_processor", "post_processor", "evaluator", "visualizer", "backbone_weights", "normal_checkpoint"}
    arguments = {key: value for key, value in sorted(model.hparams.items()) if key not in hidden}
    imports, images = _reading(cast("GreyLevels | None", model.grey_levels))
    return TEMPLATE.format(
        imports=imports,
        images=images,
        data=data.to_yaml(),
        title=title,
        name=name,
        trained_on=trained_on,
        figures=_table("metric", {metric: f"{value:.4g}" for metric, value in figures.items()}) or "None were given.",
        thresholds=_table("of raw scores", _thresholds(model.post_processor)) or "None: the scores are raw.",
        arguments=_table("argument", {key: f"`{value}`" for key, value in arguments.items()}),
        own_version=version("anomalib-recon"),
        anomalib_version=anomalib.__version__,
        torch_version=version("torch"),
        licence=licence,
    )


def _thresholds(post_processor: Any) -> dict[str, str]:
    """Thresholds of images and pixels, as far as they are set; one of each product, if there are several."""
    found = {kind: getattr(post_processor, f"{kind}_threshold", None) for kind in ("image", "pixel")}
    return {
        kind: ", ".join(f"{value:.6g}" for value in values.flatten().tolist())
        for kind, values in found.items()
        if values is not None and not values.isnan().all()
    }


def _reading(levels: GreyLevels | None) -> tuple[str, str]:
    """Code that imports what reads images, and the argument of ``predict`` that names them."""
    if levels is None:
        return "", 'data_path="IMAGES"'
    arguments = f'"IMAGES", {levels.black_level:.10g}, {levels.white_level:.10g}'
    name = DeepGreyPredictDataset.__name__
    return f"from anomalib_recon.data import {name}\n", f"dataset={name}({arguments})"


def _table(heading: str, values: Mapping[str, str]) -> str:
    """A table of two columns, empty without values."""
    lines = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join([f"| {heading} | value |", "|---|---|", *lines]) if lines else ""


def _figure(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        msg = f"must be like image_AUROC=0.97, got {text!r}"
        raise argparse.ArgumentTypeError(msg) from error


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser("python -m anomalib_recon.card", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, choices=models.__all__)
    parser.add_argument("--ckpt", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="the folder; its name is the heading of the card")
    parser.add_argument("--trained_on", required=True, help="what it was trained on, in a sentence")
    parser.add_argument("--licence", required=True, help="identifier of the licence, such as cc-by-nc-sa-4.0")
    parser.add_argument(
        "--figures", type=_figure, nargs="*", default=[], metavar="NAME=VALUE", help="metrics on test images"
    )
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Raises:
        ValueError: If the checkpoint does not exist, or is not one of this model.
    """
    options = build_parser().parse_args(args)
    figures = dict(options.figures)
    write_folder(options.model, options.ckpt, options.output, options.trained_on, options.licence, figures)
    print(f"{options.output / CARD}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        build_parser().error(str(error))

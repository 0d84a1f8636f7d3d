# SPDX-License-Identifier: Apache-2.0

"""Trained models from a folder or the Hugging Face Hub.

Example:
    >>> from anomalib_recon.pretrained import load_pretrained
    >>> model = load_pretrained("published/screw")  # doctest: +SKIP
    >>> model = load_pretrained("owner/screw", revision="v1")  # doctest: +SKIP
"""

import json
from pathlib import Path

from anomalib.models import AnomalibModule
from huggingface_hub import snapshot_download

from anomalib_recon import models
from anomalib_recon.post_processing import ProductPostProcessor
from anomalib_recon.training import load_checkpoint

CHECKPOINT, CONFIG = "model.ckpt", "config.json"


def load_pretrained(source: str | Path, revision: str | None = None) -> AnomalibModule:
    """Load a trained model that ``python -m anomalib_recon.card`` has prepared.

    The checkpoint holds the weights of the backbone, too, so nothing else is downloaded. It is read as plain data.

    Args:
        source (str | Path): A folder, or the name of a model on the Hub, ``"owner/name"``.
        revision (str | None): Branch, tag or commit on the Hub.
            Defaults to ``None``, its newest state.

    Returns:
        AnomalibModule: The model in evaluation mode, with its thresholds.

    Raises:
        ValueError: If the folder lacks a file, or names a model that this package does not have.
        ConnectionError: If ``source`` is no folder and the Hub does not give it.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision)
    missing = [name for name in (CHECKPOINT, CONFIG) if not (folder / name).is_file()]
    if missing:
        msg = f"source={source} has no {' and no '.join(missing)}; python -m anomalib_recon.card writes such a folder."
        raise ValueError(msg)
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
    except (ValueError, TypeError, KeyError) as error:
        msg = f"source={source}: {CONFIG} does not name a model; write the folder anew by anomalib_recon.card."
        raise ValueError(msg) from error
    return load_model(name, folder / CHECKPOINT)


def load_model(name: str, checkpoint: Path) -> AnomalibModule:
    """Load a checkpoint of one of this package's models.

    Args:
        name (str): Name of the model class, such as ``"SAAE"``.
        checkpoint (Path): The checkpoint.

    Returns:
        AnomalibModule: The model in evaluation mode.

    Raises:
        ValueError: If this package has no such model, or the file is no checkpoint.
    """
    if name not in models.__all__:
        msg = f"model must be one of {', '.join(models.__all__)}, got {name!r}."
        raise ValueError(msg)
    further = ProductPostProcessor.argument_for(load_checkpoint(checkpoint, "ckpt"))
    return getattr(models, name).load_from_checkpoint(checkpoint, map_location="cpu", **further).eval()


def _download(source: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[CHECKPOINT, CONFIG]))
    except Exception as error:  # no such name, no network, no access: huggingface_hub has a class for each
        msg = (
            f"source={source!r} is no folder here, and the Hugging Face Hub does not give it "
            f"({type(error).__name__}); check the name and the network, or pass a folder."
        )
        raise ConnectionError(msg) from error

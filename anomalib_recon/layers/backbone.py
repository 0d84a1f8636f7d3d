# SPDX-License-Identifier: Apache-2.0

"""Backbones of timm, with weights from timm or from a file.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import FrozenBackbone
    >>> backbone = FrozenBackbone("resnet18", ["layer1", "layer2"], pre_trained=False)
    >>> [features.shape for features in backbone(torch.rand(1, 3, 64, 64))]
    [torch.Size([1, 64, 16, 16]), torch.Size([1, 128, 8, 8])]
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT, SAFETENSORS_SINGLE_FILE
from timm.layers import Format
from timm.models import GraphExtractNet, load_state_dict
from torch import Tensor, nn
from torch.nn import functional

from .arguments import check_named_once

# side of the image with which the channels of modules are counted
PROBE_SIZE = 64


class FrozenBackbone(nn.Module):
    """Feature maps of a pre-trained timm CNN, which stays in eval mode and gets no gradients.

    Args:
        name (str): Model of timm, with or without the tag of its weights.
        layers (Sequence[str] | None): Names of the stages whose feature maps are returned, as in timm's
            ``feature_info``, or of any modules of the network. ``None`` stands for all stages.
            Defaults to ``None``.
        pre_trained (bool): Use the weights that timm has for this model.
            Defaults to ``True``.
        weights (str | Path | None): File with weights in timm's format, to use instead.
            Defaults to ``None``.

    Raises:
        ValueError: If there is no such model, no such stage or module, or the file holds the weights of another model.
        FileNotFoundError: If there is no such file.
        ConnectionError: If the weights are not in the local cache and their host does not answer.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        stages = list(stage_strides(name))
        layers = list(stages if layers is None else layers)
        check_named_once(layers)
        if layers and set(layers) <= set(stages):
            indices = sorted(stages.index(layer) for layer in layers)
            self.extractor = create_backbone(name, pre_trained, weights, features_only=True, out_indices=indices)
            self.num_channels: list[int] = self.extractor.feature_info.channels()
        else:
            _check_modules(name, layers, stages)
            model = create_backbone(name, pre_trained, weights, num_classes=0).eval()
            for module in model.modules():
                if hasattr(module, "inplace"):
                    module.inplace = False  # it would change the features of the module before it
            self.extractor = GraphExtractNet(model, layers, squeeze_out=False)
            maps = self.extractor(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
            self.num_channels = [features.shape[1] for features in maps]
        self.extractor.requires_grad_(requires_grad=False)
        # in this order of memory its convolutions are faster, most of all in bfloat16
        self.extractor.to(memory_format=torch.channels_last)
        self.normalize = BackboneNormalize(name)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in eval mode, so that the statistics of batch normalisation stay as they are."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of the chosen stages, from the first to the last, or of modules, in their order.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            list[Tensor]: Feature maps of shape ``(B, C_i, H / stride_i, W / stride_i)``, rounded up.
        """
        return self.extractor(self.normalize(images))


class BackboneNormalize(nn.Module):
    """Shift and scale images by the mean and standard deviation that a timm model was trained with.

    Args:
        name (str): Model of timm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        config = cast("Any", timm.get_pretrained_cfg(name, allow_unregistered=True))
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images of shape ``(B, 3, H, W)`` with values in [0, 1]."""
        # OpenVINO joins plain arithmetic wrongly with the resize before it, where the size of the input is fixed
        # not every torch takes an epsilon of 0; this one is lost in rounding
        return functional.batch_norm(images, self.mean, self.std.square(), eps=1e-12)


def stage_strides(name: str) -> dict[str, int]:
    """Name the stages of a timm CNN, from the first to the last, and their strides.

    Args:
        name (str): Model of timm.

    Returns:
        dict[str, int]: Pixels of the image per cell of the feature map, along each axis, for each stage.

    Raises:
        ValueError: If there is no such model, or it has no such stages.
    """
    _check_name(name)
    return dict(_find_strides(name))


@functools.cache
def _find_strides(name: str) -> dict[str, int]:
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, features_only=True)
    strides = {stage["module"]: stage["reduction"] for stage in model.feature_info.info}
    if len(set(strides.values())) == 1 or getattr(model, "output_fmt", Format.NCHW) != Format.NCHW:
        msg = (
            f"backbone must be a CNN, whose stages are feature maps (B, C, H, W) of several strides, got {name!r}; "
            "plain vision transformers are for SAAE and FeatureInpainting."
        )
        raise ValueError(msg)
    return strides


def _check_modules(name: str, layers: Sequence[str], stages: Sequence[str]) -> None:
    with torch.device("meta"):
        modules = dict(timm.create_model(name, pretrained=False).named_modules())
    unknown = [layer for layer in layers if layer not in modules]
    if unknown or not layers:
        msg = (
            f"layers must be among {', '.join(stages)}, or be modules of backbone={name!r}, got "
            f"{', '.join(unknown) or 'none'}."
        )
        raise ValueError(msg)


def create_backbone(name: str, pre_trained: bool, weights: str | Path | None, **kwargs: Any) -> Any:
    """Create a timm model.

    Args:
        name (str): Model of timm, with or without the tag of its weights.
        pre_trained (bool): Use the weights that timm has for this model.
        weights (str | Path | None): File with weights in timm's format, to use instead.
        **kwargs (Any): Arguments of ``timm.create_model``.

    Returns:
        Any: The model.

    Raises:
        ValueError: If there is no such model, or the file holds the weights of another one.
        FileNotFoundError: If there is no such file.
        ConnectionError: If the weights are not in the local cache and their host does not answer.
    """
    _check_name(name)
    if weights is not None and not Path(weights).is_file():
        msg = f"backbone_weights={weights} is not a file; pass a file with the weights of {name} in timm's format."
        raise FileNotFoundError(msg)
    file = weights or (_find_in_cache(name) if pre_trained else None)
    if file is None:
        if pre_trained:
            _check_host(name)
        return timm.create_model(name, pretrained=pre_trained, **kwargs)
    model = timm.create_model(name, pretrained=False, **kwargs)
    _load_weights(model, name, file)
    return model


def _check_name(name: str) -> None:
    try:  # is_model would accept any tag
        timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, AttributeError) as error:  # the latter for what is no text
        msg = f"backbone={name!r} is not a model of timm {timm.__version__}; timm.list_models() lists them."
        raise ValueError(msg) from error


def _load_weights(model: nn.Module, name: str, file: str | Path) -> None:
    """Load all weights of a model from a file, which may hold more, such as a classifier."""
    try:
        # timm joins the names of nested stages with underscores when it builds a model for its features
        found = {key.replace(".", "_"): value for key, value in load_state_dict(str(file), weights_only=True).items()}
    except Exception as error:
        msg = f"backbone_weights={file} cannot be read ({error}); pass a safetensors file or a PyTorch state dict."
        raise ValueError(msg) from error
    # the number of batches that batch normalisation has seen has no effect, and some files leave it out
    needed = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    names = {key: key.replace(".", "_") for key in needed}
    wrong = [key for key in needed if names[key] not in found or found[names[key]].shape != needed[key].shape]
    if wrong:
        msg = (
            f"backbone_weights={file} lacks {len(wrong)} of the {len(needed)} tensors of {name}, {wrong[0]} for one; "
            "pass a file of this model in timm's format."
        )
        raise ValueError(msg)
    model.load_state_dict({key: found[names[key]] for key in needed}, strict=False)


def _find_in_cache(name: str) -> str | None:
    """Find weights that were downloaded before, so that they need no network."""
    repository = cast("Any", timm.get_pretrained_cfg(name)).hf_hub_id
    file = try_to_load_from_cache(repository, SAFETENSORS_SINGLE_FILE) if repository else None
    return file if isinstance(file, str) else None


def _check_host(name: str) -> None:
    """Ask once for the weights, where timm would ask many times."""
    config = cast("Any", timm.get_pretrained_cfg(name))
    url = hf_hub_url(config.hf_hub_id, SAFETENSORS_SINGLE_FILE) if config.hf_hub_id else config.url
    if not url:
        msg = f"timm has no weights for backbone={name!r}; pass backbone_weights=FILE, or pre_trained=False."
        raise ValueError(msg)
    try:
        get_session().head(url, timeout=HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        msg = (
            f"The weights of backbone={name!r} are not in the local cache, and their host does not answer ({error}); "
            "pass backbone_weights=FILE, or pre_trained=False to do without or to load a checkpoint."
        )
        raise ConnectionError(msg) from error

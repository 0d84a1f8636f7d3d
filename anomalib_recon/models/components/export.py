# SPDX-License-Identifier: Apache-2.0

"""Export to ONNX in the operator set in which the graph is made."""

from pathlib import Path
from typing import Any

OPSET_VERSION = 18


class CurrentOpsetExport:
    """Mixin of models whose graph no converter brings to operator set 14, for which anomalib asks.

    The attempt ends in a printed traceback, and the graph stays as it is.
    """

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX.

        Args:
            export_root (Path | str): Folder for the export.
            model_file_name (str): Name of the file, without ending.
            input_size (tuple[int, int] | None): Height and width of the input; dynamic if ``None``.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The exported file.
        """
        arguments = {"opset_version": OPSET_VERSION, **kwargs}
        return super().to_onnx(export_root, model_file_name, input_size, **arguments)  # type: ignore[misc]

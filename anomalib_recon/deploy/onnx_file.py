# SPDX-License-Identifier: Apache-2.0

"""Read and change an ONNX file without the package ``onnx``: its outputs, some of its constants, its metadata.

A file is a protocol buffer: a sequence of fields, each a tag, which holds number and type, and a value. What is changed
in the graph keeps its length, and metadata are fields of the outermost message, so no length has to be computed anew.
See https://protobuf.dev/programming-guides/encoding and onnx.proto.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .metadata import PREFIX, RAW_MAP, RAW_SCORE, SECTION, Thresholds

# numbers of fields in onnx.proto
GRAPH, METADATA = 7, 14  # of ModelProto
INITIALIZER, OUTPUT, VALUE_INFO = 5, 12, 13  # of GraphProto
TENSOR_NAME, RAW_DATA = 8, 9  # of TensorProto
VALUE_NAME = 1  # of ValueInfoProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    """A field: its number, and where its tag and its value begin and end."""

    number: int
    tag: int
    start: int
    end: int


def read_metadata(content: bytes | bytearray) -> dict[str, str]:
    """Read what the file says about its scores.

    Args:
        content (bytes | bytearray): Content of the file.

    Returns:
        dict[str, str]: Text by its key.
    """
    entries = dict(_entry(content, field) for field in _fields(content, METADATA))
    return {key.removeprefix(f"{SECTION} "): value for key, value in entries.items() if key.startswith(f"{SECTION} ")}


def write_metadata(content: bytes | bytearray, metadata: Mapping[str, str]) -> bytes:
    """Replace what the file says about its scores.

    Args:
        content (bytes | bytearray): Content of the file.
        metadata (Mapping[str, str]): Text by its key.

    Returns:
        bytes: Content of a file.
    """
    new = {f"{SECTION} {key}": value for key, value in metadata.items()}
    kept, position = b"", 0
    for field in _fields(content, METADATA):
        if _entry(content, field)[0] in new:
            kept, position = kept + bytes(content[position : field.tag]), field.end
    entries = (_delimited(KEY, key.encode()) + _delimited(VALUE, value.encode()) for key, value in new.items())
    return kept + bytes(content[position:]) + b"".join(_delimited(METADATA, entry) for entry in entries)


def write_thresholds(content: bytes, thresholds: Thresholds) -> bytes:
    """Give a graph other thresholds.

    Args:
        content (bytes): Content of the file.
        thresholds (Thresholds): Thresholds.

    Returns:
        bytes: Content of a file.

    Raises:
        ValueError: If the graph has no thresholds.
    """
    return write_metadata(_write_constants(content, thresholds.constants()), thresholds.to_metadata())


def with_raw_outputs(content: bytes) -> bytes:
    """Make the raw score and map that a graph computes its last outputs.

    Args:
        content (bytes): Content of the file.

    Returns:
        bytes: The same, with raw score and map as outputs, too.
    """
    changed = bytearray(content)
    for field, name in _named(content, VALUE_INFO, VALUE_NAME):
        if name in {RAW_SCORE, RAW_MAP}:
            changed[field.tag] = OUTPUT << 3 | DELIMITED
    return bytes(changed)


def save_whole(content: bytes, path: Path) -> None:
    """Write a file whole or not at all.

    Args:
        content (bytes): Its content.
        path (Path): The file.
    """
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _write_constants(content: bytes, constants: Mapping[str, float]) -> bytes:
    """Change numbers of a graph, each a single float32."""
    changed, missing = bytearray(content), set(constants)
    for field, name in _named(content, INITIALIZER, TENSOR_NAME):
        constant = name.removeprefix(PREFIX)
        for part in _fields(content, RAW_DATA, field):
            if name.startswith(PREFIX) and constant in constants:
                struct.pack_into("<f", changed, part.start, constants[constant])
                missing.discard(constant)
    if missing:
        msg = f"The graph has no constant {sorted(missing)[0]}; export it anew with RawScoreExport."
        raise ValueError(msg)
    return bytes(changed)


def _named(content: bytes, kind: int, name: int) -> Iterator[tuple[_Field, str]]:
    """Fields of the graph of one kind, with their names."""
    for graph in _fields(content, GRAPH):
        for field in _fields(content, kind, graph):
            [part] = _fields(content, name, field)
            yield field, bytes(content[part.start : part.end]).decode()


def _entry(content: bytes | bytearray, field: _Field) -> tuple[str, str]:
    parts = {part.number: bytes(content[part.start : part.end]).decode() for part in _fields(content, None, field)}
    return parts[KEY], parts.get(VALUE, "")


def _fields(content: bytes | bytearray, number: int | None, message: _Field | None = None) -> Iterator[_Field]:
    """Fields of a message, those of a number alone if one is given."""
    position, end = (message.start, message.end) if message else (0, len(content))
    while position < end:
        tag_position = position
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind == DELIMITED:
            size, position = _varint(content, position)
        elif kind == VARINT:
            size = _varint(content, position)[1] - position
        elif kind in {FIXED32, FIXED64}:
            size = 4 if kind == FIXED32 else 8
        else:
            msg = "The file is no ONNX model, or it is damaged; export it anew."
            raise ValueError(msg)
        if number in {None, tag >> 3}:
            yield _Field(tag >> 3, tag_position, position, position + size)
        position += size


def _varint(content: bytes | bytearray, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _delimited(number: int, value: bytes) -> bytes:
    """A field with a text or a message of fewer than 16 384 bytes."""
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | DELIMITED]) + length + value

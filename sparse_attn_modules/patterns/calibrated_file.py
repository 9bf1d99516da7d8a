"""The file of a calibrated pattern: safetensors, with everything that is not bits as readable metadata.

The format is a length, a JSON header, and the bytes of the tensors. It is written and read here so that nothing but
torch is needed, and so that one pattern always gives the same bytes: the safetensors package orders metadata at random.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..token_grid import TokenGrid
from .calibrated_layer import CalibratedLayer

Made = TypeVar("Made")

FORMAT = "sparse_attn_modules.CalibratedPattern"
VERSION = 1
_MAX_HEADER = 100 << 20  # what the safetensors package accepts
_DIGITS = 6


def write(
    path: str | os.PathLike[str],
    layers: tuple[CalibratedLayer, ...],
    *,
    images: int,
    density: float,
    mass_kept: float,
) -> None:
    """Writes a pattern under another name first, so that a file that exists is complete."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "density": f"{density:.{_DIGITS}f}",
        "mass_kept": f"{mass_kept:.{_DIGITS}f}",
        "images": str(images),
        "layers": json.dumps([_described(layer) for layer in layers]),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for layer in layers:
        if layer.packed is None:
            continue
        assert layer.grid is not None
        blocks = layer.grid.num_blocks
        header[layer.name] = {
            "dtype": "U8",
            "shape": [layer.num_heads, blocks, -(-blocks // 8)],
            "data_offsets": [len(data), len(data) + len(layer.packed)],
        }
        data += layer.packed
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    unfinished.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    unfinished.replace(target)


def read(path: str | os.PathLike[str], make: Callable[[tuple[CalibratedLayer, ...], int], Made]) -> Made:
    """What ``make`` makes of the layers in a file, and of the number of images they were chosen on.

    Raises:
        ValueError: if it is no file of a calibrated pattern, or one of another version, or damaged.
    """
    content = Path(path).read_bytes()
    header, data = _split(path, content)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        got = metadata.get("format") if isinstance(metadata, dict) else None
        _refuse(path, f"have the format {FORMAT!r} in its metadata", repr(got))
    if metadata.get("version") != str(VERSION):
        _refuse(path, f"be of version {VERSION}, the one that this release reads", repr(metadata.get("version")))
    try:
        layers = tuple(_layer(facts, header, data) for facts in json.loads(metadata["layers"]))
        return make(layers, int(metadata["images"]))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        _refuse(path, "be complete", f"{type(error).__name__}: {error}")


def _described(layer: CalibratedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "grid": None if layer.grid is None else dict(zip(_GRID, layer.grid.pack())),
        "density": round(layer.density, _DIGITS),
        "mass": [round(mass, _DIGITS) for mass in layer.mass],
        "dense": layer.is_dense,
        "note": layer.note,
        "weights": [round(weight, _DIGITS) for weight in layer.weights],
    }


def _layer(facts: dict[str, Any], header: dict[str, Any], data: memoryview) -> CalibratedLayer:
    grid = None if facts["grid"] is None else TokenGrid.unpack([facts["grid"][name] for name in _GRID])
    packed = None
    if not facts["dense"]:
        entry = header[facts["name"]]
        start, stop = entry["data_offsets"]
        if entry["dtype"] != "U8" or not 0 <= start <= stop <= len(data):
            raise ValueError(f"{facts['name']} is stored as {entry}")
        packed = bytes(data[start:stop])
    mass, weights = (tuple(map(float, facts[name])) for name in ("mass", "weights"))
    layer = CalibratedLayer(
        str(facts["name"]), int(facts["heads"]), int(facts["head_dim"]), grid, packed, mass, weights, str(facts["note"])
    )
    if len(layer.mass) not in (0, layer.num_heads):
        raise ValueError(f"{layer.name} has {layer.num_heads} heads and the mass of {len(layer.mass)}")
    return layer


def _split(path: str | os.PathLike[str], content: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and the bytes of its tensors."""
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    if not 2 <= length <= min(len(content) - 8, _MAX_HEADER):
        _refuse(path, "be a safetensors file", f"{len(content)} bytes without its header")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        _refuse(path, "be a safetensors file", "a header that is not JSON")
    if not isinstance(header, dict):
        _refuse(path, "be a safetensors file", "a header that is no object")
    return header, memoryview(content)[8 + length :]


def _refuse(path: str | os.PathLike[str], must: str, got: str) -> NoReturn:
    raise ValueError(f"CalibratedPattern.load: {os.fspath(path)} must {must}, got {got}") from None


_GRID = ("height", "width", "prefix", "suffix", "tile_height", "tile_width")

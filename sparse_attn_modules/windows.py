"""Windows of an image: cut out of its tokens, and put back.

The image is cut from its first patch on; windows in the last row and column may hang over it. What they hold there is
zero.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def count_windows(grid: Size, window: Size) -> Size:
    """Rows and columns of windows on an image of (height, width) patches."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def partition(tensor: Tensor, grid: Size, window: Size) -> Tensor:
    """``[B, H, N, X]``, N patches in raster order, -> ``[B · windows, H, window patches, X]``, zeros beyond the image.

    Both are read and written with heads after tokens: transposed views of ``[…, H, X]``.
    """
    (height, width), (rows, columns) = grid, count_windows(grid, window)
    image = tensor.transpose(1, 2).unflatten(1, (height, width))  # [B, height, width, H, X]
    below, beside = rows * window[0] - height, columns * window[1] - width
    if below or beside:
        image = F.pad(image, (0, 0, 0, 0, 0, beside, 0, below))
    cut = image.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0]))  # [B, rows, h, columns, w, H, X]
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def unpartition(windows: Tensor, grid: Size, window: Size) -> Tensor:
    """The transpose of :func:`partition`; what lies beyond the image is dropped."""
    (height, width), (rows, columns) = grid, count_windows(grid, window)
    cut = windows.transpose(1, 2).unflatten(1, window).unflatten(0, (-1, rows, columns))  # [B, rows, columns, h, w, …]
    image = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows · h, columns · w, H, X]
    return image[:, :height, :width].flatten(1, 2).transpose(1, 2)

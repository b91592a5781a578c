"""Encoded images to arrays. Runs in: the worker."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from horovodrunner import validation as checked
from horovodrunner.errors import ArgumentValueError, ConfigurationError, DataError

__all__ = ["decode_images"]


def decode_images(
    column: str, size: tuple[int, int] | None = None, mode: str = "RGB"
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Make a batch transform that decodes a column of encoded images with Pillow.

    Parameters
    ----------
    column
        Name of the binary column: PNG, JPEG and whatever else Pillow knows.
    size
        Height and width in pixels that images are resized to; None leaves them, and all of a batch
        must have the same.
    mode
        Pillow's name of what a pixel is: ``"RGB"``, ``"L"`` for grey.

    Returns
    -------
    callable
        For ``batch_transform=``; the column becomes ``(batch, height, width, channels)`` uint8,
        without channels for ``"L"``. Pillow decodes several images at once in ``threads=``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the column is no name, or the size is none.
    DataError
        From the transform, if an image cannot be decoded, or sizes differ.

    Examples
    --------
    >>> import pyarrow as pa, PIL.Image
    >>> from horovodrunner import data
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (20, 10)).save(file, "PNG")
    >>> with data.from_arrow(pa.table({"image": [file.getvalue()]})) as rows:
    ...     (batch,) = rows.numpy(1, batch_transform=data.decode_images("image", size=(8, 8)))
    >>> batch["image"].shape
    (1, 8, 8, 3)
    """
    column, mode = checked.text("column", column), checked.text("mode", mode)
    if size is not None:
        try:
            height, width = (checked.integer("size", each, at_least=1) for each in size)
        except (TypeError, ValueError):
            raise ArgumentValueError(
                f"size={checked.shown(size)}: give height and width in pixels, (224, 224) say"
            ) from None
        size = (height, width)
    # not a closure: loader processes that are spawned get it pickled
    return functools.partial(_with_images, column, size, mode)


def _with_images(
    column: str, size: tuple[int, int] | None, mode: str, batch: dict[str, Any]
) -> dict[str, Any]:
    if column not in batch:
        raise DataError(f"there is no column {column!r} to decode; there are {', '.join(batch)}")
    images = []
    for row, encoded in enumerate(batch[column]):
        try:
            images.append(_decoded(encoded, size, mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"row {row} of the batch has no image in {column!r} that Pillow can decode "
                f"({len(encoded)} bytes, {encoded[:8]!r}...): {error}"
            ) from error
    if len(sizes := {image.shape for image in images}) > 1:
        raise DataError(
            f"images of one batch have different sizes, {sizes.pop()} and {sizes.pop()}: "
            "give decode_images a size"
        )
    return {**batch, column: np.stack(images)}


def _decoded(encoded: bytes, size: tuple[int, int] | None, mode: str) -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigurationError(
            f"decode_images needs Pillow, which {sys.executable} cannot import ({error}): "
            "pip install pillow"
        ) from error
    with PIL.Image.open(io.BytesIO(encoded)) as file:
        if size is not None:
            # JPEGs are decoded at about that size, which costs a fraction
            file.draft(mode, size[::-1])
        image = file if file.mode == mode else file.convert(mode)
        return np.asarray(image if size is None else image.resize(size[::-1]))

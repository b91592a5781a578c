"""Encoded images to arrays. Runs in: the worker."""

from __future__ import annotations

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
    if size is None:
        return _ImageDecoder(column, None, mode)
    try:
        height, width = (checked.integer("size", each, at_least=1) for each in size)
    except (TypeError, ValueError):
        raise ArgumentValueError(
            f"size={checked.shown(size)}: give height and width in pixels, (224, 224) say"
        ) from None
    return _ImageDecoder(column, (height, width), mode)


class _ImageDecoder:
    """The transform; a class, so that loader processes that are spawned get it pickled."""

    def __init__(self, column: str, size: tuple[int, int] | None, mode: str) -> None:
        self._column = column
        self._size = size
        self._mode = mode

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._column not in batch:
            raise DataError(
                f"there is no column {self._column!r} to decode; there are {', '.join(batch)}"
            )
        images = [self._decoded(place, each) for place, each in enumerate(batch[self._column])]
        if len(sizes := {image.shape for image in images}) > 1:
            raise DataError(
                f"images of one batch have different sizes, {sizes.pop()} and {sizes.pop()}: "
                "give decode_images a size"
            )
        return {**batch, self._column: np.stack(images)}

    def _decoded(self, place: int, encoded: bytes) -> Any:
        try:
            import PIL.Image
        except ImportError as error:
            raise ConfigurationError(
                f"decode_images needs Pillow, which {sys.executable} cannot import ({error}): "
                "pip install pillow"
            ) from error
        try:
            with PIL.Image.open(io.BytesIO(encoded)) as file:
                if self._size is not None:
                    # JPEGs are decoded at about that size, which costs a fraction
                    file.draft(self._mode, (self._size[1], self._size[0]))
                image = file if file.mode == self._mode else file.convert(self._mode)
                if self._size is not None:
                    image = image.resize((self._size[1], self._size[0]))
                return np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"row {place} of the batch has no image in {self._column!r} that Pillow can decode "
                f"({len(encoded)} bytes, {encoded[:8]!r}...): {error}"
            ) from error

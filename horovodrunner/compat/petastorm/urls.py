"""Where files are: paths, and URLs that fsspec knows. Runs in: every process."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urlsplit

from horovodrunner.errors import ArgumentValueError

__all__ = ["as_path", "without_file_scheme"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def without_file_scheme(url: str) -> str:
    """Make a path of a URL that is one.

    Parameters
    ----------
    url
        A URL, or a path.

    Returns
    -------
    str
        A path, if it begins with ``file:``; else what was given.

    Raises
    ------
    ArgumentValueError
        If it names another host.

    Examples
    --------
    >>> without_file_scheme("file:///dbfs/tmp/cache"), without_file_scheme("s3://bucket/cache")
    ('/dbfs/tmp/cache', 's3://bucket/cache')
    """
    if not url.startswith("file:"):
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ArgumentValueError(
            f"{url!r} names the host {parts.netloc!r}: three slashes come before a path, "
            f"file:///{parts.netloc}{parts.path}"
        )
    return unquote(parts.path)


def as_path(url: str, storage_options: dict[str, Any] | None) -> tuple[str, Any]:
    """Give what pyarrow needs to open a URL.

    Parameters
    ----------
    url
        A URL, or a path.
    storage_options
        What fsspec needs for it.

    Returns
    -------
    tuple of str and object
        The path, and fsspec's file system; None for the local one.
    """
    path = without_file_scheme(url)
    if not _SCHEME.match(path):
        return path, None
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(path, **(storage_options or {}))
    return path, filesystem

"""Where files are: paths, and URLs that fsspec knows. Runs in: every process."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from horovodrunner.storage import is_url, local_path, open_file_system, path_of_file_url

__all__ = ["as_path", "without_file_scheme"]


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
    path = path_of_file_url(url)
    return url if path is None else unquote(path)


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
    if not is_url(path):
        return str(local_path(path)), None
    filesystem, path = open_file_system(path, **(storage_options or {}))
    return path, filesystem

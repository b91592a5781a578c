"""Configuration of the documentation; build it with ``make docs``."""

from horovodrunner import __version__

project = "HorovodRunner"
author = "the HorovodRunner authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "adr/0000-template.md"]
nitpicky = True
# Names in numpydoc type fields that are words, not classes.
nitpick_ignore_regex = [
    ("py:class", r"object|optional|np|collections\.abc\..*|callable.*|.*Any|.*Callable.*"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings describe the parameters
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"HorovodRunner {version}"

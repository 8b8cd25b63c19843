# SPDX-License-Identifier: Apache-2.0
"""The site of `make docs`: the repository's own Markdown, and the API from the docstrings.

The sources begin at the root of the checkout, so that every page's links are the ones that a code host follows.
"""

import importlib
from typing import Any

import fused_inpaint

project = "fused_inpaint"
author = "The fused_inpaint authors"
version = release = fused_inpaint.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/README.md"]
exclude_patterns = [".*", "build", "dist"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"fused_inpaint {version}"
html_additional_pages = {"index": "redirect.html"}

myst_heading_anchors = 4
default_role = "py:obj"  # in docstrings, a name in backticks is a link where there is a page for it
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# A name of this package in a docstring must lead somewhere. torch's are not looked up, which would take a network, and
# types in signatures may be internal.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:.*", r"(?!fused_inpaint\.).*")]

# Each of these modules' __all__ is public, and each name in them must be on a page.
PUBLIC = ("fused_inpaint", "fused_inpaint.ops", "fused_inpaint.losses", "fused_inpaint.masks", "fused_inpaint.models")


def formulas(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """An indented block between blank lines is a formula: reStructuredText must not read its asterisks and bars."""
    for at in range(len(lines) - 1, 1, -1):
        if lines[at].startswith("    ") and not lines[at - 1] and lines[at - 2][:1].strip():
            lines[at - 1 : at - 1] = ["", "::"]


def is_field(app: Any, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    """Fields of a named tuple, which its signature shows, have nothing more to say."""
    return True if (getattr(item, "__doc__", None) or "").startswith("Alias for field number") else None


def require_every_public_name(app: Any, env: Any) -> None:
    from sphinx.errors import ExtensionError

    documented = env.get_domain("py").objects
    names = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    if missing := [name for name in names if name not in documented]:
        raise ExtensionError(f"docs/api must have an entry for each public name, got none for {', '.join(missing)}")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", formulas, priority=100)  # before napoleon indents things of its own
    app.connect("autodoc-skip-member", is_field)
    app.connect("env-check-consistency", require_every_public_name)

"""The documentation site: `make docs`."""

from sphinx.application import Sphinx

from modeling_udon import __version__
from modeling_udon.config_reference import describe_configuration

project = "UDON for Hugging Face"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = project
html_use_index = False
html_show_sourcelink = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
# An output's fields are described once, under "Attributes".
napoleon_use_ivar = True
copybutton_prompt_text = "$ "
exclude_patterns = ["_build"]
# Blocks of terminal output have no language.
suppress_warnings = ["misc.highlighting_failure"]


def add_configuration(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the tables of all keys, made from the code, on the page of the configuration."""
    if page == "reference/configuration":
        source[0] += "\n" + describe_configuration()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_configuration)

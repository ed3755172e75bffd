"""The documentation site: `make docs`."""

from modeling_udon import __version__

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

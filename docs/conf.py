"""The documentation site: `pip install '.[site]' && sphinx-build -W -n docs docs/_build`."""

import sys
from pathlib import Path

from cyclopts.docs.markdown import generate_markdown_docs
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext.napoleon import Config, GoogleDocstring

from unet_fast.cli import app as program

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from links import PROJECT, ROOT, online, relinked  # noqa: E402

TREE = {
    "Tutorial": "overview tutorial",
    "How to": "label volumes look trouble trainer loaders monai nnunet export small_machine "
    "cluster",
    "Explanation": "training prediction evaluation weighted_ce border_weight_map elastic_deform "
    "reliability cuda architecture",
    "Measurements": "results benchmarks",
    "Reference": "commands python metrics changelog contributing",
}
"""The pages by the captions above them."""
INCLUDED = {"README.md": "overview", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
"""Files beside this folder, and the pages that include them."""
BLOCK = "```{{toctree}}\n:hidden:\n:caption: {}\n{}\n```\n"
OPTIONS = generate_markdown_docs(
    program,
    heading_level=2,
    generate_toc=False,
    no_root_title=True,
    exclude_commands=["--install-completion"],
)
for slip, meant in (("predict predict", "predict"), (" -m sphinx", "")):  # of usage lines
    OPTIONS = OPTIONS.replace(slip, meant)
ADDED = {
    "index": "".join(BLOCK.format(name, "\n".join(TREE[name].split())) for name in TREE),
    "commands": OPTIONS,
}
"""What pages have on the site only."""
GOOGLE = Config(napoleon_use_rtype=False)

project, version = PROJECT["name"], PROJECT["version"]
root_doc = "index"
exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub makes them
autodoc_typehints = "none"  # docstrings say shapes, dtypes and ranges
autodoc_member_order = "bysource"
default_role = "literal"
smartquotes = False
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"{project} {version}"
html_copy_source = html_show_copyright = False


def on_site(path):
    """The page, or the file in this folder, that a path leads to; else its address online."""
    page = INCLUDED.get(str(path.relative_to(ROOT)))
    if page is not None:
        return f"/{page}.md"
    return f"/{path.relative_to(HERE).as_posix()}" if path.is_relative_to(HERE) else online(path)


def of_docstring(app, what, name, obj, options, lines):
    """Markup of a docstring; of attributes, it would take words before a colon for a type."""
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, GOOGLE, app, what, name, obj, options).lines()


def of_page(_, page, text):
    """Adds what only the site has, and turns links of the repository into links of the site."""
    text[0] = relinked(text[0] + ADDED.get(page, ""), (HERE / page).parent, on_site)


def of_included(_, file, __, text):
    """Likewise the links of files beside this folder."""
    text[0] = relinked(text[0], (HERE / file).parent, on_site)


def formula(page, node):
    """Writes a formula as MathML, which browsers show by themselves."""
    page.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app):
    """Changes what is read, before it is parsed."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", of_docstring)
    app.connect("source-read", of_page)
    app.connect("include-read", of_included)

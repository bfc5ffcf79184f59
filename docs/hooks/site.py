"""What the documentation takes from elsewhere in the repository, so that everything has one home.

- README.md is the first page; CONTRIBUTING.md, CHANGELOG.md and the notebooks are pages too.
- Links to other files of the repository, such as pictures and results, are followed: the files become part of the site.
- `<!-- figures: PAPER -->` becomes the list of a paper's figures, of `cbp_jax/experiments/figures.py`.
- `<!-- docstring: PATH -->` becomes the docstring of a module, without its first line.
- `<!-- include: PATH -->` becomes a file of the repository, as a block of code.
- `<!-- table: PATH -->` becomes a Markdown file of the repository, with its headings one level lower.
- Equations between dollars become MathML.
"""

import ast
import html
import importlib.util
import logging
import os
import pathlib
import re
import sys
from typing import Any

from docstrings import as_markdown
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import included
from tex import to_mathml

log = logging.getLogger("mkdocs.hooks.site")

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_CODE = re.compile(r"(^ *```.*?^ *```[ \t]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_FIGURES = re.compile(r"<!-- figures: (.+?) -->")
_DOCSTRING = re.compile(r"<!-- docstring: (\S+) -->")
_INCLUDE = re.compile(r"<!-- include: (\S+) -->")
_TABLE = re.compile(r"<!-- table: (\S+) -->")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_MATHJAX = re.compile(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", re.DOTALL)
_MERMAID = re.compile(r'<script type="module">\s*document\.addEventListener.*?mermaid.*?</script>', re.DOTALL)
_CELL = re.compile(r'(<div[^>]*class="[^"]*jp-RenderedMarkdown[^"]*"[^>]*>)(.*?)(</div>)', re.DOTALL)
_DOLLARS = re.compile(r"(<code.*?</code>)|\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


@event_priority(100)  # before notebooks are looked for
def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of the documentation's folder."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        # Not `generated`: the plugin for notebooks asks for the folder of the source.
        name = notebook.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Insert content from elsewhere, and resolve links to it."""
    source = pathlib.Path(page.file.abs_src_path)
    if source.suffix != ".md":
        return markdown
    markdown = _FIGURES.sub(lambda match: _figures(match[1]), markdown)
    markdown = _DOCSTRING.sub(lambda match: _docstring(match[1]), markdown)
    markdown = _INCLUDE.sub(lambda match: _included(match[1]), markdown)
    markdown = _TABLE.sub(lambda match: included(ROOT / match[1]), markdown)

    def follow(match: re.Match[str]) -> str:
        return match[1] + _target(match[2], source, page, config, files) + match[3]

    parts = _CODE.split(markdown)  # code at odd places
    return "".join(part if number % 2 else _LINK.sub(follow, part) for number, part in enumerate(parts))


def on_page_content(html_text: str, page: Page, config: Any, files: Files) -> str:
    """Draw equations."""
    if page.file.src_uri.endswith(".ipynb"):
        html_text = _MERMAID.sub("", _MATHJAX.sub("", html_text))
        return _CELL.sub(lambda match: match[1] + _DOLLARS.sub(_in_notebook(page), match[2]) + match[3], html_text)
    return _EQUATION.sub(lambda match: _mathml(match[2], match[1] == "div", page), html_text)


def _in_notebook(page: Page) -> Any:
    return lambda match: match[1] or _mathml(match[2] or match[3], match[2] is not None, page)


def _mathml(tex: str, display: bool, page: Page) -> str:
    try:
        parts = html.unescape(tex).split(r"\qquad")
        if not display or len(parts) == 1 or any(part.count("{") != part.count("}") or "&" in part for part in parts):
            return to_mathml(html.unescape(tex), display=display)
        # Equations beside each other: those that find no room there go to the next line.
        spans = (f"<span>{to_mathml(part, display=True)}</span>" for part in parts)
        return f'<div class="equations">{" ".join(spans)}</div>'
    except ValueError as error:
        log.warning("%s: %s", page.file.src_uri, error)
        return html.escape(tex)


def _target(link: str, source: pathlib.Path, page: Page, config: Any, files: Files) -> str:
    """Return the target of a page's link in the site."""
    path, _, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    there = (source.parent / path).resolve()
    if not there.is_relative_to(ROOT) or not there.is_file():
        return link  # mkdocs tells that it leads nowhere
    name = there.relative_to(ROOT).as_posix()
    if name in PAGES:
        name = PAGES[name]
    elif there.is_relative_to(DOCS):
        name = there.relative_to(DOCS).as_posix()
    elif not name.startswith("notebooks/"):
        if name.endswith(".md"):
            log.warning("%s: %s is no page of the site", page.file.src_uri, name)
        name = f"files/{name}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(there)))
    found = os.path.relpath(name, pathlib.PurePosixPath(page.file.src_uri).parent)
    return f"{found}#{anchor}" if anchor else found


def _figures(paper: str) -> str:
    """Return the list of a paper's figures, a section each."""
    # By its path: the package itself needs jax.
    spec = importlib.util.spec_from_file_location("figures", ROOT / "cbp_jax" / "experiments" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    found = [figure for figure in module.FIGURES if figure.paper == paper]
    if not found:
        log.warning("no figures are of the paper %r", paper)
    return "\n\n".join(
        f"### {figure.name}\n\nShows: {figure.about}.\n\n```sh\ncbp-jax run {figure.command}\n```\n\n"
        f"Cost in the paper's size: {figure.cost}.\n\nRun here: {figure.here or 'no'}."
        for figure in found
    )


def _included(path: str) -> str:
    language = {".py": "python", ".txt": "text"}[pathlib.Path(path).suffix]
    return f"```{language}\n{(ROOT / path).read_text().rstrip()}\n```"


def _docstring(path: str) -> str:
    text = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    return as_markdown(text.partition("\n\n")[2])

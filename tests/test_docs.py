"""The documentation: links have targets, code runs and prints the shown output, and equations can be converted."""

import ast
import html.parser
import importlib.util
import pathlib
import re
import subprocess
import sys
import types
import urllib.parse

import jax
import jax.numpy as jnp
import optax
import pytest

from cbp_jax.report.drawing import COLUMN

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
# Pages whose code takes seconds to compile.
SLOW = {"docs/algorithms/lottery_tickets.md", "docs/algorithms/upgd.md", "docs/units.md"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```(?:text)?\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
IMAGE = re.compile(r"!\[([^]]*)\]\(([^()\s]+)\)")
MODULE = ROOT / "docs" / "hooks"


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """Return a page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", path.read_text()))


def anchors(path):
    """Return the anchors of a page's headings, as on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links(path):
    for link in LINK.findall(prose(path)):
        if re.match(r"https?:|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.is_file(), f"{link} leads nowhere"
        assert there.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(there), f"{link}: there is no such heading"


def test_links_are_seen():
    assert len(LINK.findall(prose(ROOT / "README.md"))) > 20
    assert "source-and-differences-from-the-public-code" in anchors(ROOT / "docs/algorithms/upgd.md")


@pytest.mark.parametrize("path", [path for path in PAGES if IMAGE.search(prose(path))], ids=name_of)
def test_pictures_say_what_they_show(path):
    for text, _ in IMAGE.findall(prose(path)):
        assert len(text.split()) > 4, f"{text!r} tells nothing to who cannot see the picture"


def test_pictures_are_shown_or_linked_and_fit_a_column():
    shown = {(path.parent / link).resolve() for path in PAGES for link in LINK.findall(prose(path))}
    for path in (ROOT / "benchmarks" / "results").glob("*.png"):
        assert path in shown, f"{path.name} is on no page"
        width = int.from_bytes(path.read_bytes()[16:20], "big")  # of the header
        assert width == round(300 * COLUMN), f"{path.name}: draw it again by cbp-jax plot"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.(?:md|ipynb)", text.partition("\nnav:")[2]))
    notebooks = {name_of(path) for path in (ROOT / "notebooks").glob("*.ipynb")}
    made = {"index.md", "contributing.md", "changelog.md"}
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in DOCS} | notebooks | made


def check_upgd(namespace):
    assert set(namespace["both"].init(namespace["params"]).inner_state[0].utility) == set(namespace["params"])


def check_quickstart(namespace):
    assert int(namespace["state"][1].count) == 100


def check_lottery_tickets(namespace):
    kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
    params = namespace["params"]
    assert [int(leaf.sum()) for leaf in kernels(namespace["mask"])] == [1280 - 256, 4096 - 819, 640 - 64]
    updates, _ = namespace["tx"].update(params, namespace["tx"].init(params), params)
    after = optax.apply_updates(params, updates)
    assert [int((leaf != 0).sum()) for leaf in kernels(after)] == [1024, 3277, 576]
    ticket = namespace["ticket"]
    assert ticket.number == 5
    for rewound, first, living, control in zip(
        *map(kernels, (ticket.params, namespace["first"], ticket.mask, namespace["control"])), strict=True
    ):
        assert (rewound == first * living).all() and ((control != 0) == living).all()
    assert [leaf.shape for leaf in kernels(namespace["small"])] == [(20, 32), (32, 32), (32, 10)]


def check_consolidation(namespace):
    # The weights are at their mean, so nothing pulls on them, and the update is that of SGD.
    assert jnp.allclose(namespace["updates"], -0.01)


def check_extending(namespace):
    net = namespace["net"]
    assert (net.depth, net.width, net.num_outputs) == (2, 32, 10)


CHECKS = {
    "docs/algorithms/upgd.md": check_upgd,
    "docs/algorithms/lottery_tickets.md": check_lottery_tickets,
    "docs/algorithms/consolidation.md": check_consolidation,
    "docs/extending.md": check_extending,
    "docs/quickstart.md": check_quickstart,
}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if name_of(path) in SLOW else [])
        for path in DOCS
        if BLOCK.search(path.read_text())
    ],
)
def test_code(path, tmp_path, monkeypatch, capsys):
    """The blocks of a page run one after the other, and print the text shown below them."""
    monkeypatch.chdir(tmp_path)
    text, namespace = path.read_text(), {}
    for match in BLOCK.finditer(text):
        code, printed = match.groups()
        lines = "\n" * text[: match.start(1)].count("\n")  # so that errors show line numbers of the page
        exec(compile(lines + code, str(path), "exec"), namespace)
        found = capsys.readouterr().out
        assert printed is None or found == printed
    CHECKS.get(name_of(path), lambda namespace: None)(namespace)


def test_commands_of_the_quickstart_are_those_of_the_readme():
    commands = lambda path: [line for line in path.read_text().splitlines() if line.startswith("python3 -m venv ")]
    assert commands(ROOT / "docs/quickstart.md") == commands(ROOT / "README.md")


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") < 150


@pytest.fixture
def tex(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(MODULE), *sys.path])
    monkeypatch.delitem(sys.modules, "tex", raising=False)
    import tex

    yield tex
    del sys.modules["tex"]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(MODULE), *sys.path])
    monkeypatch.delitem(sys.modules, "tables", raising=False)
    import tables

    yield tables
    del sys.modules["tables"]


def test_an_included_table_is_below_the_headings_of_its_page(tables, tmp_path):
    (tmp_path / "table.md").write_text(
        "# Suite small\n\nA note.\n\n## All problems\n\n| a | b |\n|---|---|\n| 1 | #2 |\n"
    )
    found = tables.included(tmp_path / "table.md")
    assert found == "## Suite small\n\nA note.\n\n### All problems\n\n| a | b |\n|---|---|\n| 1 | #2 |"
    with pytest.raises(FileNotFoundError, match=r"includes the table .*none\.md, but there is no such file"):
        tables.included(tmp_path / "none.md")


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_included_tables_exist(path):
    for name in re.findall(r"<!-- table: (\S+) -->", path.read_text()):
        assert (ROOT / name).is_file()


def test_equations_of_the_pages(tex):
    for path in DOCS:
        text = FENCE.sub("", path.read_text())
        shown = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"(?<![\w$`])\$([^$\n`]+)\$", re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.M | re.S))
        for equation in [*shown, *inline]:
            tex.to_mathml(equation)  # raises for unknown commands


def docstrings(path):
    """Return the docstrings of a module, its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))
    return [text for text in found if text]


def test_equations_of_the_docstrings(tex, monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Object=object))  # of [docs]
    monkeypatch.delitem(sys.modules, "docstrings", raising=False)
    from docstrings import as_markdown

    seen = 0
    for path in (ROOT / "cbp_jax").rglob("*.py"):
        for text in docstrings(path):
            if "math::" in text or ":math:" in text:
                equations = re.findall(r"\$\$\n(.*?)\n *\$\$|\$([^$]+)\$", as_markdown(text), re.DOTALL)
                seen += len(equations)
                for shown, inline in equations:
                    tex.to_mathml(shown or inline)
    sys.modules.pop("docstrings")
    assert seen > 200


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        (r"\tfrac12 h", '<mfrac displaystyle="false" scriptlevel="0"><mn>1</mn><mn>2</mn></mfrac><mi>h</mi>'),
        (r"b_1^n", "<msubsup><mi>b</mi><mn>1</mn><mi>n</mi></msubsup>"),
        (r"h' < \Big(2.5\Big)", "<msup><mi>h</mi><mo>′</mo></msup><mo>&lt;</mo><mo>(</mo><mn>2.5</mn><mo>)</mo>"),
        (r"\text{for all } k", "<mtext>for all </mtext><mi>k</mi>"),
        (r"\ddot x", '<mover accent="true"><mi>x</mi><mo stretchy="false">¨</mo></mover>'),
    ],
)
def test_an_equation(tex, equation, expected):
    assert f"<mrow>{expected}</mrow><annotation" in tex.to_mathml(equation)


@pytest.mark.parametrize("equation", [r"\nonsense", "{a", r"\frac1", "a # b"])
def test_an_equation_that_is_not_understood(tex, equation):
    with pytest.raises(ValueError, match=r"equation"):
        tex.to_mathml(equation)


def test_figures_need_no_jax():
    """The pages of the papers are built where jax may not be installed."""
    path = ROOT / "cbp_jax" / "experiments" / "figures.py"
    imported = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert imported == ["dataclasses"]


def test_every_paper_has_its_page():
    from cbp_jax.experiments import figures

    texts = {path: path.read_text() for path in DOCS}  # the page of the open questions is docs/findings.md
    for paper in {figure.paper for figure in figures.FIGURES}:
        pages = [path for path, text in texts.items() if f"<!-- figures: {paper} -->" in text]
        assert len(pages) == 1, paper


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs [docs]")
def test_site_builds_offline(tmp_path):
    """Warnings are errors, and no page loads anything from another site."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    check_site(tmp_path)


def check_site(folder):
    """Assert that every link leads to an existing file and anchor, and that nothing is loaded from another site."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    assert len(pages) > 40
    fetched = [(path, url) for path, page in pages.items() for url in page.sources if re.match(r"(https?:)?//", url)]
    assert not fetched
    for path, page in pages.items():
        text = path.read_text()
        assert "arithmatex" not in text and "MathJax" not in text, path
        if path.parts[-3] == "api":
            assert not re.search(r":math:|:func:|\.\. math::", text), path
        for url in {*page.links, *page.sources}:
            if re.match(r"[a-z]+:|$", url) or path.name == "404.html":
                continue
            target, _, anchor = urllib.parse.unquote(url).partition("#")
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path}: {url} leads nowhere"
            if anchor and there in pages:
                assert anchor in pages[there].anchors, f"{path}: {url}: there is no such anchor"


class Page(html.parser.HTMLParser):
    """Collects the links of a page, the files that it loads, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.sources, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in ("script", "img", "source", "iframe") and "src" in values:
            self.sources.append(values["src"])
        elif tag == "link" and {"stylesheet", "icon", "preconnect"} & set(values.get("rel", "").split()):
            self.sources.append(values.get("href", ""))
        elif tag == "a":
            self.links.append(values.get("href", ""))

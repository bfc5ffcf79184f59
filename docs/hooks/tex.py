"""Equations as MathML, which browsers draw by themselves: no script and no font has to be fetched.

The part of LaTeX that the documentation uses, and nothing else: what is not known raises a `ValueError`.

>>> to_mathml("a_1")
'<math><semantics><mrow><msub><mi>a</mi><mn>1</mn></msub></mrow>\
<annotation encoding="application/x-tex">a_1</annotation></semantics></math>'
"""

import html
import re

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\S|\s+", re.DOTALL)

_NAMES = """alpha beta gamma delta epsilon varepsilon eta theta kappa lambda mu xi pi rho sigma tau phi Delta Sigma
Omega partial nabla infty ell top"""
_LETTERS = dict(zip(_NAMES.split(), "αβγδϵεηθκλμξπρστϕΔΣΩ∂∇∞ℓ⊤", strict=True))
_SIGNS = r"""leftarrow to cdot cdots dots ldots times pm circ odot sim approx le ge ne in mid sum prod lVert rVert
lvert rvert lfloor rfloor langle rangle int { } |"""
_OPERATORS = dict(zip(_SIGNS.split(), "←→⋅⋯……×±∘⊙∼≈≤≥≠∈∣∑∏‖‖||⌊⌋⟨⟩∫{}‖", strict=True))
_FUNCTIONS = {"log", "exp", "max", "min", "sin", "cos", "sinh", "tanh", "arg"}
_LIMITS = {"sum", "prod", "max", "min"}
_SPACES = {",": 0.17, ";": 0.28, ":": 0.22, "!": -0.17, " ": 0.3, "quad": 1, "qquad": 2}
_ACCENTS = {"hat": "^", "bar": "¯", "tilde": "~", "overline": "¯", "dot": "˙", "ddot": "¨"}
_TEXTS = {"mathrm": "mi", "text": "mtext", "operatorname": "mi"}
_ALPHABETS = {"mathcal": {"N": "𝒩", "L": "ℒ"}, "mathbb": {"R": "ℝ", "E": "𝔼"}}
_SIZES = {"left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr"}


def to_mathml(tex: str, *, display: bool = False) -> str:
    """Return an equation as an element of HTML.

    Args:
      tex: LaTeX, as between dollars.
      display: whether it stands on lines of its own.

    Returns:
      a `<math>` element, which carries its source.

    Raises:
      ValueError: a command is unknown, or a brace is not closed.
    """
    parser = _Parser(tex, display)
    body = parser.table()
    kind = ' display="block"' if display else ""
    source = f'<annotation encoding="application/x-tex">{html.escape(tex.strip(), quote=False)}</annotation>'
    return f"<math{kind}><semantics><mrow>{body}</mrow>{source}</semantics></math>"


class _Parser:
    def __init__(self, tex: str, display: bool):
        self.tex, self.display = tex, display
        self.tokens = _TOKEN.findall(tex)
        self.place = 0

    def peek(self) -> str | None:
        """Return the next token that is not a space."""
        while self.place < len(self.tokens) and self.tokens[self.place].isspace():
            self.place += 1
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise ValueError(f"the equation ends too early: {self.tex}")
        self.place += 1
        return token

    def table(self) -> str:
        """Return the whole equation: lines that are set below each other, or the only one."""
        lines, end = [[]], ""
        while end is not None:
            cell, end = self.row(None, "&", "\\\\")
            lines[-1].append(cell)
            if end == "\\\\":
                lines.append([])
        if lines == [[cell]]:
            return cell
        rows = ("".join(f"<mtd>{cell}</mtd>" for cell in line) for line in lines)
        return f'<mtable columnalign="right left">{"".join(f"<mtr>{row}</mtr>" for row in rows)}</mtable>'

    def row(self, *ends: str | None) -> tuple[str, str | None]:
        """Return everything up to a token, with sub- and superscripts, and that token."""
        parts = []
        while self.peek() not in ends:
            parts.append(self.scripted())
        end = self.peek()
        if end is not None:
            self.take()
        return "".join(parts), end

    def scripted(self) -> str:
        limits = self.display and (self.peek() or "").lstrip("\\") in _LIMITS
        base, below, above = self.atom(), None, None
        while self.peek() in ("_", "^", "'"):
            sign = self.take()
            if sign == "_":
                below = self.argument()
            else:
                mark = "<mo>′</mo>" if sign == "'" else self.argument()
                above = mark if above is None else f"<mrow>{above}{mark}</mrow>"
        under, over, both = ("munder", "mover", "munderover") if limits else ("msub", "msup", "msubsup")
        if below is not None and above is not None:
            return f"<{both}>{base}{below}{above}</{both}>"
        if below is not None:
            return f"<{under}>{base}{below}</{under}>"
        return base if above is None else f"<{over}>{base}{above}</{over}>"

    def atom(self) -> str:
        token = self.take()
        if token == "{":
            return f"<mrow>{self.row('}')[0]}</mrow>"
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        if token in "+-=<>()[]|,.;:/*!":
            return f"<mo>{html.escape(token.replace('-', '−'))}</mo>"
        raise ValueError(f"{token!r} is not understood in the equation {self.tex}")

    def argument(self) -> str:
        """Return the argument of a command or a script: of a number without braces, its first digit."""
        token = self.peek() or ""
        if len(token) > 1 and token[0].isdigit():
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self.atom()

    def command(self, name: str) -> str:
        if name in _LETTERS:
            return f"<mi>{_LETTERS[name]}</mi>"
        if name in _OPERATORS:
            return f"<mo>{_OPERATORS[name]}</mo>"
        if name in _FUNCTIONS:
            return f"<mi>{name}</mi>"
        if name in _SPACES:
            return f'<mspace width="{_SPACES[name]}em"/>'
        if name in ("frac", "tfrac", "dfrac"):
            style = ' displaystyle="false" scriptlevel="0"' if name == "tfrac" else ""
            over, under = self.argument(), self.argument()
            return f"<mfrac{style}>{over}{under}</mfrac>"
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name in _ACCENTS:
            stretchy = "true" if name == "overline" else "false"
            return f'<mover accent="true">{self.argument()}<mo stretchy="{stretchy}">{_ACCENTS[name]}</mo></mover>'
        if name in _TEXTS:
            tag = _TEXTS[name]
            normal = ' mathvariant="normal"' if tag == "mi" else ""
            return f"<{tag}{normal}>{html.escape(self.text())}</{tag}>"
        if name in _ALPHABETS:
            letter = self.text()
            if letter not in _ALPHABETS[name]:
                raise ValueError(f"\\{name}{{{letter}}} is not known in the equation {self.tex}")
            return f"<mi>{_ALPHABETS[name][letter]}</mi>"
        if name in _SIZES:
            return self.delimiter()
        raise ValueError(f"\\{name} is not known in the equation {self.tex}")

    def delimiter(self) -> str:
        """Return the bracket after a size command, or none if it is a dot."""
        if self.peek() == ".":
            self.take()
            return ""
        return self.atom()

    def text(self) -> str:
        """Return the text between braces unchanged, including spaces."""
        if self.take() != "{" or "}" not in self.tokens[self.place :]:
            raise ValueError(f"text without braces in the equation {self.tex}")
        end = self.tokens.index("}", self.place)
        words, self.place = self.tokens[self.place : end], end + 1
        return "".join(words)

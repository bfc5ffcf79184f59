"""Tables that commands wrote as Markdown files, as parts of pages."""

import pathlib
import re


def included(path: pathlib.Path) -> str:
    """Return a file with its headings one level lower, because the page has a title already.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a page includes the table {path}, but there is no such file")
    return re.sub(r"^#", "##", path.read_text().strip(), flags=re.MULTILINE)

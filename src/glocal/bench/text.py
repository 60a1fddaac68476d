"""Passages of real text: a file of the user's, or the documentation inside Python's own standard library."""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

__all__ = ["documentation", "from_file", "from_library"]

_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo",
         "encodings", "pydoc_data", "ensurepip", "lib-dynload"}  # fmt: skip


def from_file(path: str | Path) -> list[str]:
    """Passages of a UTF-8 text file, split at blank lines, without repeats.

    Raises:
        ValueError: it cannot be read, is no UTF-8 text, or has fewer than two passages.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"input {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"input {str(path)!r} is not UTF-8 text") from None
    found = list(dict.fromkeys(p for p in (" ".join(part.split()) for part in re.split(r"\n\s*\n", text)) if p))
    if len(found) < 2:
        raise ValueError(
            f"input {str(path)!r} needs two or more passages with a blank line between; it has {len(found)}"
        )
    return found


def from_library(count: int, characters: int = 4000, folder: str | Path | None = None) -> list[str]:
    """The first ``count`` passages of docstrings and comments of Python's standard library.

    Always the same for one Python: modules in alphabetical order, each giving the first ``characters`` of its
    documentation as a passage; when all have given one, each its next. Paragraphs seen before are left out.

    Args:
        count: passages wanted; there may be fewer.
        characters: length of a passage; shorter rests are dropped.
        folder: where the modules are; the standard library if None.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    first: list[str] = []
    later: list[list[str]] = []
    seen: set[str] = set()
    for path in modules(root):
        fresh = []
        for paragraph in documentation(path.read_text(encoding="utf-8", errors="replace")):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        text = " ".join(fresh)
        pieces = [text[at : at + characters] for at in range(0, len(text) - characters + 1, characters)]
        first += pieces[:1]
        later.append(pieces[1:])
        if len(first) == count:
            return first
    for nth in range(max(map(len, later), default=0)):
        first += [pieces[nth] for pieces in later if nth < len(pieces)]
    return first[:count]


def documentation(source: str) -> list[str]:
    """Docstrings and comment blocks of Python source, in order, each on one line; none if it does not parse.

    >>> documentation('"Doc."\\n# A\\n# comment.\\nx = 1')
    ['Doc.', 'A comment.']
    """
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            found += [(node.body[0].lineno, text)] if text else []
    last = -1
    for token in tokens:
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#!:").strip()
            if line == last + 1:
                found[-1] = (found[-1][0], found[-1][1] + " " + text)
            else:
                found.append((line, text))
            last = line
    found.sort(key=lambda item: item[0])
    joined = (" ".join(text.split()) for _, text in found)
    return [text for text in joined if any(c.isalpha() for c in text)]


def modules(root: Path) -> Iterator[Path]:
    """Public modules below a folder, in alphabetical order."""
    for path in sorted(root.iterdir(), key=lambda p: p.name):
        if path.name in _SKIP or (path.name.startswith(("_", "config-")) and path.name != "__init__.py"):
            continue
        if path.is_dir():
            yield from modules(path)
        elif path.suffix == ".py":
            yield path

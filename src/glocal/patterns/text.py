"""Reading a pattern back from its text. A small grammar, no evaluation of code::

expression := term ("|" term)*          term := factor ("&" factor)*
factor     := "~" factor | "(" expression ")" | name "(" arguments ")"
argument   := [name "="] (integer | true | false | tuple | list | "$" integer | expression)
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from glocal.patterns.base import Complement, Intersection, Pattern, Union
from glocal.patterns.data import Between, Choose, Keys, PerHead, Selected
from glocal.patterns.order import Causal, Full, Prefix, Segments, Sinks, Tokens
from glocal.patterns.windows import Block, Sliding, Strided, Window

NAMES: dict[str, Callable[..., Pattern]] = {
    "full": Full,
    "causal": Causal,
    "window": Window,
    "sliding": Sliding,
    "block": Block,
    "strided": Strided,
    "prefix": Prefix,
    "sinks": Sinks,
    "tokens": Tokens,
    "segments": Segments,
    "keys": Keys,
    "between": Between,
    "selected": Selected,
    "per_head": PerHead,
    "choose": Choose,
}

MAX_LENGTH = 1 << 20
MAX_DEPTH = 64

_TOKEN = re.compile(
    r"\s*(?:(?P<int>-?[0-9]{1,18})|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|\$(?P<data>[0-9]{1,4})|(?P<sign>[()\[\],=|&~]))"
)


def parse(text: str, data: Sequence[Tensor] = ()) -> Pattern:
    """The pattern that ``text`` describes; never evaluates code.

    Args:
        text: such as ``"sliding(255, 0) | prefix(4)"``. Names are in lower or upper case.
        data: tensors for ``$0``, ``$1``, ... in the text.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: the text is not a pattern; the message shows where.

    >>> from glocal import parse
    >>> parse("window((7, 7), dilation=2) & ~block(4)")
    window((7, 7), dilation=2) & ~block(4)
    """
    if not isinstance(text, str):
        raise TypeError(f"text of parse must be a string; it was {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"text of parse has {len(text)} characters; at most {MAX_LENGTH} are read")
    return _Reader(text, data).whole()


class _Reader:
    def __init__(self, text: str, data: Sequence[Tensor]) -> None:
        self.text, self.data, self.depth, self.place = text, data, 0, 0
        self.tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if not found or found.end() == at:
                raise self.error(f"unexpected {text[at:].lstrip()[:1]!r}", at)
            kind = found.lastgroup or ""
            self.tokens.append((kind, found[kind], found.start(kind)))
            at = found.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, what: str, at: int | None = None) -> ValueError:
        at = self.tokens[self.place][2] if at is None else at
        start = max(0, at - 30)
        shown = self.text[start : at + 30]
        return ValueError(f"text is not a pattern: {what} (character {at}):\n  {shown}\n  {' ' * (at - start)}^")

    def peek(self, sign: str) -> bool:
        kind, value, _ = self.tokens[self.place]
        return kind == "sign" and value == sign

    def take(self, sign: str) -> bool:
        if self.peek(sign):
            self.place += 1
            return True
        return False

    def need(self, sign: str, other: str = "") -> None:
        if not self.take(sign):
            raise self.error(f"expected {sign!r}" + (f" or {other!r}" if other else ""))

    def whole(self) -> Pattern:
        pattern = self.expression()
        if self.tokens[self.place][0] != "end":
            raise self.error("expected '|', '&' or the end")
        return pattern

    def expression(self) -> Pattern:
        terms = [self.term()]
        while self.take("|"):
            terms.append(self.term())
        return Union(*terms) if len(terms) > 1 else terms[0]

    def term(self) -> Pattern:
        factors = [self.factor()]
        while self.take("&"):
            factors.append(self.factor())
        return Intersection(*factors) if len(factors) > 1 else factors[0]

    def factor(self) -> Pattern:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        try:
            if self.take("~"):
                return Complement(self.factor())
            if self.take("("):
                inner = self.expression()
                self.need(")")
                return inner
            return self.call()
        finally:
            self.depth -= 1

    def call(self) -> Pattern:
        kind, name, at = self.tokens[self.place]
        if kind != "name":
            raise self.error("expected the name of a pattern")
        self.place += 1
        make = NAMES.get(name.lower())
        if make is None:
            near = difflib.get_close_matches(name.lower(), NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the patterns are {', '.join(NAMES)}"
            hint = "a predicate has no text" if name.lower() == "where" else hint
            raise self.error(f"no pattern is called {name!r}; {hint}", at)
        self.need("(")
        args: list[Any] = []
        options: dict[str, Any] = {}
        while not self.take(")"):
            kind, word, _ = self.tokens[self.place]
            if kind == "name" and self.tokens[self.place + 1][1] == "=":
                if word in options:
                    raise self.error(f"{word} of {name} is given twice")
                self.place += 2
                options[word] = self.argument()
            else:
                args.append(self.argument())
            if not self.peek(")"):
                self.need(",", ")")
        parameters = inspect.signature(make)
        try:
            parameters.bind(*args, **options)
        except TypeError as error:
            takes = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters.parameters.values())
            raise self.error(f"{name} takes ({takes}): {error}", at) from None
        try:
            return make(*args, **options)
        except (TypeError, ValueError) as error:
            raise self.error(f"{name}: {error}", at) from None

    def argument(self) -> Any:
        kind, value, _ = self.tokens[self.place]
        if kind == "int":
            self.place += 1
            return int(value)
        if kind == "name" and value.lower() in ("true", "false"):
            self.place += 1
            return value.lower() == "true"
        if kind == "data":
            if int(value) >= len(self.data):
                raise self.error(f"there is no tensor ${value}; {len(self.data)} were given")
            self.place += 1
            return self.data[int(value)]
        if self.take("["):
            return self.items("]")
        if self.peek("(") and self._is_tuple():
            self.place += 1
            return tuple(self.items(")"))
        return self.expression()

    def _is_tuple(self) -> bool:
        """A parenthesis that opens on a number or a truth value is a tuple; on anything else, an expression."""
        kind, value, _ = self.tokens[self.place + 1]
        return kind == "int" or (kind == "name" and value.lower() in ("true", "false"))

    def items(self, close: str) -> list[Any]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        found = []
        while not self.take(close):
            found.append(self.argument())
            if not self.peek(close):
                self.need(",", close)
        self.depth -= 1
        return found

"""A TOML file in which every value knows its line, read key by key with all problems gathered.

tomllib checks the syntax but forgets where things stood; a small scanner over the same text finds
the line of each key and array element.  A Table hands its keys out one by one; what nobody asked
for is an unknown key.  A wrong value is noted and replaced by a stand-in, so that one reading
finds everything that is wrong; Document.raise_problems() sees to it that no stand-in gets out.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vhostfc.errors import ConfigError

T = TypeVar("T")
Where = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""(?P<string>\"\"\"(?:[^\\]|\\.)*?\"\"\"(?!")|\'\'\'.*?\'\'\'(?!\')|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
    r"""|(?P<comment>\#[^\n]*)|(?P<blank>[ \t\r]+)|(?P<newline>\n)"""
    r"""|(?P<mark>[\[\]{},=.])|(?P<bare>[^\s\[\]{},=.\#"']+)""",
    re.DOTALL,
)


class _Scanner:
    """Walks a text that tomllib has accepted and notes the line of every table, key and array element."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Where, int] = {}
        self._tokens: list[tuple[str, str, int]] = []
        self._at = 0
        self._counts: dict[Where, int] = {}  # how many times an array of tables has been opened
        line = 1
        for match in _TOKEN.finditer(text):
            kind = str(match.lastgroup)
            if kind not in ("comment", "blank"):
                self._tokens.append((kind, match[0], line))
            line += match[0].count("\n")
        self._tokens.append(("end", "", line))
        self._document()

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str, int]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _skip_newlines(self) -> None:
        while self._peek()[0] == "newline":
            self._at += 1

    def _document(self) -> None:
        table: Where = ()
        while True:
            self._skip_newlines()
            kind, text, line = self._peek()
            if kind == "end":
                return
            if text == "[":
                self._next()
                array = self._peek()[1] == "["
                self._at += array
                table = self._header(self._key(), array, line)
                self._at += 1 + array
            else:
                self._pair(table)

    def _header(self, keys: list[str], array: bool, line: int) -> Where:
        """The path of a table header: an array of tables met on the way means its latest member."""
        where: Where = ()
        for depth, key in enumerate(keys, 1):
            where += (key,)
            self.lines.setdefault(where, line)
            if array and depth == len(keys):
                self._counts[where] = self._counts.get(where, 0) + 1
            if where in self._counts:
                where += (self._counts[where] - 1,)
                self.lines.setdefault(where, line)
        return where

    def _key(self) -> list[str]:
        keys = []
        while True:
            kind, text, _ = self._next()
            keys.append(str(tomllib.loads(f"key = {text}")["key"]) if kind == "string" else text)
            if self._peek()[1] != ".":
                return keys
            self._next()

    def _pair(self, table: Where) -> None:
        line = self._peek()[2]
        where = table
        for key in self._key():
            where += (key,)
            self.lines.setdefault(where, line)
        self._next()  # the equals sign
        self._value(where)

    def _value(self, where: Where) -> None:
        match self._peek()[1]:
            case "[":
                self._next()
                index = 0
                while True:
                    self._skip_newlines()
                    _, text, line = self._peek()
                    if text == "]":
                        break
                    if text == ",":
                        self._next()
                        continue
                    self.lines[*where, index] = line
                    self._value((*where, index))
                    index += 1
                self._next()
            case "{":
                self._next()
                while self._peek()[1] != "}":
                    if self._peek()[1] == "," or self._peek()[0] == "newline":
                        self._next()
                        continue
                    self._pair(where)
                self._next()
            case _:  # a scalar, which may be several tokens: 1.5, a date with its time
                while self._peek()[0] not in ("newline", "end") and self._peek()[1] not in (",", "]", "}"):
                    self._next()


class Document:
    """A file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """Read it.  Raises ConfigError when it cannot be read or is not TOML."""
        self.path = path
        self.problems: list[tuple[int, str]] = []
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
            self.values = tomllib.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8, as TOML must be") from None
        except tomllib.TOMLDecodeError as error:
            found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
            what, line, column = found.groups() if found else (str(error), None, None)
            place = line or str(text.count("\n") + 1)
            raise ConfigError(f"{path}:{place}: not TOML: {what}" + (f" (column {column})" if column else "")) from None
        self._lines = _Scanner(text).lines

    @classmethod
    def told(cls, name: str, values: dict[str, object]) -> Document:
        """What somebody said instead of writing it into a file, by the same rules; name: where they said it."""
        document = cls.__new__(cls)
        document.path, document.problems, document.values, document._lines = Path(name), [], values, {}
        return document

    def copy(self) -> Document:
        """The same once more, without its problems; the values may be changed."""
        document = Document.told(str(self.path), copy.deepcopy(self.values))
        document._lines = self._lines
        return document

    def line(self, where: Where) -> int:
        """The line of a key, or of the nearest thing around it."""
        while where and where not in self._lines:
            where = where[:-1]
        return self._lines.get(where, 1)

    def problem(self, where: Where, what: str) -> None:
        key = ".".join(part for part in where if isinstance(part, str))
        line = self.line(where)
        place = f"{self.path}:{line}" if self._lines else self.path
        self.problems.append((line, f"{place}: {key + ': ' if key else ''}{what}"))

    def raise_problems(self) -> None:
        """Raises ConfigError with every problem, in the order of the lines."""
        if self.problems:
            raise ConfigError(*(text for _, text in sorted(self.problems, key=lambda problem: problem[0])))

    @property
    def root(self) -> Table:
        return Table(self, self.values, ())


class Table:
    """One table; whoever has taken all that is allowed calls finish()."""

    def __init__(self, document: Document, values: dict[str, object], where: Where) -> None:
        self.document = document
        self.where = where
        self._values = values
        self._known: list[str] = []

    @property
    def line(self) -> int:
        return self.document.line(self.where)

    def has(self, key: str) -> bool:
        return key in self._values

    def problem(self, key: str, what: str) -> None:
        self.document.problem((*self.where, key), what)

    def get(self, key: str, convert: Callable[[object], T], default: T) -> T:
        """The value of a key that may be absent; convert raises ValueError with what is wrong."""
        self._known.append(key)
        if key not in self._values:
            return default
        try:
            return convert(self._values[key])
        except ValueError as error:
            self.problem(key, str(error))
            return default

    def need(self, key: str, convert: Callable[[object], T], stand_in: T, example: str) -> T:
        """The value of a key that must be there."""
        if key not in self._values:
            self.problem(key, f"is missing; write {example}")
        return self.get(key, convert, stand_in)

    def each(self, key: str, convert: Callable[[object], T]) -> list[T] | None:
        """The members of an array; None when the key is absent."""
        self._known.append(key)
        values = self._values.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            self.problem(key, f"is {spelled(values)}; expected an array: [...]")
            return []
        members = []
        for index, value in enumerate(values):
            try:
                members.append(convert(value))
            except ValueError as error:
                self.document.problem((*self.where, key, index), str(error))
        return members

    def each_or_one(self, key: str, convert: Callable[[object], T]) -> list[T]:
        """The members of an array, or the one value that stands there without brackets; none when it is absent."""
        if isinstance(self._values.get(key), list):
            return self.each(key, convert) or []
        value = self.get(key, convert, None)
        return [] if value is None else [value]

    def table(self, key: str) -> Table:
        """The table [key]; an empty one when it is absent."""
        self._known.append(key)
        values = self._values.get(key, {})
        if not isinstance(values, dict):
            self.problem(key, f"is {spelled(values)}; expected a table: {self._header(key)}")
            values = {}
        return Table(self.document, values, (*self.where, key))

    def tables(self, key: str) -> Iterator[Table]:
        """The tables [[key]], none when there are none."""
        self._known.append(key)
        values = self._values.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.problem(key, f"expected an array of tables: [{self._header(key)}]")
            return
        for index, value in enumerate(values):
            yield Table(self.document, value, (*self.where, key, index))

    def _header(self, key: str) -> str:
        return f"[{'.'.join(str(part) for part in (*self.where, key) if isinstance(part, str))}]"

    def finish(self) -> None:
        """Report every key that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, 1)
                hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(sorted(self._known))}"
                self.problem(key, f"unknown key; {hint}")


def spelled(value: object) -> str:
    """A value as the administrator wrote it, more or less, for a message."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            text = repr(value)
            return text if len(text) <= 80 else text[:77] + "..."

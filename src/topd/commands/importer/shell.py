"""The commands of a shell script, word by word, with its variables filled in; nothing is run.

Known are quotes, continued lines, comments, heredocs, arrays, ``$A``, ``${A:-b}``, ``$((A + 1))``,
``A=1 command``, ``eval`` and ``bash -c``. Of ``if``, ``case`` and ``&&`` the last branch counts
that sets a variable by what the file says, and which variables that concerns is kept. What is not
known stays as it is written.
"""

from __future__ import annotations

import re

from topd.commands.yaml_text import LONGEST
from topd.errors import TOPDError

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_PLAIN = re.compile(r"\$([A-Za-z_]\w*)")
_BRACED = re.compile(r"(\w+)(\[[@*]\])?(?:(:?[-=])(.*))?", re.DOTALL)
_ARRAY = re.compile(r'"\$\{(\w+\[@\])\}"')
_ENDS = " \t\r\n;&|()<>"
_COMMENT = re.compile(r"(?m)^[ \t]*#.*\n?")
_HEREDOC = re.compile(r"(?ms)<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n(.*?)^\s*\2[ \t]*$")
_FIRST = ("export", "local", "declare", "readonly", "then", "else", "do", "{")
_SHELLS = re.compile(r"(.*/)?(ba|z|da)?sh")
_DEEPEST = 9  # evals in evals


def commands_of(script: str) -> list[tuple[list[str], dict[str, str]]]:
    """Every command's words, and the variables in them that a branch sets.

    Raises TOPDError: variables that hold each other grow too long.

    >>> commands_of('X=(--a 1)\\nY=2 run "${X[@]}" --b $Y  # a test')
    [(['run', '--a', '1', '--b', '$Y'], {})]
    >>> commands_of('case $A in\\n a) X=1;;\\n b) X=2;;\\nesac\\nrun $X')[-1]
    (['run', '2'], {'X': '2'})
    """
    shell = _Shell()
    try:
        shell.read(script)
    except RecursionError:
        raise TOPDError("a variable of this script is nested too deep.") from None
    return shell.commands


class _Shell:
    """The variables and commands found so far. A variable is a list; without (), of one."""

    def __init__(self) -> None:
        self.known = {"HOME": ["~"]}
        self.commands: list[tuple[list[str], dict[str, str]]] = []
        self._roots: dict[str, set[str]] = {}  # of a variable: those set in branches that it holds
        self._used: set[str] = set()  # of these, by the words of the command that is read
        self._deep = self._length = self._branch = 0
        self._after = False  # && or ||

    def read(self, text: str) -> None:
        bodies = [found[4] for found in _HEREDOC.finditer(text)]
        text = _COMMENT.sub("", _HEREDOC.sub(r"\3", text))
        at = 0
        self._deep += 1
        while at < len(text):
            self._after = text[:at].endswith(("&&", "||"))
            words, at = self._command(text, at)
            before = dict(self.known), dict(self._roots)
            named = [word for word in words if word not in _FIRST[4:]]
            self._done(words)
            assigned = [*map(bool, map(_ASSIGNED.match, named))]
            if assigned[:1] == [True] and not all(assigned):
                self.known, self._roots = before  # A=1 command: it was for that command
        for body in bodies if self._deep < _DEEPEST else ():
            self.read(body)
        self._deep -= 1

    def _done(self, words: list[str]) -> None:
        """Keep a command, and what it assigns."""
        while words and (words[0] in _FIRST or _ASSIGNED.match(words[0])):
            if found := _ASSIGNED.match(words[0]):
                before = "".join(self.known.get(found[1], [])) if found[2] else ""
                self._assign(found, [before + words[0][found.end() :]])
            words = words[1:]
        used, self._used = self._used, set()
        if not words or words[0] in ("echo", "printf"):
            return
        self._branch += (words[0] in ("if", "case")) - (words[0] in ("fi", "esac"))
        inner = [words[i + 2] for i, word in enumerate(words[:-2])
                 if _SHELLS.fullmatch(word) and re.fullmatch(r"-\w*c", words[i + 1])]  # fmt: skip
        if words[0] == "eval":
            inner = [" ".join(words[1:])]
        if not inner:
            guessed = {name: " ".join(self.known[name]) for name in sorted(used)}
            self.commands.append((words, guessed))
        elif self._deep < _DEEPEST:
            self._used = used
            self.read(inner[0])

    def _assign(self, found: re.Match[str], value: list[str]) -> None:
        name, in_branch = found[1], self._branch or self._after
        before = self.known.get(name, value)
        kept = self._roots.get(name, set()) if found[2] or in_branch else set()
        guessed = {name} if in_branch and before != value else set()
        if guessed and "$" in str(value) and "$" not in str(before):
            value = before  # as of LR=$2, for arguments that the script may get
        self._roots[name] = self._used | kept | guessed
        self.known[name] = value

    def _command(self, text: str, at: int, *, array: bool = False) -> tuple[list[str], int]:
        """The words up to the end of a command, or of an array, and where that is."""
        words: list[str] = []
        aside = False  # the next word is the file of a redirection
        while at < len(text):
            c = text[at]
            if c == "#":
                at = text.find("\n", at) % (len(text) + 1)  # -1: the end
            elif c in " \t\r" or (array and c == "\n"):
                at += 1
            elif c in "<>" or text.startswith("&>", at) or (c == "&" and aside):
                if c in "<>" and text[at - 1].isdigit() and words and words[-1].isdigit():
                    words.pop()  # 2>
                aside, at = True, at + 1
            elif c == "(" and words and (name := _ASSIGNED.fullmatch(words[-1])):
                words.pop()
                found, at = self._command(text, at + 1, array=True)
                self._assign(name, [*(self.known.get(name[1], []) if name[2] else []), *found])
            elif c in _ENDS:
                at += 1
                if not array or c == ")":
                    break
            else:
                whole = all(word in _FIRST or _ASSIGNED.match(word) for word in words)
                found, at = self._word(text, at, whole=whole)
                words += [] if aside else found
                aside = False
        return words, at

    def _word(
        self, text: str, at: int, *, whole: bool = False, ends: str = _ENDS
    ) -> tuple[list[str], int]:
        """One word; several where something without quotes holds spaces, none where it is empty.

        An assignment is ``whole``, spaces or not, and so is what ``ends`` with a double quote.
        """
        words: list[str] = []
        word = None
        while at < len(text) and text[at] not in ends:
            c, after = text[at], text[at + 1 : at + 2]
            quoted, found = ends == '"', [c]
            if c == "\\":
                plain = quoted and after not in '"$`\\\n'
                found, at = [] if after == "\n" else [c * plain + after], at + 2
            elif c == "'" and not quoted and (end := text.find("'", at + 1)) > 0:
                found, at = [text[at + 1 : end]], end + 1
            elif not quoted and (array := _ARRAY.match(text, at)):
                found, at = self._value(array[1], array[0][1:-1]), array.end()
            elif c == '"' and text.find('"', at + 1) > 0:
                found, at = self._word(text, at + 1, ends='"')
                found, at = found or [""], at + 1
            elif c in "$`":
                found, at = self._expanded(text, at)
                value = " ".join(found)
                one = quoted or (whole and _ASSIGNED.match(word or ""))
                found = [value] if one else value.split()
            else:
                at += 1
            for n, piece in enumerate(found):
                words += [word or ""] if n else []
                word = piece if n else (word or "") + piece
        return [*words, word] if word is not None else words, at

    def _expanded(self, text: str, at: int) -> tuple[list[str], int]:
        """What a ``$`` or a backtick stands for, and where it ends."""
        end = _closing(text, at)
        if text.startswith("${", at) and end:
            found = self._value(text[at + 2 : end - 1], text[at:end])
        elif text.startswith("$((", at) and end:
            found = [self._reckoned(text[at + 3 : end - 2]) or text[at:end].replace(" ", "")]
        elif end:
            inner = text[at:end].strip("$()` \n").split()
            found = [f"$({inner[0] if inner else ''})"]  # what it would print is not known
        elif name := _PLAIN.match(text, at):
            end = name.end()
            found = self._value(name[1], name[0])
        else:
            end = at + 2
            found = [text[at:end]]
        self._length += sum(map(len, found))
        if self._length > 10 * LONGEST:
            raise TOPDError("the variables of this script become too long. Is it the right file?")
        return found, end

    def _value(self, inner: str, written: str) -> list[str]:
        """Of a variable with a default or none; what is ``written`` if that is not known."""
        found = _BRACED.fullmatch(inner)
        if found is None:
            return [written]
        name, every, sign, default = found.groups()
        value = self.known.get(name)
        self._used |= self._roots.get(name, set())
        if value is None or ((sign or "").startswith(":") and not any(value)):
            if default is None:
                return [written]
            value = [" ".join(self._command(default, 0, array=True)[0])]
            if "=" in sign:
                self.known[name] = value
        return value if every else value[:1]

    def _reckoned(self, text: str) -> str | None:
        """The value of whole numbers and signs; None: there is something else."""
        filled = re.sub(
            r"\$?\{?([A-Za-z_]\w*)\}?", lambda m: "".join(self._value(m[1], m[0])), text
        )
        if not re.fullmatch(r"[\d\s()+*/%-]{1,200}", filled) or "**" in filled:
            return None
        try:
            return str(int(eval(filled.replace("/", "//"))))  # noqa: S307 - digits and signs
        except (SyntaxError, TypeError, ZeroDivisionError):
            return None


def _closing(text: str, at: int) -> int:
    """After the bracket, or backtick, that closes the one here; 0: none does, or there is none."""
    if text[at] == "`":
        return text.find("`", at + 1) + 1
    opened = text[at + 1 : at + 2]
    closed = {"{": "}", "(": ")"}.get(opened)
    depth = 0
    for end in range(at + 1, len(text) if closed else at):
        depth += (text[end] == opened) - (text[end] == closed)
        if not depth:
            return end + 1
    return 0

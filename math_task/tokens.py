"""The text of an answer becomes tokens. Different spellings of one meaning end here."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

MAX_DEPTH = 20  # brackets within brackets


class Unreadable(ValueError):
    """The text isn't mathematics of the kind that was tried."""


@dataclass(frozen=True)
class Token:
    kind: str  # "number", "letters", "command" or "mark"
    text: str
    upright: bool = False  # it stands in \text{...} or the like: these letters are words
    spaced: bool = False  # a space stands in front of it


def read_spellings():
    """The three tables of latex.txt: characters, commands, and commands without meaning."""
    file = Path(__file__).with_name("latex.txt").read_text("utf-8")
    tables = []
    for block in file.split("\n\n"):
        if not block.startswith("#"):
            tables.append([line.split() for line in block.splitlines()])
    characters, commands, (plain, with_argument) = tables
    return dict(characters), dict(commands), set(plain), set(with_argument)


CHARACTERS, COMMANDS, MEANINGLESS, MEANINGLESS_WITH_ARGUMENT = read_spellings()
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
FULL_WIDTH = range(0xFF01, 0xFF5F)
UPRIGHT = {"\\" + name for name in "text textbf textit textrm textnormal texttt textsf".split()}
UPRIGHT |= {"\\" + name for name in "mathrm mathbf mathit mathsf mathtt mathnormal".split()}
UPRIGHT |= {"\\" + name for name in "mbox emph boldsymbol bm pmb operatorname rm".split()}
OPENING = ("(", "[", "{", "\\{")
CLOSING = (")", "]", "}", "\\}")

# Digits in groups of three, as 1,234,567 or 1{,}234 or 1\,234 or 1 234.
SEPARATOR = r"(?:\{,\}|,\\!\s*|,|\\,|\\!|\\\ |[ ~\u2009\u202f\u00a0])"
GROUPED = rf"[0-9]{{1,3}}(?P<separator>{SEPARATOR})[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*"
GROUPED += rf"(?![0-9/])(?!{SEPARATOR}[0-9])(?:\.[0-9]+)?"
# 0.1(6) is 0.1666...: the digits in parentheses come again and again.
PERIOD = r"\\(?:overline|bar)\s*(?:\{[0-9]+\}|[0-9])|\([0-9]+\)"
PERIOD += r"|(?:\\dot\s*(?:\{[0-9]\}|[0-9])[0-9]*)+"
NUMERAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
TOKEN = re.compile(
    rf"""
    (?P<space>(?:[\s~]|\\[,:;!\s/])+)
    |(?P<grouped>{GROUPED})
    |(?P<repeating>[0-9]*\.[0-9]*(?:{PERIOD}))
    |(?P<scientific>{NUMERAL}[eE][+-]?[0-9]{{1,3}}(?![0-9A-Za-z.]))
    |(?P<number>{NUMERAL})
    |(?P<degree>\^\s*(?:\\circ|\{{\s*\\circ\s*\}}))
    |(?P<command>\\(?:[A-Za-z]+|\\))
    |(?P<escaped>\\.)
    |(?P<letters>[A-Za-z]+)
    |(?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def plain_characters(text):
    """One spelling for each character; what has none stays."""
    written, raised = [], ""
    for character in text + "\0":
        if raised and character not in SUPERSCRIPTS:
            written.append("^{" + raised + "}")
            raised = ""
        if character in SUPERSCRIPTS:
            raised += SUPERSCRIPTS[character]
        elif character in SUBSCRIPTS:
            written.append("_" + SUBSCRIPTS[character])
        elif ord(character) in FULL_WIDTH:
            written.append(chr(ord(character) - 0xFEE0))
        elif character in CHARACTERS:
            replacement = CHARACTERS[character]
            written.append(replacement + " " * replacement[-1].isalpha())
        else:
            written.append(character)
    return "".join(written[:-1])


def without_dollars(text):
    """$x$ is x, but $20 is money, which is written \\$20 from here on."""
    stripped = text.strip(" \n\t.")
    if len(stripped) > 1 and stripped.startswith("$") and stripped.endswith("$"):
        if not stripped.endswith("\\$"):
            return text.replace("\\$", "\0").replace("$", " ").replace("\0", "\\$")
    text = re.sub(r"(?<!\\)\$(?=[0-9.])", r"\\$", text)
    return re.sub(r"(?<!\\)\$", " ", text)


def tokenize(text):
    """The tokens of a text; Unreadable when its brackets are deeper than MAX_DEPTH."""
    text = without_dollars(plain_characters(text))
    text = text.replace("**", "^") if re.search(r"[0-9A-Za-z)]\*\*[0-9A-Za-z(-]", text) else text
    tokens = with_upright_text(scan(text.replace("{:}", ":")))
    depth = 0
    for token in tokens:
        depth += nesting(token)
        if depth > MAX_DEPTH:
            raise Unreadable("too many brackets")
    return with_braces(tokens)


def scan(text):
    """The tokens of a text, one after the other, without spaces and commands of no meaning."""
    tokens, start, spaced = [], 0, False
    brackets = 0  # a comma between them divides, and never groups digits
    while start < len(text):
        match = TOKEN.match(text, start)
        kind = match.lastgroup
        if kind == "grouped" and is_list(match, brackets, tokens):
            match = re.compile(NUMERAL).match(text, start)
            kind = "number"
        start = match.end()
        if kind == "space":
            spaced = True
            continue
        token = make_token(kind, match)
        if token is not None:
            tokens.append(Token(token[0], token[1], spaced=spaced))
            brackets += (token[1] in ("(", "[", "\\{")) - (token[1] in (")", "]", "\\}"))
        spaced = False
    return tokens


def is_list(match, brackets, tokens):
    """2,3,500 and (1,234) and {2, 500} are lists; 1,234 is one number."""
    separator = match["separator"]
    follows_comma = bool(tokens) and tokens[-1].text == ","
    return separator.startswith(",") and (brackets > 0 or follows_comma)


def make_token(kind, match):
    """(kind, text) of a token, or None for what has no meaning."""
    text = match[0]
    if kind == "grouped":
        digits = "".join(re.findall(r"[0-9.]", text))
        return "number", digits
    if kind == "repeating":
        return "number", one_period(text)
    if kind == "scientific":
        return "number", text.lower()
    if kind == "degree":
        return "command", "\\degree"
    if kind == "escaped":
        if text in ("\\{", "\\}"):
            return "mark", text
        return None if text[1] in "()[]" else ("mark", text[1])
    if kind == "command":
        text = COMMANDS.get(text, text)
        return None if text in MEANINGLESS else ("command" if text[1:].isalpha() else "mark", text)
    return kind, text


def one_period(text):
    r"""0.1(6), of that and of 0.1\overline{6} and 0.1\dot{6}."""
    if "dot" in text:
        before, _, period = text.partition("\\dot")
    else:
        before, _, period = text.replace("(", "\\bar").partition("\\")
    return before + "(" + "".join(re.findall("[0-9]", period)) + ")"


def nesting(token):
    """1 for an opening bracket, -1 for a closing one, else 0."""
    return (token.text in OPENING) - (token.text in CLOSING)


def closing(tokens, start):
    """The index of the bracket that closes the one at `start`; Unreadable when there is none.
    A half-open interval closes [ with ), so round and square ones count as one kind."""
    curly = tokens[start].text == "{"
    depth = 0
    for i in range(start, len(tokens)):
        if (tokens[i].text in "{}") == curly:
            depth += nesting(tokens[i])
        if depth == 0:
            return i
    raise Unreadable("a bracket stays open")


def is_group(tokens):
    """Whether the first bracket, round, square or of a set, is closed by the last."""
    return tokens[0].text in ("(", "[", "\\{") and closing(tokens, 0) == len(tokens) - 1


def without_braces(tokens):
    while tokens and tokens[0].text == "{" and closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def argument(tokens, start):
    """(tokens, end) of what a command takes: {...} without its braces, or one token."""
    if start >= len(tokens):
        raise Unreadable("an argument is missing")
    if tokens[start].text != "{":
        return tokens[start : start + 1], start + 1
    end = closing(tokens, start)
    return tokens[start + 1 : end], end + 1


def with_upright_text(tokens, upright=False, depth=0):
    r"""The tokens of \text{...} marked as upright, in place of the command."""
    if depth > MAX_DEPTH:
        raise Unreadable("too many brackets")
    result, i = [], 0
    while i < len(tokens):
        token = tokens[i]
        if token.text in MEANINGLESS_WITH_ARGUMENT:
            _, i = argument(tokens, i + 1)
        elif token.text in UPRIGHT:
            inside, i = argument(tokens, i + 1)
            inside = with_upright_text(inside, True, depth + 1)
            if inside:
                inside[0] = replace(inside[0], spaced=token.spaced or inside[0].spaced)
            result += inside
        elif token.text == "\\mathbb":
            inside, i = argument(tokens, i + 1)
            result.append(Token("command", "\\mathbb" + "".join(x.text for x in inside)))
        elif token.text in ("\\begin", "\\end"):
            inside, i = argument(tokens, i + 1)
            name = "".join(x.text for x in inside)
            result.append(Token("command", f"{token.text}{{{name}}}"))
        else:
            result.append(replace(token, upright=upright or token.upright))
            i += 1
    return result


def with_braces(tokens):
    r"""\frac12, \frac xy and {1 \over 2} as \frac{1}{2}: without braces it takes one character."""
    result, i = [], 0
    tokens = list(tokens)
    missing = 0  # arguments of a fraction that are still to come
    while i < len(tokens):
        token = tokens[i]
        if token.text in ("\\frac", "\\binom"):
            result.append(token)
            missing, i = 2, i + 1
            continue
        if token.text == "{":
            end = closing(tokens, i)
            result += braced(with_over(with_braces(tokens[i + 1 : end])))
            i = end + 1
        elif missing:
            first, rest = token, []
            divisible = token.text.isdigit() or token.text.isalpha()
            if divisible and len(token.text) > 1 and not token.upright:
                first = Token(token.kind, token.text[0])
                rest = [Token(token.kind, token.text[1:])]
            result += braced([first])
            tokens[i : i + 1] = rest
        else:
            result.append(token)
            i += 1
        missing = max(0, missing - 1)
    return result


def braced(tokens):
    return [Token("mark", "{"), *tokens, Token("mark", "}")]


def with_over(tokens):
    r"""1 \over 2 as \frac{1}{2}, n \choose 2 as \binom{n}{2}."""
    for i, token in enumerate(tokens):
        if token.text in ("\\over", "\\choose"):
            command = "\\frac" if token.text == "\\over" else "\\binom"
            return [Token("command", command), *braced(tokens[:i]), *braced(tokens[i + 1 :])]
    return tokens

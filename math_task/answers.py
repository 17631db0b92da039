"""Finds the answer: in what a model has written, and in the rows of a data set."""

import json
import re
from ast import literal_eval

from tasks import MAX_ANSWER, after_thought, extract_answer

MAX_WORDS = 12  # of a gold; more are a solution
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
UNBRACED = re.compile(r"[-−]?[0-9][^\s$}]*|[A-Za-z](?![A-Za-z])")


def boxes(text):
    r"""The contents of all \boxed{...} of up to MAX_ANSWER characters, from the first on."""
    contents, end = [], 0
    for match in BOX.finditer(text):
        if match.start() < end:
            continue  # within another box
        inside = braced(text, match.end()) if text[match.end() :][:1] == "{" else None
        if inside is None:
            unbraced = UNBRACED.match(text, match.end())
            inside = unbraced[0] if unbraced else ""
        end = match.end() + len(inside)
        if 0 < len(inside) <= MAX_ANSWER:
            contents.append(inside)
    return contents


def braced(text, start):
    """What stands between the brace at `start` and the one that closes it; "" if none does soon."""
    depth = 0
    for i in range(start, min(len(text), start + MAX_ANSWER + 2)):
        if text[i] == "{":
            depth += 1
        if text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
    return ""


def final_answer(text):
    r"""The last \boxed{...}, else what follows the last "Answer:", else ""."""
    found = boxes(after_thought(text))
    return found[-1] if found else extract_answer(text) or ""


def read_gold(value):
    """The answer of a row as text. ValueError, saying why, for what may not be one answer."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        raise ValueError(f'"answer" is {names[value]}, and has to be a text or a number')
    if isinstance(value, str) and value.strip()[:1] == "[" and value.strip()[1:2] in ("'", '"'):
        value = read_list(value.strip())
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f'"answer" lists {len(value)} answers, and has to be one')
        return read_gold(value[0])
    if not isinstance(value, str):
        raise ValueError('"answer" has to be a text or a number')
    text = one_answer(value)
    if len(text) > MAX_ANSWER or not text.strip("$ \n"):
        raise ValueError(f'"answer" must be 1 to {MAX_ANSWER} characters, not only $')
    return text


def read_list(text):
    """["18"] and ['18'] are lists of one answer."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f'"answer" is no list: {text[:40]}') from None


def one_answer(text):
    r"""What follows ####, or stands in the only \boxed{}, or follows "Answer:"; else all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    found = set(boxes(text))
    if len(found) == 1:
        return found.pop()
    if len(found) > 1:
        raise ValueError(f'"answer" has {len(found)} different boxes')
    line = extract_answer(text)
    if line:
        return line
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    if len(words) > MAX_WORDS or "\n" in text.strip():
        raise ValueError('"answer" is a solution; give the final answer alone')
    return text

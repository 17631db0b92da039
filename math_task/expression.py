r"""Tokens of a formula become LaTeX that math-verify cannot misread.

That library takes k(x) for a function, 3(4) for 7, dc for a differential, E for e, \gamma for a
number, and x' for x. So each name is written \mathrm{name}, each product with a *, each quotient
as a \frac, and each argument in parentheses. Terms and factors are sorted, so that equal formulas
often become the same text.
"""

from fractions import Fraction

from .tokens import Token, Unreadable, argument, closing, nesting

FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp".split()
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
OF_SEVERAL = ("max", "min", "gcd", "lcm")
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon "
    "Phi Psi Omega ell hbar partial nabla emptyset aleph"
).split()
ACCENTS = "overline vec hat widehat tilde widetilde dot ddot".split()
FIGURES = "angle triangle odot parallel perp measuredangle square".split()
FUNCTION_LETTERS = set("fghFGH")
BARS = {"\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
# Names that people type without a backslash.
TYPED = {*FUNCTIONS, *OF_SEVERAL, "sqrt", "pi", "infty", "theta", "alpha", "beta", "lambda", "frac"}


def number_value(text):
    """The exact value of a numeral: 12, .5, 1.2e5, or 0.1(6) with a period."""
    if "(" not in text:
        return Fraction(text)
    before, _, period = text.rstrip(")").partition("(")
    decimals = before.partition(".")[2]
    repeated = Fraction(int(period), 10 ** len(period) - 1)
    start = Fraction(before + "0") if before.strip(".") else Fraction(0)
    return start + repeated / 10 ** len(decimals)


def write_fraction(value):
    """A fraction in LaTeX."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def name(text):
    """A variable as the library reads it: nothing but a name."""
    return "\\mathrm{" + text.translate(str.maketrans("{}\\", "()`")) + "}"


def plain_text(tokens):
    r"""Tokens as one word without braces: what distinguishes a name, as in v_{\min}."""
    return "".join(token.text.strip("\\") for token in tokens if token.text not in "{}")


class Reader:
    """Reads one formula by recursive descent; each method returns the LaTeX of what it has read."""

    def __init__(self, tokens):
        self.tokens = split_letters(tokens)
        self.position = 0
        self.open_bars = 0  # of |x|: the next bar closes it

    def peek(self, ahead=0):
        """The text of a token; "" behind the last one."""
        index = self.position + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def kind(self):
        return self.tokens[self.position].kind if self.position < len(self.tokens) else ""

    def take(self):
        if self.position == len(self.tokens):
            raise Unreadable("the formula ends too early")
        self.position += 1
        return self.tokens[self.position - 1].text

    def skip(self, text):
        """Whether this token comes next; if so it is read."""
        found = self.peek() == text
        self.position += found
        return found

    def group(self):
        """The tokens within the brackets that open here."""
        end = closing(self.tokens, self.position)
        inside = self.tokens[self.position + 1 : end]
        self.position = end + 1
        return inside

    def argument(self):
        """What belongs to a ^, _ or \\sqrt: a formula in braces, or one token."""
        if self.peek() in ("{", "("):
            return read_tokens(self.group())
        if self.peek() == "-":
            self.take()
            return "-" + self.atom()
        return self.atom()

    # ---- From sums down to single names ----

    def sum(self):
        terms = [self.signed_product()]
        while self.peek() in ("+", "-"):
            terms.append(self.signed_product())
        terms.sort()
        written = "".join(sign + product for product, sign in terms)
        return written.removeprefix("+")

    def signed_product(self):
        """(LaTeX, its sign)."""
        sign = "+"
        while self.peek() in ("+", "-"):
            if self.take() == "-":
                sign = "-" if sign == "+" else "+"
        return self.product(), sign

    def product(self):
        factors = self.factors()
        while self.peek() in ("*", "/", "\\div", ":"):
            divide = self.take() != "*"
            sign = ["(-1)"] if self.skip("-") else []
            others = self.factors()
            if divide and len(others) > 1:
                raise Unreadable("1/2x is a half of x, or 1/(2x)")
            if divide:
                factors = [f"\\frac{{{multiply(factors)}}}{{{multiply(others)}}}"]
            else:
                factors += others
            factors += sign
        return multiply(factors)

    def factors(self):
        """Factors side by side, without a sign between them: 2x\\sqrt{3}."""
        factors = [self.mixed_number() or self.power()]
        while self.starts_factor():
            if self.kind() == "number" and self.peek(-1) not in ("}", ")", "!"):
                raise Unreadable("a number behind a factor")
            factors.append(self.power())
        return factors

    def starts_factor(self):
        text, kind = self.peek(), self.kind()
        if kind == "mark":
            return text in ("(", "[", "{") or (text == "|" and self.open_bars == 0)
        return kind in ("number", "letters", "command") and text not in ENDINGS

    def mixed_number(self):
        """2\\frac{1}{2} and 2 1/2 are five halves."""
        start, whole = self.position, self.peek()
        if self.kind() != "number" or not whole.isdigit():
            return None
        self.take()
        value = self.simple_fraction()
        if value is None or value >= 1:
            self.position = start
            return None
        return f"({write_fraction(int(whole) + value)})"

    def simple_fraction(self):
        """The value of \\frac{1}{2} or 1/2 in digits, or None."""
        texts = [self.peek(i) for i in range(7)]
        braces = texts[1], texts[3], texts[4], texts[6]
        if texts[0] == "\\frac" and braces == ("{", "}", "{", "}"):
            above, below, length = texts[2], texts[5], 7
        elif texts[1] == "/":
            above, below, length = texts[0], texts[2], 3
        else:
            return None
        if not (above.isdigit() and below.isdigit()) or int(below) == 0:
            return None
        self.position += length
        return Fraction(int(above), int(below))

    def power(self):
        base, raised = self.atom(), False
        while True:
            if self.peek() == "!" and self.peek(1) != "!":
                self.take()
                base = f"{wrap(of_limited_size(base))}!"
            elif self.skip("^"):
                if raised:
                    raise Unreadable("2^3^2 is 8^2, or 2^9")
                base, raised = f"{wrap(base)}^{{{of_limited_size(self.argument())}}}", True
            elif self.skip("\\degree"):
                base = f"({base}*\\frac{{\\pi}}{{180}})"
            elif self.skip("%"):
                base = f"\\frac{{{base}}}{{100}}"
            else:
                return base

    def atom(self):
        kind, text = self.kind(), self.take()
        if kind == "number":
            return text if text.isdigit() else f"({write_fraction(number_value(text))})"
        if kind == "letters":
            return self.variable(text)
        if text in ("(", "[", "{"):
            self.position -= 1
            return wrap(read_tokens(self.group()))
        if text == "|":
            return self.absolute_value()
        if text in BARS:
            inside = self.sum()
            if not self.skip(BARS[text]):
                raise Unreadable("a bar stays open")
            return f"{text}({inside}){BARS[text]}"
        if kind != "command":
            raise Unreadable(f"{text} is no formula")
        return self.command(text.strip("\\"))

    def absolute_value(self):
        self.open_bars += 1
        inside = self.sum()
        self.open_bars -= 1
        if not self.skip("|"):
            raise Unreadable("a bar stays open")
        return f"|{inside}|"

    def command(self, command):
        if command == "frac":
            above, end = argument(self.tokens, self.position)
            below, end = argument(self.tokens, end)
            if is_differential(above) and is_differential(below):
                self.position = end
                return name(f"{plain_text(above)} by {plain_text(below)}")
            above = self.argument()
            return f"\\frac{{{above}}}{{{self.argument()}}}"
        if command == "binom":
            above = self.argument()
            return f"\\binom{{{above}}}{{{self.argument()}}}"
        if command == "sqrt":
            return self.root()
        if command in ("pi", "infty"):
            return "\\" + command + " "
        if command in FUNCTIONS:
            return self.function(command)
        if command in OF_SEVERAL:
            return self.function_of_several(command)
        if command in GREEK:
            return self.variable(command)
        if command in ACCENTS:
            inside, self.position = argument(self.tokens, self.position)
            return self.variable(f"{command} {plain_text(inside)}")
        if command in FIGURES:
            return self.variable(f"{command} {self.take()}")
        raise Unreadable(f"\\{command} is not known here")

    def root(self):
        degree = f"[{read_tokens(self.group())}]" if self.peek() == "[" else ""
        return f"\\sqrt{degree}{{{self.argument()}}}"

    def function(self, function):
        """\\sin^2 x, \\sin 2x, \\log_2 (x+1)."""
        base, exponent = "", ""
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = f"_{{{self.argument()}}}"
            else:
                exponent = self.argument()
        if exponent == "-1" and function in INVERSE:
            function, exponent = INVERSE[function], ""
        if self.peek() in ("(", "{", "["):
            inside = read_tokens(self.group())
        else:
            inside = self.function_argument()
        if function == "exp":
            written = f"e^{{{inside}}}"
        elif function == "lg":
            written = f"\\log_{{10}}({inside})"
        else:
            written = f"\\{function}{base}({inside})"
        return f"({written})^{{{exponent}}}" if exponent else written

    def function_argument(self):
        """Without parentheses: all factors up to the next sign, or the next function."""
        factors = [self.mixed_number() or self.power()]
        while self.starts_factor() and self.peek().strip("\\") not in FUNCTIONS:
            if self.peek() in ("(", "["):
                break
            factors.append(self.power())
        return multiply(factors)

    def function_of_several(self, function):
        if self.peek() != "(" and self.peek() != "\\{":
            raise Unreadable("a function without arguments")
        arguments = [read_tokens(part) for part in split(self.group(), ",")]
        command = "\\operatorname{lcm}" if function == "lcm" else "\\" + function
        return f"{command}({','.join(sorted(arguments))})"

    def variable(self, text):
        """A name with all that distinguishes it: subscript, primes, the argument of a function."""
        subscript, primes = "", ""
        while self.peek() in ("_", "'"):
            if self.take() == "'":
                primes += "'"
            elif self.peek() == "{":
                subscript = plain_text(self.group())
            else:
                subscript = self.take().strip("\\")
        if text == "C" and subscript and self.peek() == "^":
            return self.binomial(subscript)
        full = text + "_" * bool(subscript) + subscript + primes
        if full == "C" and self.peek() == "(":
            return self.called_binomial()
        if self.peek() == "(" and text in FUNCTION_LETTERS:
            return name(f"{full}({plain_text(self.group())})")
        constants = {"e": "e", "i": "I"}
        return constants.get(full, name(full))

    def called_binomial(self):
        """C(10, 3); of C(x) a product."""
        arguments = [read_tokens(part) for part in split(self.group(), ",")]
        if len(arguments) == 2:
            return f"\\binom{{{arguments[0]}}}{{{arguments[1]}}}"
        return multiply([name("C"), wrap(arguments[0])])

    def binomial(self, below):
        """C_{10}^{3}, which is \\binom{10}{3}."""
        self.take()
        above = self.argument()
        if below.isdigit() and above.isdigit() and int(below) < int(above):
            return f"({name('C_' + below)})^{{{above}}}"
        below = below if below.isdigit() else name(below)
        return f"\\binom{{{below}}}{{{above}}}"


# Commands that stand between formulas, and never begin one.
ENDINGS = {"\\div", "\\rfloor", "\\rceil", "\\degree"}


def is_differential(tokens):
    r"""dy, d^2 y, \partial x: the parts of a derivative, which isn't d * y / (d * x)."""
    first = tokens[0].text if tokens else ""
    if first in ("d", "\\partial"):
        return len(tokens) > 1 and (tokens[1].kind != "mark" or tokens[1].text == "^")
    return first[:1] == "d" and len(first) == 2


def multiply(factors):
    return factors[0] if len(factors) == 1 else "*".join(sorted(factors))


def of_limited_size(latex):
    """An exponent, or what a factorial is of: up to 10,000 where it is a number."""
    if latex.lstrip("-").isdigit() and abs(int(latex)) > 10_000:
        raise Unreadable("a number is too large")
    return latex


def wrap(latex):
    """In parentheses, unless it is a number or a name. Of I^2 the library reads I."""
    is_number_or_letter = latex.isalnum() and latex != "I"
    is_name = latex.startswith("\\mathrm{") and latex.find("}") == len(latex) - 1
    return latex if is_number_or_letter or is_name else f"({latex})"


def split(tokens, *separators):
    """The parts between separators that stand outside of all brackets."""
    parts, depth = [[]], 0
    for token in tokens:
        depth += nesting(token)
        if depth == 0 and token.text in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def split_letters(tokens):
    """xy becomes x and y; sin without its backslash a command. Upright words are Unreadable."""
    result = []
    for token in tokens:
        if token.kind == "letters" and token.text in TYPED:
            result.append(Token("command", "\\" + token.text))
        elif token.kind == "letters" and token.upright and len(token.text) > 1:
            raise Unreadable(f"{token.text} is a word")
        elif token.kind == "letters" and result and result[-1].text.strip("\\") in FIGURES:
            result.append(token)  # \\triangle ABC
        elif token.kind == "letters":
            result += [Token("letters", letter) for letter in token.text]
        else:
            result.append(token)
    return result


def read_tokens(tokens):
    """The LaTeX of a formula; Unreadable for anything else."""
    reader = Reader(tokens)
    latex = reader.sum()
    if reader.position < len(reader.tokens):
        raise Unreadable(f"{reader.peek()} is out of place")
    return latex

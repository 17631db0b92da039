"""The process that compares: math-verify may take for ever and all memory, so it runs there."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

SECONDS = 3  # of CPU time for a verdict: a busy machine judges as an idle one does
MEMORY = 4 << 30  # bytes of address space
ROOT = str(Path(__file__).resolve().parent.parent)
START = """
import sys
sys.path.insert(0, sys.argv[1])
from math_task.worker import serve
serve(float(sys.argv[2]))
"""


class Worker:
    """Starts the process when it is asked, and again when it has died."""

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()

    def verdict(self, gold, answer):
        """Whether the texts of two answers agree. What takes too long doesn't."""
        from signal import SIGPROF

        for _ in range(2):
            with self.lock:
                reply, code = self.ask(json.dumps([gold, answer]))
            if reply or code == -SIGPROF:
                break  # else somebody killed the process, and the question is asked again
        return reply == "True\n"

    def ask(self, question):
        """(reply, None), or ("", the exit code of a process that has died of the question)."""
        process, self.process = self.process, None  # an interrupt must not leave it a late reply
        if process is None or process.poll() is not None:
            process = start()
        try:
            print(question, file=process.stdin, flush=True)
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:
            process.kill()
            process.wait()
            raise
        if not reply:
            return "", process.wait()
        self.process = process
        return reply, None


def start():
    """A new process that is ready to compare."""
    pipe = subprocess.PIPE
    with signals_blocked():
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", START, ROOT, str(SECONDS)],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    if process.stdout.readline() != "ready\n":
        process.kill()
        process.wait()
        raise RuntimeError("math-verify doesn't work here: pip install math-verify==0.9.0")
    return process


@contextmanager
def signals_blocked():
    """A process started here inherits the blocked signals, and so ignores what ends a whole job.
    It ends when its standard input does."""
    from signal import SIG_BLOCK, SIG_SETMASK, SIGHUP, SIGINT, SIGTERM, pthread_sigmask

    before = pthread_sigmask(SIG_BLOCK, (SIGHUP, SIGINT, SIGTERM))
    try:
        yield
    finally:
        pthread_sigmask(SIG_SETMASK, before)


worker = Worker()  # one for all tasks and threads of this process


@lru_cache(100_000)  # the completions of a problem mostly agree
def equivalent(gold, answer):
    return worker.verdict(gold, answer)


# ---- In the process ----


class Library:
    """math-verify and sympy, made exact. They read what expression.py has written."""

    def __init__(self):
        import sympy
        import sympy.physics.units  # reads texts by eval when first imported
        from latex2sympy2_extended import latex2sympy2, symbols
        from math_verify import grader, parser, verify

        # Without this sympy reads even numbers by eval.
        sympy.parsing.sympy_parser.parse_expr = lambda text, **options: sympy.Rational(text)
        latex2sympy2.get_symbol = lambda text, *options: symbols.get_symbol(text)  # R is no r
        grader.sympy_numeric_eq = self.equal  # instead of up to six decimals
        grader.sympy_solve_and_compare = None  # it takes equations without solutions for equal
        self.sympy, self.verify = sympy, verify
        self.parse = parser.parse_latex_cached

    def equal(self, left, right, *tolerances):
        difference = (left - right).doit()
        return all(self.is_zero(entry) for entry in self.sympy.Matrix([difference]))

    def is_zero(self, value):
        if value == 0 or self.is_far_from_zero(value):
            return value == 0
        if value.expand() == 0:
            return True
        verdict = value.equals(0)
        return bool(self.sympy.simplify(value).is_zero if verdict is None else verdict)

    def is_far_from_zero(self, value):
        """At one point, where it is quickly seen; near zero nothing is decided by decimals."""
        names = sorted(value.free_symbols, key=str)
        point = {name: self.sympy.Rational(13 + 4 * i, 7) for i, name in enumerate(names)}
        size = abs(value.subs(point).evalf(15))
        return bool(size.is_comparable and size > 0.001)

    def same(self, gold, answer):
        """Whether two formulas are equal, whatever their variables are."""
        return self.equal(self.parse(gold), self.parse(answer))

    def same_as_written(self, gold, answer):
        """Whether sums, integrals or matrices are, by math-verify's own rules."""
        return self.verify(self.parse(gold), self.parse(answer), timeout_seconds=None)

    def near(self, latex, value):
        """Whether a decimal may stand for this constant: within five percent."""
        exact = self.parse(latex).doit()
        return bool(abs(exact - self.sympy.Rational(str(value))) <= abs(exact) / 20)

    def proportional(self, gold, answer, either_sign):
        """Whether two formulas differ by a constant factor: x+y-4 and 2x+2y-8."""
        left, right = (self.parse(latex).doit() for latex in (gold, answer))
        if not left.free_symbols or left.free_symbols != right.free_symbols:
            return False
        ratio = self.sympy.cancel(self.sympy.together(left / right))
        ratio = ratio if ratio.is_number else self.sympy.simplify(ratio)
        if not ratio.is_number or not ratio.is_finite or not ratio.is_nonzero:
            return False
        return either_sign or bool(ratio.is_positive)

    def same_sets(self, gold, answer):
        left, right = self.set_of(gold), self.set_of(answer)
        return bool(left.symmetric_difference(right).is_empty)

    def set_of(self, node):
        """The set of real numbers that a node stands for."""
        from .nodes import Between, Formula, Number, Relation, SetOperation

        sympy = self.sympy
        if isinstance(node, Number | Formula):
            return sympy.FiniteSet(self.constant(node))
        if isinstance(node, Between):
            return self.set_of(node.interval)
        if isinstance(node, Relation):
            return self.half_line(node)
        if isinstance(node, SetOperation):
            parts = [self.set_of(part) for part in node.parts]
            if node.operator == "reals":
                return sympy.S.Reals
            return sympy.Union(*parts) if node.operator == "union" else parts[0] - parts[1]
        items = [self.constant(item) for item in node.items]
        if node.brackets == "{}":
            return sympy.FiniteSet(*items)
        for bracket, bound in zip(node.brackets, items, strict=True):
            if bracket in "[]" and not bound.is_finite:
                raise ValueError("infinity belongs to no set of real numbers")
        if not items[0] < items[1]:
            raise ValueError("an interval is never empty")  # but (2, 1) is a point
        return sympy.Interval(*items, node.brackets[0] == "(", node.brackets[1] == ")")

    def half_line(self, relation):
        """x < 2 is everything below 2; x \\ne 2 is everything else."""
        sympy = self.sympy
        left_is_name = "\\mathrm" in getattr(relation.left, "latex", "")
        bound = self.constant(relation.right if left_is_name else relation.left)
        if relation.operator == "\\ne":
            return sympy.S.Reals - sympy.FiniteSet(bound)
        is_open = relation.operator == "<"
        if left_is_name:
            return sympy.Interval(-sympy.oo, bound, True, is_open)
        return sympy.Interval(bound, sympy.oo, is_open, True)

    def constant(self, node):
        from .compare import write

        value = self.parse(write(node)).doit()
        if value.free_symbols or not value.is_extended_real:
            raise ValueError(f"{value} is no real number")
        return value


def serve(seconds):
    """Reads a question [gold, answer] a line, and answers True or False."""
    import resource
    from signal import ITIMER_PROF, setitimer

    from .compare import agree
    from .parse import read

    replies, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    library = Library()
    if not library.same(r"\frac{1}{2}+\mathrm{x}", r"\mathrm{x}+(\frac{1}{2})"):
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies)
    for line in sys.stdin:
        setitimer(ITIMER_PROF, seconds)  # ends the process, even in the middle of C code
        verdict = False
        with suppress(Exception):  # formulas that the library can't read
            gold, answer = map(read, json.loads(line))
            verdict = agree(gold, answer, library)
        setitimer(ITIMER_PROF, 0)
        print(verdict, file=replies)

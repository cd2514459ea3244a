"""Small Python functions with one loop, checked by running them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from dlx.tasks.task import Draft, Sample
from dlx.tasks.words import ARGUMENTS, FUNCTIONS

INPUTS = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 18), (-4, 7, 0, 3), (), (5, 14, 21, 9))

ALLOWED = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AugAssign, ast.For, ast.If),
    *(ast.Return, ast.Expr, ast.Call, ast.Attribute, ast.Name, ast.Load, ast.Store, ast.Constant, ast.List),
    *(ast.BinOp, ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.Add, ast.Sub, ast.Mult, ast.Mod, ast.Eq),
    *(ast.NotEq, ast.Gt, ast.GtE, ast.Lt, ast.LtE, ast.Is, ast.IsNot),
)
# What parsing, compiling and running text of the allowed syntax may raise.
FAILURES = (
    *(SyntaxError, ValueError, TypeError, NameError, AttributeError, LookupError, ArithmeticError),
    *(RecursionError, MemoryError),
)


class Fold(NamedTuple):
    """One way to fold a list: the variable, its start, and how the function is asked for."""

    variable: str
    start: str
    asked: str


FOLDS = {
    "sum": Fold("total", "0", "the sum of the {which}{mapped}"),
    "count": Fold("count", "0", "how many {which} there are"),
    "product": Fold("result", "1", "the product of the {which}{mapped}"),
    "list": Fold("out", "[]", "a list of the {which}{mapped}"),
    "max": Fold("best", "None", "the largest of the {which}{mapped}, or None"),
}


def function(rng: Random) -> Draft:
    """A function that filters, maps and folds a list; meta is (its name, its source)."""
    name, argument = rng.choice(FUNCTIONS), rng.choice(ARGUMENTS)
    k = rng.randint(2, 9)
    condition, which = rng.choice(
        [
            ("x % 2 == 0", "even numbers"),
            ("x % 2 == 1", "odd numbers"),
            (f"x > {k}", f"numbers greater than {k}"),
            (f"x < {k}", f"numbers less than {k}"),
            (f"x % {k} == 0", f"multiples of {k}"),
            ("x > 0", "positive numbers"),
            (None, "numbers"),
        ]
    )
    maps = [
        ("x", ""),
        ("x", ""),
        ("x * x", " squared"),
        (f"x + {k}", f" plus {k}"),
        (f"x * {k}", f" times {k}"),
    ]
    value, mapped = rng.choice(maps)
    kind = rng.choice(list(FOLDS))
    variable, start, asked = FOLDS[kind]
    indent = " " * (12 if condition else 8)
    lines = [f"def {name}({argument}):", f"    {variable} = {start}", f"    for x in {argument}:"]
    lines += [f"        if {condition}:"] if condition else []
    lines += [indent + line for line in _fold(kind, variable, value)]
    source = "\n".join([*lines, f"    return {variable}"])
    wanted = asked.format(which=which, mapped=mapped)
    return Draft(f"Write a Python function {name}({argument}) that returns {wanted}.", source, (name, source))


def same_results(sample: Sample, text: str) -> bool:
    """Whether the function in `text` returns what the reference returns, on every input."""
    name, source = sample.meta
    try:
        return run(text, name) == run(source, name)
    except FAILURES:
        return False


def run(source: str, name: str) -> list[Any]:
    """The results of function `name` of `source`, one for each of INPUTS; Any because it may return anything.

    Only whitelisted syntax runs, without builtins: one function, one loop over its unchanged argument (so it
    ends), no call but `append`. Memory is not limited.

    Raises ValueError  if the syntax is not allowed; else whatever the function raises (FAILURES)
    """
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        tree = ast.parse(source)
        _refuse_unsafe(tree)
        code = compile(tree, "answer", "exec")
    namespace: dict[str, Any] = {"__builtins__": {}}
    exec(code, namespace)
    call: Callable[[tuple[int, ...]], Any] = namespace[name]
    return [call(numbers) for numbers in INPUTS]


def _fold(kind: str, variable: str, value: str) -> list[str]:
    """The loop's innermost lines."""
    match kind:
        case "count":
            return [f"{variable} += 1"]
        case "sum":
            return [f"{variable} += {value}"]
        case "product":
            return [f"{variable} *= {value}"]
        case "list":
            return [f"{variable}.append({value})"]
        case _:
            return [f"y = {value}", f"if {variable} is None or y > {variable}:", f"    {variable} = y"]


def _refuse_unsafe(tree: ast.Module) -> None:
    head = tree.body[0]
    if len(tree.body) != 1 or not isinstance(head, ast.FunctionDef):
        raise ValueError("the text is not one function")
    argument = head.args.args[0].arg
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    if len(loops) != 1 or not isinstance(loops[0].iter, ast.Name) or loops[0].iter.id != argument:
        raise ValueError("the function has not one loop over its argument")
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise ValueError(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Name) and node.id == argument and isinstance(node.ctx, ast.Store):
            raise ValueError(f"the argument {argument} is assigned")
        if isinstance(node, ast.Attribute) and node.attr != "append":
            raise ValueError(f"attribute {node.attr} is not allowed")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            raise ValueError("only methods may be called")

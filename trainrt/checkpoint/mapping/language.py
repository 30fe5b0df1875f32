"""Expressions as text: what a mapping file says, parsed without running any of it.

    "model.layers.{l}.mlp.up_proj.weight"
    shard(interleave("...q_proj.weight", "...k_proj.weight", "...v_proj.weight", groups=kv_heads, sizes=(n, 1, 1)), axis="tp")

Words in braces are placeholders: they take the values that the stored name has in their place, `{l + first_layer}` with
arithmetic. Bare words are variables: numbers of the model (`heads`), of the mesh (`tp`: its size) or of the mapping file.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping

from trainrt.checkpoint.mapping.expression import (
    Expression,
    Interleave,
    Pad,
    Partition,
    Shard,
    Stack,
    Tensor,
    Transpose,
)
from trainrt.errors import ConfigError, nearest

BRACES = re.compile(r"\{([^{}]+)\}")
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
}  # fmt: skip
FORMS: dict[str, set[str]] = {
    "shard": {"axis", "dim", "split", "repeat"},
    "concat": {"dim", "sizes"},
    "interleave": {"groups", "dim", "sizes"},
    "stack": {"over", "dim"},
    "transpose": {"order"},
    "pad": {"length", "multiple", "dim"},
    "partition": {"axis", "multiple"},
}
"""What each form takes by name."""

Values = Mapping[str, int]


def number(text: str, values: Values) -> int:
    """Arithmetic over variables. Raises ConfigError for anything else."""
    return _number(_parse(text).body, values, text)


def fill_in(template: str, values: Values) -> str:
    """A name with its placeholders filled in."""
    return BRACES.sub(lambda found: str(number(found[1], values)), template)


def make(text: str, values: Values) -> Expression:
    """The expression that a text means, with the values of placeholders and variables.

    Raises ConfigError with the text and what is wrong with it.
    """
    return _Maker(text).make(_parse(text).body, dict(values))


def names(text: str) -> list[str]:
    """The templates of the logical tensors in an expression, in their order."""
    found: list[str] = []
    waiting: list[ast.AST] = [_parse(text).body]
    while waiting:
        match waiting.pop(0):
            case ast.Constant(value=str(name)):
                found.append(name)
            case ast.Call(args=arguments):
                waiting = [*arguments, *waiting]
    return found


def _parse(text: str) -> ast.Expression:
    try:
        return ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"mapping: {text!r}: {error.msg}") from error


def _number(node: ast.AST, values: Values, text: str) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.Name(id=name):
            raise ConfigError(f"mapping: {text!r}: {name} is not known{nearest(name, values)}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            second = _number(right, values, text)
            if not second and isinstance(op, (ast.FloorDiv, ast.Mod)):
                raise ConfigError(f"mapping: {text!r}: {ast.unparse(node)} divides by zero")
            return OPERATORS[type(op)](_number(left, values, text), second)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, values, text)
    raise ConfigError(f"mapping: {text!r}: {ast.unparse(node)} is no number; allowed: numbers, names, + - * // %")


class _Maker:
    """One text on its way to an expression."""

    def __init__(self, text: str) -> None:
        self._text = text

    def make(self, node: ast.AST, values: dict[str, int]) -> Expression:
        match node:
            case ast.Constant(value=str(template)):
                return Tensor(fill_in(template, values))
            case ast.Call(func=ast.Name(id=form), args=arguments, keywords=keywords) if form in FORMS:
                given = {keyword.arg or "**": keyword.value for keyword in keywords}
                for key in given:
                    if key not in FORMS[form]:
                        raise self._wrong(f"{form} takes no {key}{nearest(key, FORMS[form])}")
                if not arguments:
                    raise self._wrong(f"{form} of nothing")
                return self._form(form, arguments, given, values)
            case ast.Call(func=ast.Name(id=form)):
                raise self._wrong(f"no form {form!r}{nearest(form, FORMS)}; allowed: {', '.join(FORMS)}")
        raise self._wrong(f"{ast.unparse(node)} is neither a name in quotes nor one of {', '.join(FORMS)}")

    def _form(
        self, form: str, arguments: list[ast.expr], given: dict[str, ast.expr], values: dict[str, int]
    ) -> Expression:
        def integer(key: str, otherwise: int, *, least: int = 1) -> int:
            value = _number(given[key], values, self._text) if key in given else otherwise
            if value < least:
                raise self._wrong(f"{form}: {key} = {value}: at least {least}")
            return value

        dim = integer("dim", 0, least=0)
        if form == "stack":
            return self._stack(arguments, given, values, dim)
        children = tuple(self.make(argument, values) for argument in arguments)
        if form in ("concat", "interleave"):
            return Interleave(children, integer("groups", 1), dim, self._numbers(given.get("sizes"), values))
        if form == "partition":
            return Partition(children, self._word(given.get("axis"), "axis"), integer("multiple", 1))
        if len(children) != 1:
            raise self._wrong(f"{form} takes one array")
        if form == "transpose":
            return Transpose(children[0], self._numbers(given.get("order"), values))
        if form == "pad":
            if "length" not in given:
                raise self._wrong("pad wants a length")
            return Pad(children[0], integer("length", 1), integer("multiple", 1), dim)
        split = self._word(given.get("split"), "split") or "chunk"
        if split not in ("chunk", "even"):
            raise self._wrong(f"split = {split!r}; allowed: chunk, even")
        axis = self._word(given.get("axis"), "axis")
        if axis is None:
            raise self._wrong("shard wants an axis")
        return Shard(children[0], axis, dim, split, integer("repeat", 1))  # type: ignore[arg-type]

    def _stack(
        self, arguments: list[ast.expr], given: dict[str, ast.expr], values: dict[str, int], dim: int
    ) -> Expression:
        over = self._word(given.get("over"), "over")
        if over is None or len(arguments) != 1:
            raise self._wrong('stack wants one array and over="placeholder"')
        return Stack(functools.cache(lambda index: self.make(arguments[0], {**values, over: index})), dim)

    def _numbers(self, node: ast.expr | None, values: Values) -> tuple[int, ...]:
        if node is None:
            return ()
        if not isinstance(node, (ast.Tuple, ast.List)):
            raise self._wrong(f"{ast.unparse(node)}: a list of numbers is wanted")
        numbers = tuple(_number(element, values, self._text) for element in node.elts)
        if any(number < 0 for number in numbers) or not numbers:
            raise self._wrong(f"{ast.unparse(node)}: numbers of at least 0 are wanted")
        return numbers

    def _word(self, node: ast.expr | None, key: str) -> str | None:
        if node is None:
            return None
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            raise self._wrong(f"{key} = {ast.unparse(node)}: a word in quotes is wanted")
        return node.value

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"mapping: {self._text!r}: {what}")

# SPDX-License-Identifier: Apache-2.0
"""Which names of TensorRT our code uses, read from its source.

The rule that makes it possible (thirdrail_engines/tensorrt/native.py): the package is always called
`trt`, and what comes out of it is annotated where it gets a name. What is not is reported.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_MODULE = "Module"
_SOME = "?"  # comes from TensorRT, and nobody has said what it is
# Every enum member has these, and so has every function and class.
_OF_ANYTHING = frozenset({"name", "value", "__members__"})


@dataclass
class NativeNames:
    """used: "BuilderFlag.REFIT" -> the files that use it. unclear: places that break the rule."""

    used: dict[str, set[str]] = field(default_factory=dict)
    unclear: list[str] = field(default_factory=list)


def native_names(files: Iterable[Path]) -> NativeNames:
    names = NativeNames()
    for path in files:
        _Reader(path.name, names).visit(ast.parse(path.read_text()))
    return names


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str, names: NativeNames) -> None:
        self._file, self._names = file, names
        self._known: dict[str, str | None] = {}  # a variable, or "self.x" -> its class
        self._returned: dict[str, str] = {}  # a function of ours -> the class of its result

    def visit_Module(self, node: ast.Module) -> None:
        for each in ast.walk(node):
            if isinstance(each, ast.FunctionDef) and (kind := _annotated(each.returns)):
                self._returned[each.name] = kind
            if isinstance(each, ast.AnnAssign) and ast.unparse(each.target).startswith("self."):
                self._known[ast.unparse(each.target)] = _annotated(each.annotation)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if kind := self._class_of(base):
                for each in node.body:
                    if isinstance(each, ast.FunctionDef) and not each.name.startswith("__"):
                        self._use(f"{kind}.{each.name}")
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = dict(self._known)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self._known[argument.arg] = _annotated(argument.annotation)
        self.generic_visit(node)
        self._known = outside

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._known[ast.unparse(node.target)] = _annotated(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        kind = self._class_of(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                known = self._known.get(target.id)
                if kind == _SOME and known is None:
                    self._unclear(node)
                self._known[target.id] = known or kind
            elif kind == _SOME and not isinstance(target, ast.Attribute):
                self._unclear(node)

    def visit_For(self, node: ast.For) -> None:
        if self._class_of(node.iter):
            self._unclear(node)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if self._class_of(node.iter):
            self._unclear(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = self._class_of(node.value)
        if base == _MODULE:
            self._use(node.attr)
        elif base == _SOME:
            if node.attr not in _OF_ANYTHING:
                self._unclear(node)
        elif base is not None and node.attr not in _OF_ANYTHING:
            self._use(f"{base}.{node.attr}")
        self.generic_visit(node)

    def _class_of(self, node: ast.expr) -> str | None:
        """The class in TensorRT of what an expression gives; None for what is not TensorRT's."""
        if isinstance(node, ast.Name):
            return _MODULE if node.id == "trt" else self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr == "trt":
                return _MODULE
            if kind := self._known.get(ast.unparse(node)):
                return kind
            base = self._class_of(node.value)
            return node.attr if base == _MODULE else base and _SOME
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in self._returned:
                    return self._returned[name]
            made = self._class_of(node.func)
            is_class = isinstance(node.func, ast.Attribute) and (
                self._class_of(node.func.value) == _MODULE
            )
            return made if is_class else made and _SOME
        return None

    def _use(self, name: str) -> None:
        self._names.used.setdefault(name, set()).add(self._file)

    def _unclear(self, node: ast.AST) -> None:
        place = f"{self._file}:{getattr(node, 'lineno', 0)}"
        self._names.unclear.append(f"{place}: {ast.unparse(node).splitlines()[0]}")


def _annotated(annotation: ast.expr | None) -> str | None:
    """`t.Builder` and `t.Builder | None` -> "Builder"; None for all other types."""
    if isinstance(annotation, ast.BinOp):
        return _annotated(annotation.left)
    if isinstance(annotation, ast.Attribute) and ast.unparse(annotation.value) == "t":
        return annotation.attr
    return None

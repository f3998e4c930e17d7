#!/usr/bin/env python3
"""Writes runlane/sync.py: the synchronous client, from the source of the asynchronous one.

python client/make_sync.py            writes it
python client/make_sync.py --check    only tells whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

PACKAGE = Path(__file__).with_name("runlane")
PAGE = PACKAGE / "sync.py"

ROOT = "Client"
"""The class that its users make; it makes the others."""

SOURCES = {
    "Client": "client",
    "RunHandle": "run_handle",
    "Subscription": "subscription",
    "RunEvents": "run_events",
    "Pager": "pager",
}
"""The classes that have a synchronous form, with their modules."""

NAMES = {
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}
"""What has another name here, as Python has it: `contextlib.closing` wants a `close`."""

SAYS = {
    "async with ": "with ",
    "async for ": "for ",
    "await ": "",
    "aclose": "close",
    "StopAsyncIteration": "StopIteration",
    "for one event loop": "for any number of threads",
    "One task at a time": "One thread at a time",
    "that is cancelled or timed out loses nothing": "that is broken off ends the call",
    "cancelling a step": "breaking off a step",
}
"""What docstrings say otherwise here; each is there, or it is out of date."""

ITERATORS = {"AsyncIterator": "Iterator"}

HEAD = '''"""The client for programs without asyncio: the same calls, each of which waits.

with Client("127.0.0.1:50051") as client:
    handle = client.run_accepted("my-session", "What is new?", allow_missing=True)
    for event in handle.events():
        print(event.body)
    complete = handle.completed()

The calls run on one event loop in a thread of its own, which all clients of the process share.

- Any number of threads may use one `Client`. An iterator is for one thread at a time.
- KeyboardInterrupt in a call that waits cancels it. A run is not touched by that.
- Functions that a client is given (`token`, `on_lost`) are called in that thread: they must be
  short, and call no client.
- In a thread whose event loop runs, every call raises RuntimeError: `runlane.Client` is for that.
- After `os.fork()` a client that was made before raises RuntimeError in the child, and goes on in
  the parent. A new one works in the child if none was used before the fork; else it raises
  RuntimeError too, as gRPC does not outlive a fork: make clients after it.
"""

# Written by client/make_sync.py from the asynchronous client; `make docs` writes it anew.
'''

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A class, and where the names come from that it uses."""

    name: str
    tree: ast.ClassDef
    imports: dict[str, str]

    @classmethod
    def read(cls, name: str, module: str) -> Source:
        """The class of that name. Raises StopIteration where the module has none."""
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
        return cls(name, next(c for c in classes if c.name == name), imports(tree, module))

    @property
    def is_record(self) -> bool:
        """Whether it is a dataclass."""
        return any("dataclass" in ast.unparse(each) for each in self.tree.decorator_list)

    def attributes(self) -> Iterator[tuple[str, str, str]]:
        """The public attributes of a record: name, type and what the docstring says of it."""
        doc = ast.get_docstring(self.tree) or ""
        for node in self.tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
                if name.startswith("_"):
                    continue
                told = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", doc, re.MULTILINE)
                if told is None:
                    raise ValueError(f"{self.name} does not say what {name} is")
                text = re.sub(r"\n +", "\n", told[1])
                yield name, ast.unparse(node.annotation), text

    def methods(self) -> Iterator[Function]:
        """What it offers."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                node.name.startswith("__") or not node.name.startswith("_")
            ):
                yield node


def imports(tree: ast.Module, module: str) -> dict[str, str]:
    """The statement that gets each global name of a module."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[top] = f"import {top}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.name] = f"from {node.module} import {alias.name}"
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ClassDef):
            names = [node.name]
        else:
            continue
        for name in names:
            found[name] = f"from runlane.{module} import {name}"
    return found


class Writer:
    """Writes the module, and keeps count of what it took."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def module(self, sources: Sequence[Source]) -> str:
        """The whole module. Raises ValueError where a rule of this script is out of date."""
        classes = "\n\n".join(self._class(source) for source in sources)
        if unsaid := SAYS.keys() - self._said:
            raise ValueError(f"no docstring says {sorted(unsaid)} any more")
        used = {node.id for node in ast.walk(ast.parse(classes)) if isinstance(node, ast.Name)}
        known = {name: line for source in sources for name, line in source.imports.items()}
        lines = {known[name] for name in used & known.keys() - SOURCES.keys()}
        lines |= {f"from runlane.{SOURCES[n]} import {n} as Async{n}" for n in SOURCES}
        lines.add("from runlane.portal import Portal")
        if "Iterator" in used:
            lines.add("from collections.abc import Iterator")
        public = ", ".join(f'"{name}"' for name in sorted(SOURCES))
        head = "\n".join(["from __future__ import annotations", *sorted(lines)])
        return f"{HEAD}\n{head}\n\n__all__ = [{public}]\n\n\n{classes}\n"

    def _class(self, source: Source) -> str:
        bases = ", ".join(map(ast.unparse, source.tree.bases))
        parameter = re.search(r"\[.*\]", bases)
        inner = f"Async{source.name}{parameter[0] if parameter else ''}"
        head = f"class {source.name}({bases}):" if bases else f"class {source.name}:"
        parts = [self._doc(source.tree)]
        if source.is_record:
            head = f"@dataclass(frozen=True, slots=True)\n{head}"
            parts.append(f"_portal: Portal = field(repr=False, compare=False)\n_inner: {inner}")
            for name, kind, text in source.attributes():
                getter = f'"""{text}"""\nreturn self._inner.{name}'
                parts.append(f"@property\ndef {name}(self) -> {kind}:\n{_indent(getter)}")
        elif source.name != ROOT:
            parts.append(
                f"def __init__(self, portal: Portal, inner: {inner}) -> None:\n"
                "    self._portal = portal\n    self._inner = inner"
            )
        methods = list(source.methods())
        for method in methods:
            if method.name != "__init__":
                parts.append(self._method(method))
            elif source.name == ROOT:
                arguments = ", ".join(_passed(method.args))
                body = f"self._portal = Portal()\nself._inner = Async{ROOT}({arguments})"
                parts.append(f"def __init__({self._arguments(method)}) -> None:\n{_indent(body)}")
        if any(method.name == "aclose" for method in methods):
            # A loop that is left by `break` leaves no call behind.
            parts.append("def __del__(self) -> None:\n    self._portal.drop(self._inner.aclose)")
        return f"{head}\n{_indent(chr(10).join(f'{part}{chr(10)}' for part in parts))}"

    def _method(self, method: Function) -> str:
        if method.returns is None:
            raise ValueError(f"{method.name} does not say what it returns")
        returns = ast.unparse(method.returns)
        kind, _, item = returns.partition("[")
        is_async = isinstance(method, ast.AsyncFunctionDef)
        arguments = ", ".join(_passed(method.args))
        target = f"self._inner.{method.name}"
        called = f"{target}({arguments})"
        waited = f"self._portal.call({', '.join([target, *_passed(method.args)])})"
        decorated = "".join(f"@{ast.unparse(each)}\n" for each in method.decorator_list)
        if "property" in decorated:
            body = f"return {target}"
        elif kind in ITERATORS:
            body = f"return self._portal.iterate({called}, self)"
            returns = f"{ITERATORS[kind]}[{item}"
        elif kind == "Self":
            # Entered, it is still the same.
            body = f"{waited}\nreturn self" if is_async else "return self"
        elif kind in SOURCES:
            body = f"return {kind}(self._portal, {waited if is_async else called})"
        elif is_async:
            body = waited if returns == "None" else f"return {waited}"
        else:
            raise ValueError(f"{method.name} returns {returns}: there is no rule for that")
        doc = self._doc(method)
        body = f"{doc}\n{body}" if doc else body
        name = NAMES.get(method.name, method.name)
        signature = f"def {name}({self._arguments(method)}) -> {returns}:"
        return f"{decorated}{signature}\n{_indent(body)}"

    def _arguments(self, method: Function) -> str:
        return ast.unparse(method.args)

    def _doc(self, node: Function | ast.ClassDef) -> str:
        doc = ast.get_docstring(node)
        if doc is None:
            return ""
        for theirs, ours in SAYS.items():
            if theirs in doc:
                self._said.add(theirs)
                doc = doc.replace(theirs, ours)
        end = "\n" if "\n" in doc else ""
        return f'"""{doc}{end}"""'


def _passed(arguments: ast.arguments) -> list[str]:
    """The arguments of a call that hands on all that a method was given."""
    if arguments.vararg or arguments.kwarg or arguments.posonlyargs:
        raise ValueError("there is no rule for such arguments")
    given = [argument.arg for argument in arguments.args if argument.arg != "self"]
    return given + [f"{argument.arg}={argument.arg}" for argument in arguments.kwonlyargs]


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")


def formatted(text: str) -> str:
    """The module as the linter wants it."""
    ruff = str(Path(sys.executable).with_name("ruff"))
    # The file's name tells which settings hold.
    name = ("--stdin-filename", str(PAGE), "-")
    for command in (("check", "--quiet", "--select", "I", "--fix"), ("format", "--quiet")):
        done = subprocess.run(  # noqa: S603 - the one of this environment
            [ruff, *command, *name], input=text, stdout=subprocess.PIPE, text=True, check=True
        )
        text = done.stdout
    return text


def main() -> None:
    """Writes the module anew, or tells whether it is fresh."""
    parser = argparse.ArgumentParser(description="The synchronous client")
    parser.add_argument("--check", action="store_true", help="only tell whether it is fresh")
    check = parser.parse_args().check
    fresh = formatted(Writer().module([Source.read(*each) for each in SOURCES.items()]))
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif before != fresh:
        sys.exit("client/runlane/sync.py is stale: run client/make_sync.py")


if __name__ == "__main__":
    main()

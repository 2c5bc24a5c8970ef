# SPDX-License-Identifier: MIT
"""The demo's documents: docstrings of the modules, functions and classes of Python's standard library.

Sources are parsed, not imported, so collecting them runs no code of theirs; the few modules that
are written in C and that everybody uses are imported and inspected.  Every run of one Python finds
the same documents in the same order.
"""

import ast
import importlib
import inspect
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

# Not what somebody who asks a question is looking for.
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "distutils",
    "tkinter",
    "encodings",
    "antigravity",
    "this",
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IN_C = (
    "builtins",
    "math",
    "cmath",
    "time",
    "itertools",
    "operator",
    "_collections",
    "_functools",
    "zlib",
    "binascii",
    "select",
    "_socket",
    "posix",
    "array",
    "_random",
    "_bisect",
    "_heapq",
    "_thread",
)
PLAIN_NAME = {"builtins": "", "posix": "os."}


class Document(NamedTuple):
    name: str  # shutil.copytree
    text: str  # the docstring, dedented


def _public(name: str) -> bool:
    return not name.startswith("_")


def _from_source(path: Path, module: str):
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return
    pending = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if text := ast.get_docstring(node):
            yield Document(name, text)
        if node is tree:
            pending += [
                (f"{name}.{child.name}", child)
                for child in reversed(tree.body)
                if isinstance(child, DEFINITIONS) and _public(child.name)
            ]


def _from_c(module: str):
    prefix = PLAIN_NAME.get(module, module.lstrip("_") + ".")
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return
    for name, value in sorted(vars(owner).items()):
        text = inspect.getdoc(value) if _public(name) and callable(value) else None
        if not text or isinstance(value, type) and issubclass(value, BaseException):
            continue
        yield Document(prefix + name, text)
        if isinstance(value, type):
            for method, function in sorted(vars(value).items()):
                if _public(method) and callable(function) and (text := inspect.getdoc(function)):
                    yield Document(f"{prefix}{name}.{method}", text)


def _all():
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or any(part in SKIPPED or not _public(part) for part in parts):
            continue
        yield from _from_source(path, ".".join(parts))
    for module in IN_C:
        yield from _from_c(module)


def load(limit: int | None = None) -> list[Document]:
    """Every name and every text once (the first of equals); `limit` draws so many, with a fixed seed."""
    seen, documents = set(), []
    for document in _all():
        if len(document.text) >= 24 and seen.isdisjoint(document):
            seen.update(document)
            documents.append(document)
    if limit and limit < len(documents):
        keep = sorted(random.Random(0).sample(range(len(documents)), limit))
        documents = [documents[i] for i in keep]
    return documents

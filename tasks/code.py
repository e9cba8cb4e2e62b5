"""One digest of all the code that a result depends on: modules, and their imports from the project, at any depth."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path

from tasks.files import sha256

_OURS = ("mtz_core", "tasks")
_ROOT = Path(__file__).parents[1]


def code_digest(*modules: str) -> str:
    """Return the SHA-256 of the source code of modules and of everything that they import from the project.

    The project is `mtz_core`, `tasks` and the current folder. Changes of installed libraries are not noticed. The
    sources are read; nothing is imported.

    Args:
        modules: Full names of the modules.

    Returns:
        The digest, hexadecimal.
    """
    sources = {name: sha256(file) for name, file in sources_of(*modules).items()}
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()


def sources_of(*modules: str) -> dict[str, Path]:
    """Return the source files of modules and of everything that they import from the project, by module name."""
    found: dict[str, Path] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        file = _file(name)
        if file is not None and name not in found:
            found[name] = file
            pending += _imported(name, file)
    return found


def _file(module: str) -> Path | None:
    """Return the file of a module of the project; None for any other module."""
    top = module.partition(".")[0]
    if not top:
        return None
    place = (_ROOT if top in _OURS else Path.cwd()).joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _imported(module: str, file: Path) -> Iterator[str]:
    """Yield the names that a module imports, anywhere in its code, and the packages that contain it."""
    parent = module.rpartition(".")[0]
    yield parent
    package = module if file.name == "__init__.py" else parent
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # nobody can import it, so that it imports nothing
        return
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _whole(alias.name)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # a relative import where there is no package, which fails when it runs, too
                source = resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield from [inner] if _file(inner) else _whole(source)


def _whole(module: str) -> Iterator[str]:
    """Yield a module and, if it is a package, all modules in it: a package may load any of them lazily."""
    yield module
    file = _file(module)
    if file is not None and file.name == "__init__.py":
        for inner in file.parent.rglob("*.py"):
            parts = inner.relative_to(file.parent).with_suffix("").parts
            yield ".".join((module, *(part for part in parts if part != "__init__")))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those that only type checkers see."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
        else:
            yield node
            pending += ast.iter_child_nodes(node)

"""The SDK runs on Python 3.10: its grammar, and what it imports when it is loaded."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CLIENT = Path(__file__).parents[2] / "client"
SOURCES = sorted(path for path in [*CLIENT.glob("penstock/*.py"), *CLIENT.glob("examples/*.py")])
LATER = {
    *("enum.StrEnum", "enum.ReprEnum", "typing.Self", "typing.Unpack", "typing.Never", "typing.assert_never"),
    *("typing.LiteralString", "typing.NotRequired", "typing.Required", "typing.reveal_type", "typing.override"),
    *("asyncio.timeout", "asyncio.TaskGroup", "asyncio.Runner", "datetime.UTC", "itertools.batched", "tomllib"),
    *("contextlib.chdir", "warnings.deprecated", "typing_extensions"),
}
"""Of what came with 3.11 and later, what is likely to be reached for; and what users need not have installed."""


def loaded_names(tree: ast.AST) -> set[str]:
    """Modules and their members that are imported or looked up when a module is loaded or runs, by full names."""
    names: set[str] = set()
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "sys.version_info >= (3, 11)"):
            todo += node.orelse
            continue
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                names.add(module)
                names.update(f"{module}.{alias.name}" for alias in node.names)
            case ast.Attribute(value=ast.Name(id=module), attr=attribute):
                names.add(f"{module}.{attribute}")
        todo += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_has_nothing_that_came_later(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    assert loaded_names(tree) & LATER == set()


def test_what_came_later_would_be_found() -> None:
    assert loaded_names(ast.parse("import enum\nclass E(enum.StrEnum): ...\nfrom typing import Self")) & LATER == {
        "enum.StrEnum",
        "typing.Self",
    }

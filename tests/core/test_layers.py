"""Arrows point one way: web → nodes → flux_core → torch, and one way inside flux_core.

tools/ may use flux_core; it is not shipped, so nothing that is may use tools/.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("flux_core", "nodes", "tools")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Single files of flux_core/ are its vocabulary: all may read them, they read only each other.
VOCABULARY = {path.stem for path in (ROOT / "flux_core").glob("*.py")}
FLOW = {"text", "image", "tokens"}
MAY_IMPORT = {
    "text": set[str](),
    "image": set[str](),
    "tokens": set[str](),
    "transformer": FLOW,
    "sampling": FLOW | {"transformer"},
    "weights": FLOW | {"transformer", "sampling"},
    "nano": set[str](),
    "training": FLOW | {"transformer", "sampling", "weights"},
}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
DOORS = {"comfy_api"}  # what every file in nodes/ may import; the rest of HOST is for host/


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import; ours begin with a folder of the pack."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def absolute_own_imports(path: Path) -> list[str]:
    """Absolute imports of the pack itself, which break when ComfyUI loads it by another name."""
    tree = ast.parse(path.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [
        n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
    ]
    return [name for name in names if name.split(".")[0] in {*FOLDERS, "glassbox"}]


def layer_of(path: Path) -> str:
    """The folder of flux_core a file is in; "" for the vocabulary."""
    parts = path.relative_to(ROOT / "flux_core").parts
    return parts[0] if len(parts) > 1 else ""


def test_the_layer_test_sees_the_files() -> None:
    assert len(FILES) > 20
    assert {layer_of(path) for path in FILES if "flux_core" in path.parts} == {"", *MAY_IMPORT}


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in FILES
        for line, name in imports(path)
        if not _allowed(path, name)
    ]
    assert wrong == []


def _allowed(path: Path, name: str) -> bool:
    """Whether a file may import a dotted name."""
    parts, folder = name.split("."), path.relative_to(ROOT).parts[0]
    if parts[0] == "tools" or folder == "tools":
        return folder == "tools" and parts[0] not in HOST | {"nodes"}
    if folder == "nodes":
        return parts[0] not in HOST - DOORS or path.parent.name == "host"
    if parts[0] in HOST | {"nodes"}:
        return False
    if parts[0] != "flux_core" or parts[1] in VOCABULARY:
        return True
    layer = layer_of(path)
    return parts[1] == layer or parts[1] in MAY_IMPORT.get(layer, set())


def test_imports_of_the_pack_are_relative() -> None:
    wrong = {str(path.relative_to(ROOT)): absolute_own_imports(path) for path in FILES}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_no_file_asks_for_a_family_by_name() -> None:
    asking = [
        f"{path.relative_to(ROOT)} {found}"
        for path in FILES
        if path.name != "families.py"
        for found in _family_branches(ast.parse(path.read_text()))
    ]
    assert asking == []


def _family_branches(tree: ast.AST) -> Iterator[str]:
    """Comparisons and matches on the name of a family."""
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        for one in asked:
            if isinstance(one, ast.Attribute) and one.attr == "name":
                owner = ast.unparse(one.value)
                if owner.split(".")[-1] in {"family", "variant"}:
                    yield f"line {one.lineno}: {ast.unparse(one)}"


def test_the_family_rule_finds_a_branch() -> None:
    found = _family_branches(ast.parse("if model.family.name == 'flux1-dev': pass"))
    assert list(found) == ["line 1: model.family.name"]


def test_importing_the_root_imports_nothing() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]

#!/usr/bin/env python
"""Write docs/reference.md, the API reference, from the docstrings of dfu_diffusers.

    python docs/make_reference.py            # write it
    python docs/make_reference.py --check    # exit with 1 if it is not up to date

It reads the sources and imports nothing, so that the result is the same with every release of Python and torch.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "reference.md"
# What a user meets first; the rest follows by name.
FIRST = ["dfu_diffusers", "pipeline_dfu", "modeling_dfu", "scheduling_edm_heun", "hub"]
INSIDE = {"checkpoints", "reports", "training"}  # of examples/train_dfu.py: of no use elsewhere, and free to change
WIDTH = 110  # a longer signature gets a line for each argument

HEAD = """# API reference

Written by `python docs/make_reference.py` from the docstrings: change those, not this page. Names that begin with an
underscore, what a class inherits from Diffusers, and the modules inside of the training script (`checkpoints`,
`reports`, `training`) are left out.
"""


def signature(name: str, function: ast.FunctionDef, method: bool) -> str:
    """`name(argument: type = default, ...) -> type`, without self or cls."""
    a = function.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    pairs = list(zip(positional, defaults))[int(method and not static) :]
    parts = [argument(each, default) for each, default in pairs]
    if a.vararg or a.kwonlyargs:
        parts.append(f"*{ast.unparse(a.vararg)}" if a.vararg else "*")
    parts += [argument(each, default) for each, default in zip(a.kwonlyargs, a.kw_defaults)]
    parts += [f"**{ast.unparse(a.kwarg)}"] if a.kwarg else []
    result = f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def argument(each: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if each.annotation else "="
    return ast.unparse(each) + (equals + ast.unparse(default) if default is not None else "")


def entry(title: str, shown: str, node: ast.AST) -> list[str]:
    text = ast.get_docstring(node)
    return [title, f"```python\n{shown}\n```", *([f"```text\n{text}\n```"] if text else [])]


def is_public(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main"


def class_entries(node: ast.ClassDef) -> list[str]:
    """The class with the arguments of its constructor, then its methods that have a docstring."""
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    shown = signature(node.name, methods["__init__"], True) if "__init__" in methods else node.name
    entries = entry(f"### {node.name}", f"class {shown}", node)
    for name, method in methods.items():
        if (is_public(method) or name == "__call__") and ast.get_docstring(method):
            property_ = any(ast.unparse(each) in ("property", "cached_property") for each in method.decorator_list)
            shown = f"{node.name}.{name}" if property_ else signature(f"{node.name}.{name}", method, True)
            entries += entry(f"#### {node.name}.{name}", shown, method)
    return entries


def module_entries(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    entries = [f"## {module_name(path)}", f"```text\n{ast.get_docstring(tree)}\n```"]
    for node in filter(is_public, tree.body):
        if isinstance(node, ast.ClassDef):
            entries += class_entries(node)
        else:
            entries += entry(f"### {node.name}", signature(node.name, node, False), node)
    return entries


def module_name(path: Path) -> str:
    return "dfu_diffusers" if path.stem == "__init__" else f"dfu_diffusers.{path.stem}"


def reference() -> str:
    """The whole page."""
    paths = [path for path in (ROOT / "dfu_diffusers").glob("*.py") if path.stem not in INSIDE]
    order = {name: place for place, name in enumerate(FIRST)}
    paths = sorted(paths, key=lambda path: (order.get(module_name(path).split(".")[-1], len(order)), path.stem))
    links = [f"- [{module_name(path)}](#{module_name(path).replace('.', '')})" for path in paths]
    return (
        "\n\n".join([HEAD.strip(), "\n".join(links), *(part for path in paths for part in module_entries(path))])
        + "\n"
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the page is not up to date")
    args = parser.parse_args(argv)
    page = reference()
    if args.check:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != page:
            sys.exit(f"{TARGET.name} is not up to date: run `python docs/make_reference.py`.")
    else:
        TARGET.write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

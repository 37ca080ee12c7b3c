"""Looks up in the sources of a vLLM what the rim imports, overrides, constructs and reads. Nothing of them is run.

    python tests/rim/signatures.py <folder of the vllm package> <version>

prints what is missing or does not fit, and exits with 1 if anything does. What the rim does for other versions only (an
`if VERSION ...` in contract.py) is left out. Attributes are followed from parameters whose annotation names a class of
vLLM; of what has no annotation nothing is known, and nothing is said.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

RIM = Path(__file__).resolve().parents[2] / "kvoffload" / "vllm"
Function = ast.FunctionDef | ast.AsyncFunctionDef
ALIASES = re.compile(r"[\w.]+")
FOREIGN = {"dict", "list", "tuple", "set", "Any", "Enum", "type"}


class Sources:
    """Definitions of a vllm package, by dotted module and name."""

    def __init__(self, folder: Path):
        self._folder = folder

    @cache  # noqa: B019 - lives as long as the program
    def module(self, name: str) -> dict[str, tuple[str, ast.AST]] | None:
        base = self._folder.joinpath(*name.split(".")[1:])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not file.exists():
            return None
        found: dict[str, tuple[str, ast.AST]] = {}
        for node in statements(ast.parse(file.read_text()).body):
            if isinstance(node, ast.ClassDef | Function):
                found[node.name] = name, node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0]: (name, node) for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {item.id: (name, node) for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}
        return found

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name is defined, through imports; a submodule is its own definition."""
        names = self.module(module)
        if names is None:
            return None
        if name not in names:
            return (f"{module}.{name}", ast.Pass()) if self.module(f"{module}.{name}") is not None else None
        origin, node = names[name]
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("vllm")):
            parts = module.split(".")
            package = parts if (self._folder.joinpath(*parts[1:])).is_dir() else parts[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
            return self.find(target, alias.name) or (target, node)
        return origin, node

    def mro(self, module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        yield node
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.mro(found[0], found[1])

    def member(self, module: str, node: ast.ClassDef, name: str) -> ast.AST | None:
        """A method, field, or attribute set on `self`, of a class or its bases."""
        for owner in self.mro(module, node):
            for item in ast.walk(owner):
                if isinstance(item, Function) and item.name == name:
                    return item
                if isinstance(item, ast.AnnAssign | ast.Assign):
                    for target in item.targets if isinstance(item, ast.Assign) else [item.target]:
                        if getattr(target, "attr", getattr(target, "id", None)) == name:
                            return item
        return None


class ForVersion(ast.NodeTransformer):
    """Leaves of `if VERSION ...` the branch taken, and nothing behind one that returns."""

    def __init__(self, version: tuple[int, int]):
        self._version = version

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        named = {item.id for item in ast.walk(node.test) if isinstance(item, ast.Name)}
        if named != {"VERSION"}:
            return node
        return node.body if eval(ast.unparse(node.test), {"VERSION": self._version}) else node.orelse

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        ends = [number for number, item in enumerate(node.body) if isinstance(item, ast.Return)]
        node.body = node.body[: ends[0] + 1] if ends else node.body
        return node


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, branches included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from statements([*node.body, *(item for handler in node.handlers for item in handler.body), *node.orelse])
        else:
            yield node


def parameters(function: Function) -> tuple[list[str], bool, bool]:
    """Names of a method's parameters less self, and whether it takes any positional and any named ones beside."""
    given = function.args
    return [arg.arg for arg in [*given.posonlyargs, *given.args, *given.kwonlyargs]][1:], bool(given.vararg), bool(given.kwarg)


def required(function: Function) -> int:
    """How many parameters less self, from the first on, must be given."""
    given = function.args
    return len(given.posonlyargs) + len(given.args) - len(given.defaults) - 1


class Check:
    def __init__(self, folder: Path, version: tuple[int, int]):
        self.sources, self.version, self.problems, self.looked = Sources(folder), version, [], 0

    def say(self, file: Path, node: ast.AST, text: str) -> None:
        self.problems.append(f"{file.name}:{getattr(node, 'lineno', 0)}: {text}")

    def run(self) -> list[str]:
        for file in sorted(RIM.glob("*.py")):
            body = list(statements(ForVersion(self.version).visit(ast.parse(file.read_text())).body))
            names = self.imports(file, body)
            for node in body:
                if isinstance(node, ast.ClassDef):
                    self.overrides(file, node, names)
                for function in [item for item in ast.walk(node) if isinstance(item, Function)]:
                    self.attributes(file, function, names)
                for call in [item for item in ast.walk(node) if isinstance(item, ast.Call)]:
                    self.construction(file, call, names)
        return self.problems

    def imports(self, file: Path, body: list[ast.stmt]) -> dict[str, tuple[str, ast.AST]]:
        names = {}
        for node in body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    self.looked += 1
                    found = self.sources.find(node.module, alias.name)
                    if found is None:
                        self.say(file, node, f"{node.module} has no {alias.name}")
                    else:
                        names[alias.asname or alias.name] = found
        return names

    def overrides(self, file: Path, node: ast.ClassDef, names: dict) -> None:
        for base in node.bases:
            module, parent = names.get(getattr(base, "id", ""), ("", None))
            if not isinstance(parent, ast.ClassDef):
                continue
            abstract = {
                item.name
                for owner in self.sources.mro(module, parent)
                for item in owner.body
                if isinstance(item, Function) and "abstractmethod" in map(ast.unparse, item.decorator_list)
            }
            ours = {item.name: item for item in node.body if isinstance(item, Function)}
            concrete = {name for name in abstract if any(
                isinstance(item, Function) and item.name == name and "abstractmethod" not in map(ast.unparse, item.decorator_list)
                for owner in self.sources.mro(module, parent) for item in owner.body)}
            for name in abstract - concrete - ours.keys():
                self.say(file, node, f"{node.name} lacks {parent.name}.{name}")
            for name, function in ours.items():
                theirs = self.sources.member(module, parent, name)
                self.looked += 1
                if isinstance(theirs, Function) and name != "__init__":
                    want, got = parameters(theirs), parameters(function)
                    known = got[0] if len(got[0]) <= len(want[0]) else got[0][: max(len(want[0]), required(function))]
                    if want[0] != known and not got[1] and not got[2]:
                        self.say(file, function, f"{node.name}.{name} takes {got[0]}, {parent.name}'s {want[0]}")

    def construction(self, file: Path, call: ast.Call, names: dict) -> None:
        """Keyword and positional arguments of a call of a class or function of vLLM."""
        module, node = names.get(getattr(call.func, "id", ""), ("", None))
        if not isinstance(node, ast.ClassDef | Function) or any(isinstance(arg, ast.Starred) for arg in call.args):
            return
        accepted, any_named = [], isinstance(node, ast.ClassDef) and "Enum" in "".join(map(ast.unparse, node.bases))
        if isinstance(node, Function):
            accepted, any_named = [arg.arg for arg in node.args.args], bool(node.args.kwarg)
        elif isinstance(init := self.sources.member(module, node, "__init__"), Function):
            accepted, _, any_named = parameters(init)
        else:
            owners = reversed(list(self.sources.mro(module, node)))
            accepted = [item.target.id for owner in owners for item in owner.body if isinstance(item, ast.AnnAssign)]
        self.looked += 1
        unknown = {item.arg for item in call.keywords if item.arg} - set(accepted)
        if not any_named and (unknown or len(call.args) > len(accepted)):
            self.say(file, call, f"{ast.unparse(call.func)} takes {accepted}")

    def attributes(self, file: Path, function: Function, names: dict) -> None:
        known = {}
        for arg in [*function.args.args, *function.args.kwonlyargs]:
            found = self.annotated(arg.annotation, names)
            if found:
                known[arg.arg] = found
        for node in ast.walk(function):  # what it really is tells an isinstance
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                known.pop(getattr(node.args[0], "id", ""), None)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name | ast.Tuple):
                pairs = [(node.targets[0], node.value)]
                if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
                for target, value in pairs:
                    if isinstance(target, ast.Name) and (found := self.follow(file, value, known)):
                        known[target.id] = found
            elif isinstance(node, ast.Attribute):
                self.follow(file, node, known)

    def annotated(self, annotation: ast.expr | None, names: dict) -> tuple[str, ast.ClassDef] | None:
        """The class of vLLM that an annotation names, the first of `X | None`."""
        text = ast.unparse(annotation).strip("'\"") if annotation else ""
        for name in ALIASES.findall(text)[:1]:
            module, node = names.get(name, ("", None))
            if isinstance(node, ast.ClassDef):
                return module, node
        return None

    def follow(self, file: Path, node: ast.AST, known: dict) -> tuple[str, ast.ClassDef] | None:
        """The class that an expression like `config.cache_config` has, as far as annotations tell."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        owner = self.follow(file, node.value, known) if isinstance(node, ast.Attribute) else None
        if owner is None:
            return None
        module, kind = owner
        member = self.sources.member(module, kind, node.attr)
        self.looked += 1
        if member is None:
            text = f"{kind.name} has no {node.attr}"
            if not any(problem.endswith(text) for problem in self.problems):
                self.say(file, node, text)
            return None
        annotation = member.annotation if isinstance(member, ast.AnnAssign) else getattr(member, "returns", None)
        for name in [] if annotation is None else ALIASES.findall(ast.unparse(annotation).strip("'\""))[:1]:
            found = self.sources.find(module, name)
            if name not in FOREIGN and found and isinstance(found[1], ast.ClassDef):
                return found
        return None


def check(folder: Path, version: tuple[int, int]) -> Check:
    done = Check(folder, version)
    done.run()
    return done


if __name__ == "__main__":
    result = check(Path(sys.argv[1]), tuple(int(part) for part in sys.argv[2].split(".")[:2]))
    print("\n".join([*result.problems, f"{result.looked} things looked up, {len(result.problems)} do not fit"]))
    sys.exit(1 if result.problems else 0)

"""Which module takes the result of which other module in a model, where that can be known without inputs."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch.fx import Node, Proxy, Tracer
from torch.nn import Module

# Ways to the submodules of a module other than by their names.
_ENUMERATION = {
    "__dict__",
    "_modules",
    "children",
    "get_submodule",
    "modules",
    "named_children",
    "named_modules",
}
_REFLECTION = {"eval", "exec", "getattr", "super", "vars"}
# What tells a symbolic input from a tensor: a trace takes the way that no tensor does.
_INSPECTION = {"hasattr", "is_tensor", "isinstance", "type"}


def has_hooks(module: Module) -> bool:
    """Whether anything watches or changes the module's calls or their gradients."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def is_plain(module: Module) -> bool:
    """Whether a call and its backward run what the module's class defines and nothing else."""
    return not has_hooks(module) and "forward" not in module.__dict__


class _LocalTracer(Tracer):
    """Traces one forward; the modules that it calls are not entered."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True


class Dataflow:
    """The calls between the modules of a model, the forward of each traced by itself with :mod:`torch.fx`.

    They run with symbolic inputs on a copy that shares the parameters: the model stays as it is.

    A forward that cannot be traced, such as one with a branch on its input or with optional arguments, may still be
    known by its source to use a submodule only in calls ``self.name(...)``, so that what is called within is not
    touched from outside.
    """

    def __init__(self, model: Module) -> None:
        shared: dict[int, Any] = {id(p): p for p in model.parameters()}
        self._modules = dict(copy.deepcopy(model, shared).named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._parents: dict[Module, list[tuple[Module, str]]] = defaultdict(list)
        self._calls: dict[Module, list[tuple[Module, Node]]] = defaultdict(list)
        self._known: set[Module] = set()
        self._kept: set[Node] = set()  # results that a forward stores in its module
        # Modules that are held in other ways as well, such as a list: calls by these are not told apart.
        self._held = {m for module in self._names for m in _inside(_attributes(module), Module)}
        for module in self._names:
            for name, child in module._modules.items():
                if child is not None:
                    self._parents[child].append((module, name))
            if module._modules and self._trace(module):
                self._known.add(module)

    def successor(self, name: str) -> str | None:
        """The module that takes the result of the module ``name``, if no other does and both have one call.

        None also where the calls are not known: see :meth:`obstacles`.
        """
        call = self._only_call(self._modules[name])
        # With keywords the module computes more than its class says, such as a residual connection.
        if call is None or len(call[1].users) != 1 or call[1].kwargs or call[1] in self._kept:
            return None
        owner, node = call
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            return None
        following = owner.get_submodule(str(user.target))
        return None if self._only_call(following) is None else self._names[following]

    def obstacles(self, name: str) -> list[str]:
        """Classes of the modules because of which it is not known who calls the module ``name``."""
        return [type(m).__name__ for m in self._obstacles(self._modules[name])]

    def _only_call(self, module: Module) -> tuple[Module, Node] | None:
        calls = self._calls[module]
        known = len(calls) == 1 and module not in self._held and not self._obstacles(module)
        return calls[0] if known else None

    def _obstacles(self, module: Module) -> list[Module]:
        found: dict[Module, None] = {}
        below, seen = [module], {module}
        while below:
            child = below.pop()
            for parent, name in self._parents[child]:
                # A direct parent's calls must be known, of those above only that they leave the parent whole.
                if parent not in self._known and (child is module or not _only_calls(parent, name)):
                    found[parent] = None
                if parent not in seen:
                    seen.add(parent)
                    below.append(parent)
        return list(found)

    def _trace(self, module: Module) -> bool:
        """Records the calls that ``module`` makes; False if they are not known."""
        forward = getattr(type(module), "forward", None)
        if forward is None or "forward" in module.__dict__:
            return False
        if forward is Module.forward:
            return True  # a ModuleList or ModuleDict: its modules are called by those that hold it
        try:
            arguments = inspect.signature(forward).parameters.values()
            if any(a.default is not a.empty or a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
                return False
            if _inspects(type(module)):
                return False
            graph = _LocalTracer().trace(module)
        except Exception:  # whatever a forward raises that is not made for symbolic inputs
            return False
        self._kept.update(proxy.node for proxy in _inside(_attributes(module), Proxy))
        for node in graph.nodes:
            for used in _used(module, node):
                self._calls[used].append((module, node))
        return True


def _used(module: Module, node: Node) -> list[Module]:
    """The modules that a node of ``module`` calls, or uses in another way, after which no call is the only one."""
    target = str(node.target)
    if node.op == "call_module":
        return [module.get_submodule(target)]
    if node.op != "get_attr":
        return []
    parent, _, name = target.rpartition(".")
    owner = module.get_submodule(parent)
    handed = owner._modules.get(name)
    if handed is not None:
        return list(handed.modules())  # the one that takes it may call any of them
    return [owner] if parent else []  # a parameter or buffer, of a submodule or its own


def _attributes(module: Module) -> list[Any]:
    """What ``module`` holds besides its submodules, parameters, buffers and hooks."""
    own = {"_modules", "_parameters", "_buffers"}
    return [value for name, value in module.__dict__.items() if name not in own and not name.endswith("_hooks")]


def _inside(value: Any, kind: type, depth: int = 4) -> Iterator[Any]:
    """Objects of ``kind`` in containers and partial calls."""
    if isinstance(value, kind):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict, functools.partial)):
        if isinstance(value, functools.partial):
            value = [value.func, *value.args, *value.keywords.values()]
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item, kind, depth - 1)


def _methods(of: type[Module]) -> Iterator[FunctionType]:
    """The forward of this class, and the methods and properties of its own that these use by name."""
    classes = of.__mro__[: of.__mro__.index(Module)]
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for definer in classes:
            method = definer.__dict__.get(name)
            method = method.fget if isinstance(method, property) else method
            if inspect.isfunction(method):
                yield method
                used = _used_names(method.__code__)
                names += sorted(used - seen)
                seen |= used
                if "super" not in used:
                    break


def _used_names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if inspect.iscode(constant))
    return set(code.co_names).union(*map(_used_names, inner))


def _inspects(of: type[Module]) -> bool:
    """Whether the forward of this class, or a method that it uses, asks what an object is."""
    return any(_INSPECTION & _used_names(method.__code__) for method in _methods(of))


def _only_calls(module: Module, name: str) -> bool:
    """Whether the source of ``module``'s forward, and of the methods it uses, has the child only in self.name(...)."""
    if "forward" in module.__dict__ or not inspect.isfunction(inspect.getattr_static(type(module), "forward")):
        return False
    for method in _methods(type(module)):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            return False
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
            return False
        own = definition.args.args[0].arg
        nodes = list(ast.walk(tree))
        harmless = {use for node in nodes for use in _harmless(node)}
        owners = {node.value for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Name) and (node.id in _REFLECTION or (node.id == own and node not in owners)):
                return False
            if isinstance(node, ast.Attribute):
                if node.attr in _ENUMERATION or (node.attr == name and node not in harmless):
                    return False
                if isinstance(module.__dict__.get(node.attr), (list, tuple, dict, set)):
                    return False  # may hold modules
    return True


def _harmless(node: ast.AST) -> list[ast.expr]:
    """What ``node`` calls, compares, or asks for its type."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if not isinstance(node, ast.Call):
        return []
    asks = isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type")
    return [node.func, *(node.args if asks else ())]

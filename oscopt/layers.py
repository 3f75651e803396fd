"""Which parameter belongs to which layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

Layers = str | Mapping | Callable[[str], str | None]
"""The forms of the argument `layers`; see :class:`oscopt.OscGD`."""

ROOT = "(root)"
"""Name of the layer of parameters that the outermost module owns itself."""


def assign(
    names: Sequence[str], layers: Layers, *, named: bool = True, whole: bool = True
) -> list[str | None]:
    """The layer of each parameter, None: updated but not measured.

    Args:
        names: the parameters' names.
        layers: "module", "parameter", a dict (parameter -> layer, or layer -> list of parameters), or a
            callable parameter -> layer.
        named: whether the names are the user's; if not, "module" means "parameter".
        whole: whether they are all that there are; if not, `layers` may know of others.

    Raises:
        TypeError: `layers` is none of these, or a layer's name is not a string.
        ValueError: a layer has no parameter, or a parameter has none, two, or does not exist.
    """
    if isinstance(layers, str):
        if layers == "parameter" or (layers == "module" and not named):
            return list(names)
        if layers == "module":
            return [name.rpartition(".")[0] or ROOT for name in names]
        raise ValueError(f"Invalid layers: {layers!r}; use 'module', 'parameter', a dict or a callable")
    if isinstance(layers, Mapping):
        mapping = _parameter_to_layer(layers)
        if missing := [name for name in names if name not in mapping]:
            raise ValueError(
                f"layers gives no layer for {some(missing)}; add them, or map them to None to leave them out"
            )
        if whole and (unknown := [name for name in mapping if name not in set(names)]):
            raise ValueError(f"layers names parameters that do not exist: {some(unknown)}")
        assigned = [mapping[name] for name in names]
    elif callable(layers):
        assigned = [layers(name) for name in names]
    else:
        raise TypeError(
            f"layers must be 'module', 'parameter', a dict or a callable, not {type(layers).__name__}"
        )
    for name, layer in zip(names, assigned, strict=True):
        if layer is not None and not isinstance(layer, str):
            raise TypeError(f"layers maps {name!r} to {layer!r}; a layer's name is a string, or None")
    return assigned


def _parameter_to_layer(layers: Mapping) -> dict[str, str | None]:
    if all(value is None or isinstance(value, str) for value in layers.values()):
        return dict(layers)
    mapping: dict[str, str | None] = {}
    for layer, members in layers.items():
        if members is None or isinstance(members, str) or not isinstance(members, Sequence):
            raise TypeError(f"layers maps {layer!r} to {members!r}; give a list of parameter names")
        if not members:
            raise ValueError(f"layers gives layer {layer!r} no parameter; drop it, or name its parameters")
        for name in members:
            if name in mapping:
                raise ValueError(
                    f"layers puts {name!r} into both {mapping[name]!r} and {layer!r}; choose one"
                )
            mapping[name] = layer
    return mapping


def some(names: Sequence[str]) -> str:
    """The first three of `names`, and how many more there are."""
    text = ", ".join(map(repr, names[:3]))
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text


def members(pairs: Iterable[tuple[str | None, Tensor]]) -> dict[str, set[int]]:
    """Which parameters each layer has, by `id`; `pairs` are layers and parameters that have memory or not."""
    found: dict[str, set[int]] = {}
    for layer, p in pairs:
        if layer is not None and not is_lazy(p):
            found.setdefault(layer, set()).add(id(p))
    return found


class Listing:
    """The parameters that an optimizer's groups list, as they do now: by hand they may be changed anytime.

    Args:
        groups: the optimizer's `param_groups`.

    Attributes:
        params: those that have memory, in the order of the groups; one may be listed twice.
        groups: the number of each one's group.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        lists = [list(group["params"]) for group in groups]
        self._sizes = list(map(len, lists))
        self._listed = list(chain.from_iterable(lists))
        self._lazy = [p for p in self._listed if is_lazy(p)]
        pairs = [(p, i) for i, params in enumerate(lists) for p in params if not is_lazy(p)]
        self.params: list[Tensor] = [p for p, _ in pairs]
        self.groups: list[int] = [i for _, i in pairs]

    def holds(self, groups: Iterable[Mapping[str, Any]]) -> bool:
        """Whether it is what `groups` list."""
        lists = [group["params"] for group in groups]
        return (
            list(map(len, lists)) == self._sizes
            and all(map(is_, chain.from_iterable(lists), self._listed))
            and all(map(is_lazy, self._lazy))
        )


def follow(groups: Iterable[Mapping[str, Any]], known: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """The names of all parameters that `groups` list now, in their order.

    Those that are `known` keep their names. Another one has the name that stands at its place in the group's
    `param_names`, if the parameter that was called so is gone; else "param" and a number.
    """
    places = [
        (p, (group.get("param_names") or ())[i : i + 1])
        for group in groups
        for i, p in enumerate(group["params"])
    ]
    names = {p: known[p] for p, _ in places if p in known}
    used = set(names.values())
    numbered = (f"param{n}" for n in count())
    for p, name in places:
        if p not in names:
            free = [x for x in name if x not in used] or [next(x for x in numbered if x not in used)]
            names[p] = free[0]
            used.add(free[0])
    return {p: names[p] for p, _ in places}

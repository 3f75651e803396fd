"""Which parameter belongs to which layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Layers = str | Mapping | Callable[[str], str | None]
"""The forms of the argument `layers`; see :class:`oscopt.OscGD`."""

ROOT = "(root)"
"""Name of the layer of parameters that the outermost module owns itself."""


def assign(names: Sequence[str], layers: Layers, *, named: bool = True) -> list[str | None]:
    """The layer of each parameter, None: updated but not measured.

    Args:
        names: the parameters' names.
        layers: "module", "parameter", a dict (parameter -> layer, or layer -> list of parameters), or a
            callable parameter -> layer.
        named: whether the names are the user's; if not, "module" means "parameter".

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
                f"layers gives no layer for {_some(missing)}; add them, or map them to None to leave them out"
            )
        if unknown := [name for name in mapping if name not in set(names)]:
            raise ValueError(f"layers names parameters that do not exist: {_some(unknown)}")
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


def _some(names: Sequence[str]) -> str:
    text = ", ".join(map(repr, names[:3]))
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text

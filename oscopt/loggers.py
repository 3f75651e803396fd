"""Live logging: what is new in a record, as named numbers, to TensorBoard, Weights & Biases or anything else.

Call these functions now and then, say every hundred steps: they wait for the device, steps do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import plot
from .history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def new_scalars(
    history: History, prefix: str = "oscopt", layers: bool = True
) -> Iterator[tuple[int, dict[str, float]]]:
    """The number of each step since the last call, and its correlations by name.

    Args:
        history: an optimizer's or a monitor's; it is drained.
        prefix: of the names: `prefix/correlation` for all layers together, `prefix/correlation/LAYER`.
        layers: whether single layers are included.

    NaNs are left out, and so are steps that have nothing else.
    """
    new = history.drain()
    everything, single = new.global_correlation(), new.correlation()
    for row, step in enumerate(new.steps):
        values = {f"{prefix}/correlation": float(everything[row])}
        if layers:
            values |= {
                f"{prefix}/correlation/{n}": float(single[row, i]) for i, n in enumerate(new.layer_names)
            }
        if values := {name: value for name, value in values.items() if not math.isnan(value)}:
            yield int(step), values


def layers_picture(history: History) -> Figure:
    """The correlation of every layer at every step, as :func:`oscopt.plot.plot_heatmap`, without pyplot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    plot.plot_heatmap(history, ax=figure.subplots())
    return figure


def log_picture(target: Any, history: History, name: str = "oscopt/layers") -> bool:
    """Add :func:`layers_picture` to a ``SummaryWriter`` or a run of Weights & Biases; False if it is neither.

    An empty history adds nothing.
    """
    tensorboard = hasattr(target, "add_figure")
    if not tensorboard and not type(target).__module__.startswith("wandb"):
        return False
    if len(history):
        figure = layers_picture(history)
        if tensorboard:
            target.add_figure(name, figure, int(history.steps[-1]))
        else:
            import wandb

            target.log({name: wandb.Image(figure)})
    return True


def log_to_tensorboard(
    writer: SummaryWriter,
    history: History,
    prefix: str = "oscopt",
    layers: bool = True,
    picture: bool = False,
) -> None:
    """Add what is new to a ``torch.utils.tensorboard.SummaryWriter``; see :func:`new_scalars`.

    Args:
        picture: whether :func:`layers_picture` of the whole record is added as well, as `prefix/layers`.
    """
    for step, values in new_scalars(history, prefix, layers):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    if picture:
        log_picture(writer, history, f"{prefix}/layers")


def log_to_wandb(
    run: Any, history: History, prefix: str = "oscopt", layers: bool = True, picture: bool = False
) -> None:
    """Log what is new to a run of Weights & Biases (what ``wandb.init`` returns); see :func:`new_scalars`.

    Numbers are plotted against `prefix/step`, the optimizer's own count, as the run may count differently.

    Args:
        picture: as in :func:`log_to_tensorboard`.
    """
    run.define_metric(f"{prefix}/step", hidden=True)
    run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
    for step, values in new_scalars(history, prefix, layers):
        run.log(values | {f"{prefix}/step": step})
    if picture:
        log_picture(run, history, f"{prefix}/layers")

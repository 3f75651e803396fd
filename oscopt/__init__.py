"""Measure how the gradients of adjacent training steps correlate, layer by layer, at almost no cost."""

from .history import History
from .monitor import OscMonitor
from .optimizer import OscGD
from .reference import OscGDReference
from .window import Window

__version__ = "0.1.0"
__all__ = ["History", "OscGD", "OscGDReference", "OscMonitor", "Window", "__version__"]

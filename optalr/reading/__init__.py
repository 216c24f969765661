"""Reading an optimizer state of any nesting, and watching what the optimizer does."""

from optalr.reading.geometry import geodesic, noise_spectrum
from optalr.reading.metrics import metrics, state_bytes
from optalr.reading.monitoring import monitor
from optalr.reading.resuming import configuration, warn_if_changed
from optalr.reading.shardings import state_shardings
from optalr.reading.spectra import factor_spectra
from optalr.reading.upgrading import upgrade_state
from optalr.reading.wanted import wants_signals

__all__ = [
    "configuration",
    "factor_spectra",
    "geodesic",
    "metrics",
    "monitor",
    "noise_spectrum",
    "state_bytes",
    "state_shardings",
    "upgrade_state",
    "wants_signals",
    "warn_if_changed",
]

"""What a run is: the settings, seed and data that decide its results, and what decides its bits.

Checkpoints carry it whole, and rows its short name. So what belongs to another run is noticed, and
the differences have names.
"""

import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import optalr
from optalr.experiments.configs.config import Config, to_table
from optalr.experiments.data.dataset import Dataset
from optalr.experiments.errors import ExperimentError, warnings_log
from optalr.experiments.processes import Team

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# Where the data were found says nothing that their checksum does not say.
_PLACES = ("folder", "download")


class Identity(NamedTuple):
    """What decides a run.

    Attributes:
      settings: what decides its results: path of a setting to its value, checksum of the data.
      arithmetic: what decides the last bits: versions of packages, flags, device.
    """

    settings: Mapping[str, str]
    arithmetic: Mapping[str, str]

    @property
    def name(self) -> str:
        """A short name, which runs share only if they have the same settings."""
        text = json.dumps(dict(self.settings), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def check_same_in(self, team: Team) -> None:
        """Raise in all processes of a team if they would train different runs."""
        same = {name: self.arithmetic[name] for name in (*_PACKAGES, "code", "x64")}
        lines = [f"{name} = {value}" for name, value in {**self.settings, **same}.items()]
        team.check_same(
            "their run",
            "\n".join(lines),
            remedy="Give all the same config, options, data and environment.",
        )


def identify(config: Config, seed: int, dataset: Dataset, *, processes: int = 1) -> Identity:
    """Return the identity of a run.

    Args:
      config: the experiment; a trainer serves many seeds, so its own is not used.
      seed: the run's.
      dataset: what it learns from.
      processes: how many train it together.
    """
    table = to_table(config)
    parts = {key: table[key] for key in ("model", "method", "schedule", "phase")}
    data = {key: value for key, value in table["data"].items() if key not in _PLACES}
    train = {**table["train"], "seed": seed}
    settings = optalr.configuration(**parts, train=train, data=data, data_digest=dataset.digest)
    numbers = arithmetic()
    if config.mesh.data:  # sums over a batch are cut elsewhere
        numbers["mesh"] = f"data={config.mesh.data}"
    if processes > 1:  # and added up by others
        numbers["processes"] = str(processes)
    return Identity(settings, numbers)


def arithmetic() -> dict[str, str]:
    """Return what decides the last bits of a result."""
    import jax

    return {
        **versions(),
        "code": _code(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "x64": str(jax.dtypes.canonicalize_dtype(float)),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),  # type: ignore
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": _processor(),
        # XLA cuts sums on a CPU into as many parts.
        "cores": str(os.cpu_count()),
    }


@functools.cache
def versions() -> Mapping[str, str]:
    """Return the versions of optalr and of what it computes with."""
    found = {"optalr": optalr.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Return what the numbers depend on apart from the config."""
    import jax

    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def check_same(saved: Identity, current: Identity, *, where: Path, force: bool) -> None:
    """Refuse to go on with what another run left; warn of what changes only the last bits.

    Args:
      saved: the identity that a checkpoint carries.
      current: that of the run.
      where: the checkpoint, for messages.
      force: go on where settings differ as well, with a warning.

    Raises:
      ExperimentError: settings differ, and ``force`` is false.

    Warns:
      ConfigurationChangedWarning: settings differ, and ``force`` is true.
    """
    changes = _differences(saved.settings, current.settings)
    if changes and not force:
        raise ExperimentError(
            f"{where} is of a run with other settings: {'; '.join(changes)}. Results would be "
            "those of neither: undo the change, start a new run with --out, or go on all the same "
            "with --force."
        )
    if changes:
        optalr.warn_if_changed(saved.settings, current.settings)
    bits = _differences(saved.arithmetic, current.arithmetic)
    if bits:
        warnings_log.warning(
            "%s was computed otherwise, so the last bits will differ from those of a run in one "
            "go: %s.",
            where,
            "; ".join(bits),
        )


def _differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    names = [*saved, *(name for name in current if name not in saved)]
    return [
        f"{name}: {saved.get(name, '(absent)')} -> {current.get(name, '(absent)')}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def from_json(table: Mapping[str, Any]) -> Identity:
    """Return the identity that ``Identity._asdict`` made a table of."""
    return Identity(dict(table["settings"]), dict(table["arithmetic"]))


@functools.cache
def _code() -> str:
    """Return a checksum of the package's own source, which versions alone do not tell apart."""
    root = Path(optalr.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _processor() -> str:
    """Return the processor's name: XLA compiles for what it finds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())

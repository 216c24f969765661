"""The commands that train nothing: those that show, draw, export or prepare."""

from pathlib import Path

import tyro

Place = tyro.conf.Positional[Path]

# As in ``cli.py``, what is slow to import is imported by the command that needs it.


def plot(
    folder: Place,
    /,
    *,
    configs: tuple[str, ...] = (),
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Draw the curves of a run again, or write the report of a comparison from its finished runs.

    Args:
      folder: what `optalr run` or `optalr compare` made.
      configs: draw only the losses of these configs of a comparison, over seconds and over steps
        (over epochs, if some train on full batches and others on mini-batches).
      out: the picture of those configs; by default FOLDER/selection.png.
      force: overwrite what --out names.
    """
    from optalr.experiments import tools

    tools.plot_folder(folder, configs=configs, out=out, force=force)


def export(folder: Place, /, *, tensorboard: bool = False) -> None:
    """Write a run's metrics as CSV, and as TensorBoard events if wanted.

    Args:
      folder: what `optalr run` made.
      tensorboard: write events into FOLDER/tensorboard as well.
    """
    from optalr.experiments import tools

    tools.export_run(folder, tensorboard=tensorboard)


def list_names(name: tyro.conf.Positional[str] = "", /) -> None:
    """List the names that data, model, method, schedule and phase can take, or the options of one.

    Args:
      name: a name, such as adam, whose options to list; without it, all names.
    """
    from optalr.experiments import tools

    if name:
        tools.print_options(name)
    else:
        tools.print_names()


def init(path: Place = Path("experiment.toml"), /, *, example: str = "") -> None:
    """Write a config to start from: every key, with its meaning and its default.

    Args:
      path: the file to be.
      example: write one of the configs that optalr ships instead: adam, amsgrad, momentum, sgd,
        tso_alra or untuned, each with the settings that were best on the digits.
    """
    from optalr.experiments import tools

    tools.write_config(path, example=example)


def watch(folder: Place, /, *, every: float = 1.0, once: bool = False) -> None:
    """Show how far a run, or each run of a comparison, has come, until all are finished.

    Args:
      folder: what `optalr run` or `optalr compare` made, or is at work on.
      every: seconds between looks.
      once: look once only.
    """
    from optalr.experiments.reports import watching

    watching.watch(folder, every=every, once=once)


def show_schema() -> None:
    """Print the JSON schema of configs, with which editors check and complete them."""
    from optalr.experiments import tools

    tools.print_schema()

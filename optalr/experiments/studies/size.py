"""How much a study is, known before anything of it is built."""

from optalr.experiments.errors import ExperimentError

# The most runs that a study may have: at a second each, a day.
_MOST = 86_400
_YEAR = 365.25 * 24 * 3600
_LARGEST_SEED = 2**32 - 1


def refuse_endless(count: int, what: str) -> None:
    """Raise where a study has more runs than anyone would wait for.

    Args:
      count: how many.
      what: what they are, in the plural.

    Raises:
      ExperimentError: more than a day would pass if each took a second.
    """
    if count > _MOST:
        years = count / _YEAR
        time = f"{years:.1f} years" if years >= 1 else f"{365.25 * years:.1f} days"
        raise ExperimentError(
            f"{count} {what} would take {time} at a second each: lower --seeds, or give the keys "
            f"of [tune] fewer values, to at most {_MOST}."
        )


def check_seeds(first: int, number: int) -> None:
    """Raise where ``number`` seeds from ``first`` on are none, or go beyond 32 bits.

    Raises:
      ExperimentError: they are or do.
    """
    if number < 1:
        raise ExperimentError(f"--seeds must be at least 1, got {number}.")
    refuse_endless(number, "seeds")
    if first + number - 1 > _LARGEST_SEED:
        raise ExperimentError(
            f"{number} seeds from {first} on go beyond {_LARGEST_SEED}: lower train.seed."
        )

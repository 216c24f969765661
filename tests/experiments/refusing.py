"""Commands that are refused."""

import pytest

from optalr.experiments import cli, endings


def fails(capsys, *arguments):
    """Run a command that is refused with the code of a mistake; return its one line."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == endings.EXIT_MISTAKE
    assert captured.err.startswith("optalr: error: ")
    assert captured.err.count("\n") == 1
    return captured.err

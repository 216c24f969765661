"""``python -m optalr``: the command line."""

from optalr.experiments.cli import main

if __name__ == "__main__":
    main()

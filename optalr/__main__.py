"""``python -m optalr``: the command line."""

from optalr_command import main

if __name__ == "__main__":
    main()

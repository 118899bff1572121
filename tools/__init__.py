"""Programs for people: `python -m tools.NAME --help`."""

"""The generator is run by hand and needs oracles that the tests do not: pytest must not import it."""

collect_ignore = ["make_golden.py"]

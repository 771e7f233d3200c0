"""Measurements that the documentation quotes: ``python scripts/research COMMAND [options]``."""

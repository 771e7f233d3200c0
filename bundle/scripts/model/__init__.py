"""The network, its losses, and the checkpoint that travels with its specification."""

"""Python side of the bundle, imported as ``scripts`` with the bundle's root on ``sys.path``."""

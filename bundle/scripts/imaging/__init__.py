"""Scans: reading them, their geometry, the box around head and neck, quality control, transforms."""

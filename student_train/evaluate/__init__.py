"""Measure an exported student as any user would load it. Importing this package costs nothing."""

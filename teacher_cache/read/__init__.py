"""Stores to decoded batches of targets."""

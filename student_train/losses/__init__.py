"""Losses as pure functions of what the student computed and what the cache holds: no settings, no parameters."""

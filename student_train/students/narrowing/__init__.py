"""Narrower students that start from the teacher: its layers sliced to another width and fitted to what it computes."""

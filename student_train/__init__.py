"""Train students from a teacher cache, with DeepSpeed and without the teacher in memory, and measure them.

Importing this package costs nothing: torch and deepspeed are imported by the modules that need them.
"""

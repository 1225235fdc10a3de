"""Every error that a user can cause or mend, one class per thing to mend.

A message says what happened, the offending value, why it matters and what to do. The command line prints it without a
traceback and exits with code 1; anything that is not a `DistillationError` is a defect of ours and keeps its traceback.
"""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class DistillationError(Exception):
    """Base of everything the user can fix."""


class SettingsError(DistillationError):
    """A flag, a configuration file or a combination of them asks for something that cannot be."""


class TeacherError(DistillationError):
    """The teacher cannot be loaded, or cannot give what is asked of it."""


class CorpusError(DistillationError):
    """The text cannot be read, or there is none."""


class SourceError(DistillationError):
    """What is to be imported cannot be read, or is not what its shape says."""


class StoreError(DistillationError):
    """The cache is missing, unfinished, damaged, of another format or built with other settings."""


class DamagedStoreError(StoreError):
    """Bytes of a cache are missing or not what was written."""


class TargetsError(DistillationError):
    """The cache is fine but does not hold the targets that were asked for."""


class StudentError(DistillationError):
    """The student cannot be built, loaded, initialised or evaluated as asked."""


class TaskError(DistillationError):
    """The examples of a task cannot be read, or are none of that task."""


class TrainingError(DistillationError):
    """Training cannot start, continue or resume."""


class DeviceMemoryError(DistillationError):
    """What is to be computed takes more memory than the GPU has."""


class SpaceError(DistillationError):
    """The disk is full."""

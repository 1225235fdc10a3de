"""What goes wrong where models or datasets come from the Hugging Face hub or from folders in its form.

Its libraries hand on what their HTTP library raises, which is no OSError where a proxy refuses or a connection breaks.
"""

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from teacher_cache.errors import first_line

# RuntimeError: datasets that still come as a loading script
HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)


def why_unreadable(error: BaseException) -> str:
    """The first line of what Transformers says, or why a model with Python code of its own is not loaded.

    Transformers would offer to run that code, and name an argument that nobody can give here.
    """
    if "trust_remote_code" in str(error):
        return (
            "it names Python code of its own to be run ('auto_map' in its configuration), which is never done here: "
            "give a model of a family that Transformers knows, saved without that code"
        )
    return first_line(error)

"""What goes wrong where models or datasets come from the Hugging Face hub.

Its libraries hand on what their HTTP library raises, which is no OSError where a proxy refuses or a connection breaks.
"""

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

# RuntimeError: datasets that still come as a loading script
HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)

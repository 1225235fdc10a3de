"""An export on the Hugging Face hub: a repository of its own, uploaded in one commit.

Whether there is a token is asked before anything is made. What goes wrong later leaves the folder as it is, and says by
which command it is uploaded again.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token

from teacher_cache.errors import SettingsError, first_line
from teacher_cache.hub import HUB_ERRORS


def check_token(name: str) -> None:
    """Refuse to begin what could not be uploaded.

    Raises:
        SettingsError: nobody is logged in.
    """
    if get_token() is None:
        raise SettingsError(
            f"--push-to-hub {name!r} needs a token of the hub that may write, and there is none: log in with `hf auth "
            "login`, or set HF_TOKEN; or leave --push-to-hub out, and upload the folder later with `hf upload`"
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload the folder; returns the address of the repository.

    Raises:
        SettingsError: the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a student exported by kdcache"
        )
    except HUB_ERRORS as error:
        again = shlex.join(["hf", "upload", name, str(folder)])
        raise SettingsError(
            f"--push-to-hub {name!r}: the hub took it not ({first_line(error)}); the export itself is complete in "
            f"{str(folder)!r}. Check the network, the name and what the token may do, and upload it with `{again}`"
        ) from error
    return str(repository)

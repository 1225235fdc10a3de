"""Credentials of a profile in `~/.aws`, which AWS_PROFILE names: boto3 reads it, with all that a profile may say.

Roles, single sign-on and programs that give credentials are boto3's; it renews what ends. Its region counts where
AWS_REGION is not set. Credentials in the environment go before a profile, as with Amazon's own commands.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from teacher_cache.errors import SettingsError, StoreError

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider


def profile_credentials(location: str) -> Boto3CredentialProvider | None:
    """What gives the credentials of the profile; None where none is named, or the environment has credentials.

    Raises:
        SettingsError: boto3 is not installed.
        StoreError: there is no such profile, or it has no credentials.
    """
    name = os.environ.get("AWS_PROFILE")
    if not name or os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as missing:
        raise SettingsError(
            f"AWS_PROFILE is {name!r}, and profiles are read by boto3, which is not installed: pip install "
            "'kdcache[aws]', or unset it and give credentials as variables"
        ) from missing
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=name))
    except (BotoCoreError, ValueError) as error:
        raise StoreError(
            f"no credentials for {location!r}: AWS_PROFILE is {name!r}, and that profile gives none ({error}); name "
            "one that `aws configure list-profiles` lists and that has credentials"
        ) from error

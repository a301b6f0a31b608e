"""Uploading a converted checkpoint to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mla_converters.errors import ConversionError


def check_push(repo: str) -> None:
    """Refuse, before any work, what :func:`push` would refuse after it.

    Args:
        repo: ``ORG/NAME``, which must not exist yet.

    Raises:
        ConversionError: no such name, no login, no hub, no rights, or the repository exists.
    """
    owner, separator, _ = repo.partition("/")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub is {repo!r}, which cannot be a name on the hub: {error}") from error
    if not separator:
        raise ConversionError(f"--push-to-hub is {repo!r}, but must be ORG/NAME.")
    api = HfApi()
    with _explained(repo):
        user = api.whoami()
        exists = api.repo_exists(repo)
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if owner not in owners:
        raise ConversionError(
            f"--push-to-hub is {repo!r}, but this login is of {user['name']}, who can write to: {', '.join(owners)}."
        )
    if exists:
        raise ConversionError(f"--push-to-hub is {repo!r}, which exists on the hub already: choose another name.")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Create a repository and upload a folder to it.

    Args:
        folder: the checkpoint.
        repo: ``ORG/NAME``.
        private: whether only its owners see it.

    Returns:
        The repository's address.

    Raises:
        ConversionError: the hub refuses, or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        with _explained(repo):
            url = api.create_repo(repo, private=private)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Convert to Multi-head Latent Attention")
    except ConversionError as error:
        raise ConversionError(
            f"{error} The conversion is complete in {folder}; upload it with: hf upload {repo} {folder}"
        ) from error
    return str(url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what can go wrong on the way to the hub into one sentence."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ConversionError("--push-to-hub needs a login: run hf auth login, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise ConversionError("--push-to-hub needs the hub, which HF_HUB_OFFLINE switches off: unset it.") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        if error.response.status_code == 403:
            reason = f"this login may not write there ({reason})"
        raise ConversionError(f"The hub refuses --push-to-hub {repo}: {reason}") from error
    except Exception as error:  # the HTTP client and the upload protocols below it raise types of their own
        raise ConversionError(f"--push-to-hub cannot reach the hub: {error}") from error

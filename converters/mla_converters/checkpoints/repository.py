"""Fetching what a conversion or a plan needs of a repository on the hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from mla_converters.checkpoints.kinds import files_below, refuse_no_checkpoint
from mla_converters.checkpoints.locate import not_on_the_hub
from mla_converters.checkpoints.side_files import DESCRIPTIONS, hub_patterns


def fetch_checkpoint(repo: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder, in the hub's cache, with all that is converted or carried over.

    Args:
        repo: its id.
        revision: branch, tag or commit.
        trust_remote_code: whether Python files are fetched too.

    Raises:
        ConversionError: it cannot be fetched, or is no checkpoint.
    """
    return _fetch(repo, revision, *hub_patterns(trust_remote_code))


def fetch_config(repo: str, revision: str | None) -> Path:
    """The ``config.json``; beside it other files that say what the model is.

    Raises:
        ConversionError: it cannot be fetched, or the repository is no checkpoint.
    """
    return _fetch(repo, revision, list(DESCRIPTIONS), []) / "config.json"


def _fetch(repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise not_on_the_hub(repo, error) from error
    if not (folder / "config.json").exists():
        try:
            files = HfApi().list_repo_files(repo, revision=revision)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            files = files_below(folder)
        refuse_no_checkpoint(folder, repo, files)
    return folder

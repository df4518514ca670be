"""The upload of a run's student to the Hugging Face Hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from topd.errors import TOPDError

# of upload_folder, what a trainer says itself
_OURS = "self repo_id folder_path repo_type commit_message token revision run_as_future"


def check_upload(folder: Path, name: str | None, options: Mapping[str, Any]) -> None:
    """Whether a student can be uploaded; ``options`` are upload_folder's. Raises TOPDError."""
    known = inspect.signature(HfApi.upload_folder).parameters.keys() - _OURS.split()
    for key in options.keys() - known:
        raise TOPDError(
            f"push_to_hub: {key}: is not an argument here. The model card is written at the end of "
            f"a run (student/README.md); others are {', '.join(sorted(known))}. Leave it out."
        )
    if not (folder / "README.md").exists() or not name:
        raise TOPDError(
            "push_to_hub: uploads student/, which a run has at its end, to hub_model_id. Train "
            "first, and set hub_model_id."
        )


def upload(
    folder: Path, name: str, *, token: str | None, private: bool | None, **options: Any
) -> Any:
    """Make the repository, if need be, and upload a folder to it.

    Args:
        folder: the student's.
        name: of the repository; in the user's own namespace, where it has none.
        token: the user's, if not that of the environment.
        private: whether a repository that is made is private.
        **options: those of huggingface_hub's upload_folder.

    Returns:
        The commit, or its Future.
    """
    api = HfApi(token=token)
    made = api.create_repo(name, private=private, exist_ok=True)
    return api.upload_folder(repo_id=made.repo_id, folder_path=folder, **options)

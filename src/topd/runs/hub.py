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
    """Upload a folder to a repository, made if need be. Returns the commit, or its Future.

    A ``name`` without a namespace is in the user's own; ``token`` is the user's, if not that of the
    environment; a repository that is made may be ``private``. ``options`` are those of
    huggingface_hub's upload_folder.
    """
    api = HfApi(token=token)
    made = api.create_repo(name, private=private, exist_ok=True)
    return api.upload_folder(repo_id=made.repo_id, folder_path=folder, **options)

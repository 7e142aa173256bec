"""Putting an adapter on the Hugging Face hub."""

from pathlib import Path

from rankwise.errors import InputError


def upload(path: Path, repository: str) -> str:
    """Put a folder, or a file, into a model repository, which is made if there is none, and return its address.

    The token is the one that `hf auth login` has kept, or that of HF_TOKEN.

    Raises:
        InputError: the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    errors: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    api, message = HfApi(), "Adapter written by rankwise export"
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        if path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path, commit_message=message)
        else:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name, commit_message=message)
    except errors as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{repository}: the hub refuses it, but {path} is written: {reason}") from None
    return f"{api.endpoint}/{name}"

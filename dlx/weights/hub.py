"""A checkpoint's folder: on this machine, or fetched from huggingface.co once."""

from __future__ import annotations

import re
from pathlib import Path

from dlx.errors import ModelError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # ORG/NAME
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # no pickles and no code
UNWANTED = ("*/*",)  # what lies in subfolders is another format's


def fetched(model: str | Path) -> Path:
    """The folder of a checkpoint; what names no folder here but looks like ORG/NAME is fetched from huggingface.co.

    Configs, tokenizer and safetensors are fetched, into the cache that every Hugging Face tool shares. What is there
    already is not fetched again; with HF_HUB_OFFLINE=1 nothing is.

    Raises ModelError  no such repository, no permission, no network
    """
    folder = Path(model).expanduser()
    if folder.exists() or not REPOSITORY.fullmatch(str(model)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    here = f"{model} is no folder here"
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except GatedRepoError as error:
        raise ModelError(
            f"{here}, and huggingface.co gives it to those who accepted its terms: do so there, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{here}, and huggingface.co has no such repository, or hides it; check the name") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{here}, is not in the cache, and huggingface.co cannot be asked (no network, or HF_HUB_OFFLINE=1); "
            f"where there is a network fetch it with `hf download {model} --local-dir DIR`, and name DIR"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{here}, and it could not be fetched from huggingface.co: {why}; try again") from error

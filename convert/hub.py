"""Tell a folder from a hub id before anything heavy begins: one request, no retries; the cache where there is no network."""

from __future__ import annotations

from pathlib import Path

from utils import UserError

SECONDS = 5


def local_or_hub(name: str, flag: str = "") -> str:
    """What to load a model from: its folder, a hub id that the hub has, or where the hub's cache keeps it.

    What can only be meant as a folder is not asked for at the hub: neither `owner/name` nor `name`, or a path whose
    first folder is there.

    Args:
        name: as the user gave it.
        flag: the option that it came from, for the message.

    Raises:
        UserError: no such folder, the hub has no such model, or it cannot be reached and the cache has none either.
    """
    folder = Path(name).expanduser()
    if not name:
        raise UserError(f"{flag or 'the name of a model'}: is empty; give a folder or a hub id")
    if folder.is_dir():
        return str(folder)
    missing = f"{name}: no such folder" + (f" ({flag})" if flag else "")
    if folder.exists():
        raise UserError(f"{name}: a file; give the model's folder")
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or name.endswith("/") or len(parts) > 2 or Path(parts[0]).is_dir():
        raise UserError(missing)
    return _ask(name, missing)


def _ask(repo_id: str, missing: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(repo_id, timeout=SECONDS)
        return repo_id
    except HFValidationError:
        raise UserError(f"{missing}, and no hub id either") from None
    except RepositoryNotFoundError:
        raise UserError(f"{missing}, and the hub has no such model, or it is private (hf auth login)") from None
    except HfHubHTTPError as error:
        why = f"the hub answered {error.response.status_code}"
    except Exception as error:  # noqa: BLE001  (whatever the hub's client uses for HTTP has errors of its own)
        why = f"the hub cannot be reached ({reason(error)})"
    for file in ("config.json", "adapter_config.json"):
        if isinstance(found := try_to_load_from_cache(repo_id, file), str):
            return str(Path(found).parent)
    raise UserError(f"{missing}, {why} and its cache has no such model")


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its class where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

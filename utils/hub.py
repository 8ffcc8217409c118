"""The Hugging Face hub, or the local cache when the hub is out of reach."""

import functools

import huggingface_hub
from huggingface_hub import constants


@functools.lru_cache(maxsize=1)
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """One request to the hub; without an answer the libraries are switched to their offline mode.

    Left alone they retry every file with growing pauses, and a machine without network waits for minutes before it
    reads "not found". Offline they look into their cache at once.

    Args:
        timeout: seconds.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the exception's type belongs to the HTTP library of the installed version
        import datasets

        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False
    return True

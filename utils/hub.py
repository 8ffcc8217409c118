"""The Hugging Face hub, or the local cache when the hub is out of reach."""

import functools
import sys

import datasets
import huggingface_hub
from huggingface_hub import constants

from utils.distributed import is_main


@functools.lru_cache(maxsize=1)
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Asks the hub once, and once more if there is no answer; then the libraries are switched to their offline mode.

    Left alone they retry every file with growing pauses, and a machine without network waits for minutes before it
    reads "not found". Offline they look into their cache at once. Rank 0 says so on stderr. Each of the two requests
    waits for `timeout` seconds.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    for _ in range(2):
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=timeout)
            return True
        except Exception as error:  # its type belongs to the HTTP library of the installed version
            reason = type(error).__name__
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    if is_main():
        print(
            f"{constants.ENDPOINT} does not answer ({reason}): this run reads models and data from the local cache "
            "only; start it again when the hub can be reached",
            file=sys.stderr,
            flush=True,
        )
    return False

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from utils.hub import hub_is_reachable


class Session:
    """A hub that answers, or does not."""

    def __init__(self, answers: bool):
        self.answers = answers
        self.requests = 0

    def head(self, url: str, timeout: float) -> None:
        self.requests += 1
        if not self.answers:
            raise ConnectionError("no network")


@pytest.mark.parametrize("answers", [True, False])
def test_one_request_decides_for_the_process(monkeypatch, answers):
    session = Session(answers)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    hub_is_reachable.cache_clear()
    assert hub_is_reachable() is hub_is_reachable() is answers
    assert session.requests == 1
    # Without an answer the libraries look into their cache at once.
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is not answers
    hub_is_reachable.cache_clear()

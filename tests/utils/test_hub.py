import socket
import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from remax.models.loading import load_config
from utils.hub import hub_is_reachable
from utils.run import UserError
from utils.tokenizer import load_tokenizer


class Session:
    """A hub that gives these answers, one a request."""

    def __init__(self, *answers: bool):
        self.answers = list(answers)

    def head(self, url: str, timeout: float) -> None:
        if not self.answers.pop(0):
            raise ConnectionError("no network")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.mark.parametrize("answers", [[True], [False, True], [False, False]])
def test_at_most_two_requests_decide_for_the_process(monkeypatch, capsys, answers):
    session = Session(*answers)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    reachable = answers[-1]
    assert hub_is_reachable() is hub_is_reachable() is reachable
    assert not session.answers
    # Without an answer the libraries look into their cache at once, and the user is told so.
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is not reachable
    assert capsys.readouterr().err.count("does not answer (ConnectionError)") == (not reachable)


def test_a_hub_that_accepts_and_never_answers_is_left_after_the_two_requests(monkeypatch):
    # Whichever is asked for first: the tokenizer, or the model's configuration.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hub_is_reachable.__wrapped__, "__defaults__", (0.2,))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for load in (load_config, load_tokenizer):
            hub_is_reachable.cache_clear()
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            begin = time.monotonic()
            with pytest.raises(UserError, match="--model: .*nobody/nothing"):
                load("nobody/nothing", "--model")
            assert time.monotonic() - begin < 5 and constants.HF_HUB_OFFLINE


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(False, False))
    assert not hub_is_reachable()
    assert capsys.readouterr().err == ""

"""An answer that can be read while it is written: one token is decoded each time that one is asked for.

`generate` calls back after each token, so it runs in a thread of its own, which waits there for its turn. Of several
streams one decodes at a time, in the order in which they are asked: what is drawn follows from the seed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax.core.sequences import Prompts
from remax.generation.decoder import GenerationSettings
from remax.generation.hugging_face import generate_with

UNFINISHED = "\ufffd"  # what a character is decoded to of which tokens are still to come


class _Stopped(Exception):
    pass


class Stream(Iterator[str]):
    """Pieces of the answer to a prompt, a token's text each, which may be empty.

    Attributes:
        text: The answer so far.
        tokens: How many tokens it has.
        done: Whether that is all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompts,
        settings: GenerationSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        greedy: bool,
    ):
        """Begins with the answer.

        Args:
            model: In eval mode.
            prompt: One.
            settings: As of a rollout.
            greedy: Whether it takes the most probable token each time, or draws by `settings.sampling`.
        """
        self.text, self.done, self.tokens = "", False, 0
        self._ids: list[int] = []
        self._stopping = False
        self._error: BaseException | None = None
        self._turn, self._made = threading.Semaphore(0), threading.Semaphore(0)
        self._tokenizer, self._seen_prompt = tokenizer, False
        self._thread = threading.Thread(target=self._run, args=(model, prompt, settings, greedy), daemon=True)
        self._thread.start()

    def _run(self, model: PreTrainedModel, prompt: Prompts, settings: GenerationSettings, greedy: bool) -> None:
        self._turn.acquire()
        try:
            if not self._stopping:
                generate_with(model, prompt, settings, greedy=greedy, streamer=self)
        except _Stopped:
            pass
        except BaseException as error:  # told where it is asked for
            self._error = error
        self.done = True
        self._made.release()

    def put(self, ids: Tensor) -> None:
        """What `generate` calls with the prompt, and then with each token."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._ids += ids.reshape(-1).tolist()
        self._made.release()
        self._turn.acquire()
        if self._stopping:
            raise _Stopped

    def end(self) -> None:
        """What `generate` calls behind the last token."""

    def __next__(self) -> str:
        if self.done:
            raise StopIteration
        self._turn.release()
        self._made.acquire()
        if self._error is not None:
            raise self._error
        self.tokens = len(self._ids)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if not self.done and text.endswith(UNFINISHED):
            text = text.rstrip(UNFINISHED)
        piece, self.text = text[len(self.text) :], text
        return piece

    def stop(self) -> None:
        """Ends the answer where it is."""
        self._stopping = True
        while self._thread.is_alive():
            self._turn.release()
            self._thread.join(timeout=0.05)
        self.done = True

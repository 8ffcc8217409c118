"""Any tokenizer, with a pad token, and the question whether two of them speak of the same tokens.

Padding is only filler here: masks come from lengths, never from `ids != pad`, so that a pad token which is also the end
token does no harm.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.adapter_folder import base_model, is_adapter
from utils.bounds import BoundsExceeded, bounded
from utils.distributed import print0
from utils.files import read_text
from utils.hub import hub_is_reachable
from utils.run import UserError, first_line, one_line

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*")
TEMPLATE_SECONDS, TEMPLATE_MEGABYTES, TEMPLATE_CHARACTERS = 5.0, 500.0, 1_000_000  # for one question and its answer


def load_tokenizer(
    name_or_path: str, flag: str = "--model_name_or_path", chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with `pad_token` set; a PEFT folder without one has its base model's.

    The pad token is the tokenizer's own; without one, the unknown token where there is one of its own, else the end
    token. No token is added: the vocabulary stays the model's.

    Args:
        flag: Named by errors.
        chat_template: See `read_chat_template`; it takes the place of the tokenizer's own, and is saved with it.

    Raises:
        UserError: No tokenizer there, or one without an end token; a chat template that cannot be used.
    """
    folder = Path(name_or_path).expanduser()
    if is_adapter(name_or_path) and not _holds_tokenizer(folder):
        name_or_path, flag = base_model(name_or_path, flag)
        folder = Path(name_or_path)
    if folder.is_dir():
        # Without these transformers makes up an empty vocabulary.
        if not _holds_tokenizer(folder):
            raise UserError(
                f"{flag}: {name_or_path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save the model's tokenizer "
                "there with its save_pretrained"
            )
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{flag}: no such folder: {name_or_path}")
    online = folder.is_dir() or hub_is_reachable()
    try:
        where = str(folder) if folder.is_dir() else name_or_path
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        tokenizer("text")  # some values of its files are first looked at here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for broken files the tokenizers library raises all sorts of things, panics too
        if online:
            foreign = "trust_remote_code" in str(error)
            reason = "it needs Python code of its own, which is not run here" if foreign else first_line(error)
            raise UserError(f"{flag}: no usable tokenizer in {name_or_path}: {reason}") from error
        raise UserError(
            f"{flag}: {name_or_path} is neither a folder nor in the cache, and the Hugging Face hub cannot be reached; "
            "download the model on a machine with access and give its folder"
        ) from error
    if tokenizer.init_kwargs.get("auto_map"):
        kind = type(tokenizer).__name__
        print0(f"{flag}: the tokenizer of {name_or_path} has Python code of its own, which is not run: {kind} reads it")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag}: the tokenizer of {name_or_path} has no end token (eos_token); set one in its config")
    if tokenizer.pad_token_id is None:
        own_unknown = tokenizer.unk_token_id not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.unk_token if own_unknown else tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
        check_chat_template(tokenizer)
    elif tokenizer.chat_template:
        try_chat_template(tokenizer, f"{flag}: the chat template of {name_or_path}")
    return tokenizer


def _holds_tokenizer(folder: Path) -> bool:
    return any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern))


def read_chat_template(text_or_file: str) -> str:
    """The Jinja text of --chat_template: given as it stands (it holds a brace), or in a file."""
    if "{" in text_or_file:
        return text_or_file
    text = read_text(text_or_file, "--chat_template", "a file with a Jinja template, or its text")
    if "{" not in text:
        raise UserError(f"--chat_template {text_or_file}: holds no Jinja template: there is no brace in it")
    return text


QUESTION = [{"role": "user", "content": "QUESTION"}]
DIALOGUE = [*QUESTION, {"role": "assistant", "content": "ANSWER"}]


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A question, and the question with its answer, as the chat template writes them, within bounds.

    Raises:
        BoundsExceeded: It takes too much time or memory, or writes far too much.
    """
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_MEGABYTES):
            asked = str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template(DIALOGUE, tokenize=False))
    except (MemoryError, RecursionError) as error:
        raise BoundsExceeded(f"it ends in a {type(error).__name__}") from error
    if len(whole) > TEMPLATE_CHARACTERS:
        raise BoundsExceeded(f"it writes {len(whole)} characters")
    return asked, whole


def try_chat_template(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Refuses a template that loops or explodes, or several of which none is the default.

    One that refuses the probe, or writes the prompt in another way when an answer follows, may do for the data there
    is: its rows will tell.
    """
    from jinja2 import TemplateError

    try:
        probe_texts(tokenizer)
    except (TemplateError, TypeError):
        return
    except Exception as error:  # whatever an expression in it ends in
        raise UserError(
            f"{whose} cannot write one question and its answer: {first_line(error)}; mend it, or give another by "
            "--chat_template"
        ) from error


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that cannot write a question and its answer."""
    try:
        asked, whole = probe_texts(tokenizer)
    except Exception as error:  # whatever an expression in it ends in
        raise UserError(f"--chat_template: cannot write a question and its answer: {one_line(error)}") from error
    if "QUESTION" not in asked or "ANSWER" not in whole or not whole.startswith(asked):
        raise UserError(
            f"--chat_template: writes a question as {asked!r} and with its answer as {whole!r}; expected the second to "
            "begin with the first: end the prompt where the answer begins (add_generation_prompt)"
        )


def distinct_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.pad_token_id != tokenizer.eos_token_id


def same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """None when every id means the same text in both; else one line that says what differs.

    A pad token that only one of them has is no difference: padding is never read.
    """
    tokens_a, tokens_b = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (a, b))
    unread = {i for tokenizer in (a, b) for i in [tokenizer.pad_token_id] if i is not None}
    for i in sorted(tokens_a.keys() | tokens_b.keys()):
        pair = (tokens_a.get(i), tokens_b.get(i))
        if pair[0] != pair[1] and not (i in unread and None in pair):
            a_is, b_is = ("no token" if token is None else repr(token) for token in pair)
            return f"id {i} is {a_is} in the one and {b_is} in the other"
    return None

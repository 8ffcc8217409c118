"""Folders of models and tokenizers that are torn, absurd, of another kind, or do not fit together; LoRA; rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.kit import Case, Content, fifo, folder, link, model

FLAGS = {  # the flag of the model, and its sound folder
    "sft": ("--model_name_or_path", "POLICY"),
    "reward": ("--model_name_or_path", "POLICY"),
    "remax": ("--actor_model_name_or_path", "POLICY"),
    "rw_eval": ("--model_name_or_path", "SCORER"),
    "prompt_eval": ("--model_name_or_path_baseline", "POLICY"),
    "doctor": ("--actor_model_name_or_path", "POLICY"),
}


def of_model(name: str, program: str, line: str, **faults: Any) -> Case:
    """A case whose model is a copy with faults; see `tests.bad_input.kit.model`."""
    flag, kind = FLAGS[program]
    return Case(name, program, f"{flag} ./m", f"{flag} ... {line}", {"m": model(kind, **faults)})


def of_config(name: str, program: str, line: str, **fields: Any) -> Case:
    return of_model(name, program, line, config=fields)


def of_tokenizer(name: str, program: str, line: str, **fields: Any) -> Case:
    return of_model(name, program, line, tokenizer_config=fields)


def of_adapters(
    name: str,
    program: str,
    line: str,
    base: str = "../base",
    file: str = "adapter_model.safetensors",
    peft_type: str = "LORA",
    flags: str = "",
) -> Case:
    """A case of a PEFT folder, whose weights are torn anyway."""
    flag, kind = FLAGS[program]
    config = {"peft_type": peft_type, "base_model_name_or_path": base}
    files = {"m/adapter_config.json": config, f"m/{file}": "torn", "base": model(kind)}
    return Case(name, program, f"{flag} ./m {flags}", line, files)


def of_reward(name: str, program: str, line: str, **faults: Any) -> Case:
    """A case of a faulty reward model in step 3 or the doctor."""
    return Case(
        name,
        program,
        "--reward_model_name_or_path ./m",
        f"--reward_model_name_or_path ... {line}",
        {"m": model("SCORER", **faults)},
    )


def of_function(
    name: str, code: Content, line: str, entry: str = "r.py:f", flags: str = "", program: str = "remax"
) -> Case:
    """A case of a faulty --reward_fn."""
    return Case(
        name, program, f"--reward_fn {entry} {flags}", f"--reward_fn {entry.split()[0]} ... {line}", {"r.py": code}
    )


def each(change: Callable[[Any], Any], only: str = "") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes the tensors whose names hold `only`."""
    return lambda tensors: {name: change(t) if only in name else t for name, t in tensors.items()}


def lost(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def nan(tensor: Any) -> Any:
    return tensor * float("nan")


def infinite(tensor: Any) -> Any:
    return tensor / 0.0


def swap_two_tokens(path: Path, sound: Any) -> None:
    content = json.loads(path.read_text())
    tokens = content["model"]["vocab"]
    tokens["!"], tokens["?"] = tokens["?"], tokens["!"]
    path.write_text(json.dumps(content))


WEIGHTS = "model.safetensors"
HEADER = (2**63).to_bytes(8, "little")

FOLDERS = [
    Case(
        "model that is nowhere",
        "sft",
        "--model_name_or_path ./nowhere",
        "--model_name_or_path ./nowhere: no such folder",
    ),
    Case(
        "model of the hub offline",
        "sft",
        "--model_name_or_path someone/nothing",
        "--model_name_or_path ... 'someone/nothing'",
    ),
    Case(
        "model of the hub offline, step 3",
        "remax",
        "--actor_model_name_or_path someone/nothing",
        "--actor_model_name_or_path ... someone/nothing",
    ),
    Case("model with odd signs", "rw_eval", "--model_name_or_path 'so me/thing!'", "--model_name_or_path"),
    Case(
        "model that is a file",
        "doctor",
        "--actor_model_name_or_path pairs.jsonl",
        "--actor_model_name_or_path pairs.jsonl: is a file",
    ),
    Case("model that is a pipe", "sft", "--model_name_or_path ./m", "--model_name_or_path ./m: is a file", {"m": fifo}),
    Case(
        "model that is a link in a circle",
        "sft",
        "--model_name_or_path ./m",
        "--model_name_or_path ./m: no such folder",
        {"m": link("m")},
    ),
    Case(
        "model that is an empty folder",
        "prompt_eval",
        "--model_name_or_path_finetune ./m",
        "--model_name_or_path_finetune ./m: the folder has no config.json",
        {"m": folder},
    ),
    Case(
        "model one folder up", "remax", "--actor_model_name_or_path ./up", "its subfolder has one: m", {"up/m": model()}
    ),
    Case(
        "config.json that is a folder",
        "sft",
        "--model_name_or_path ./m",
        "--model_name_or_path",
        {"m/config.json": folder},
    ),
    Case(
        "config.json that is a pipe", "sft", "--model_name_or_path ./m", "--model_name_or_path", {"m/config.json": fifo}
    ),
    of_adapters(
        "adapters of a base that is nowhere", "sft", "has base_model_name_or_path './nowhere'", base="./nowhere"
    ),
    of_adapters("adapters as a pickle", "rw_eval", "has no adapter_model.safetensors", file="adapter_model.bin"),
    of_adapters("adapters that are torn", "doctor", "cannot read"),
    of_adapters("adapters that are no LoRA", "prompt_eval", "has peft_type 'IA3'", peft_type="IA3"),
    of_adapters("adapters beside a rank", "reward", "go on learning as they are", flags="--lora_dim 4"),
    of_model("config.json that is empty", "doctor", "config", files={"config.json": ""}),
    of_model("config.json that is torn", "doctor", "", files={"config.json": '{"model_type": '}),
    of_model("config.json that is a list", "rw_eval", "", files={"config.json": "[]"}),
    of_model("config.json that is a text", "prompt_eval", "", files={"config.json": '"llama"'}),
    of_model("config.json that is null", "doctor", "", files={"config.json": "null"}),
    of_model("config.json in latin-1", "sft", "", files={"config.json": b'{"model_type": "\xe9"}'}),
    of_model("config.json nested deep", "doctor", "", files={"config.json": '{"a": ' + "[" * 100_000}),
    of_model("config.json of nothing", "doctor", "", files={"config.json": "{}"}),
    of_config("no model type", "prompt_eval", "", model_type=None),
    of_config("unknown model type", "doctor", "", model_type="llama9"),
    of_config("model type that is a number", "sft", "", model_type=3),
    of_config("model of another kind", "doctor", "", model_type="bert", architectures=["BertForMaskedLM"]),
    of_config("encoder and decoder", "doctor", "", model_type="t5", architectures=["T5ForConditionalGeneration"]),
    of_config("model of pictures", "remax", "", model_type="vit", architectures=["ViTForImageClassification"]),
    of_config(
        "foreign code",
        "prompt_eval",
        "",
        auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"},
        model_type="own",
    ),
    of_config("hidden size 0", "doctor", "", hidden_size=0),
    of_config("hidden size below 0", "sft", "", hidden_size=-32),
    of_config("hidden size that is a text", "doctor", "", hidden_size="big"),
    of_config("hidden size of another model", "doctor", "", hidden_size=64),
    of_config("hidden size of 10^12", "prompt_eval", "", hidden_size=10**12),
    of_config("no heads", "doctor", "", num_attention_heads=0),
    of_config("heads that do not divide", "sft", "", num_attention_heads=5, head_dim=None),
    of_config("key heads that do not divide", "doctor", "", num_key_value_heads=3),
    of_config("no layers", "doctor", "", num_hidden_layers=0),
    of_config("layers too many", "prompt_eval", "", num_hidden_layers=4),
    of_config("layers too few", "rw_eval", "", num_hidden_layers=1),
    of_config("layers below 0", "doctor", "", num_hidden_layers=-1),
    of_config("layers that are a text", "doctor", "", num_hidden_layers="two"),
    of_config("unknown activation", "sft", "", hidden_act="magic"),
    of_config("positions that are a text", "doctor", "", max_position_embeddings="abc"),
    of_config("no positions", "sft", "", max_position_embeddings=0),
    of_config("vocabulary of 0", "prompt_eval", "", vocab_size=0),
    of_config("vocabulary below 0", "doctor", "", vocab_size=-5),
    of_config("vocabulary smaller than the tokenizer's", "sft", "", vocab_size=100),
    of_config("vocabulary that is a text", "remax", "", vocab_size="many"),
    of_config(
        "quantised model", "doctor", "", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
    of_config("quantised by nobody knows what", "doctor", "", quantization_config={"quant_method": "magic"}),
    of_config("unknown number format", "prompt_eval", "", dtype="float7"),
    of_config("unknown rotation", "doctor", "", rope_parameters={"rope_type": "magic", "rope_theta": 1.0}),
    of_config("norm that is a text", "sft", "", rms_norm_eps="small"),
    of_config("three labels", "rw_eval", "has 3 labels; expected a reward model with one score", num_labels=3),
    of_config("labels that are a text", "rw_eval", "", num_labels="one"),
    of_config("pad beyond the embedding", "rw_eval", "", pad_token_id=4000),
    of_config("architectures that are a text", "rw_eval", "", architectures="LlamaForCausalLM"),
    of_model("no weights", "doctor", "", without=[WEIGHTS]),
    of_model("weights that are empty", "doctor", "", files={WEIGHTS: ""}),
    of_model("weights of text", "prompt_eval", "", files={WEIGHTS: "hello, weights"}),
    of_model("weights of eight bytes", "remax", "", files={WEIGHTS: b"\0" * 8}),
    of_model("weights with an endless header", "doctor", "", files={WEIGHTS: HEADER}),
    of_model("weights of a page", "doctor", "", files={WEIGHTS: "<html>404</html>"}),
    of_model(
        "weights of a git lfs pointer",
        "sft",
        "",
        files={WEIGHTS: "version https://git-lfs.github.com/spec/v1\nsize 3\n"},
    ),
    of_model(
        "weights cut off",
        "rw_eval",
        "",
        files={WEIGHTS: lambda path, sound: path.write_bytes(path.read_bytes()[:5000])},
    ),
    of_model("weights that are a folder", "doctor", "", without=[WEIGHTS], files={f"{WEIGHTS}/x": ""}),
    of_model(
        "weights as a pickle that is none", "doctor", "", without=[WEIGHTS], files={"pytorch_model.bin": "no pickle"}
    ),
    of_model("index of nothing", "prompt_eval", "", without=[WEIGHTS], files={f"{WEIGHTS}.index.json": "{}"}),
    of_model(
        "index of files that are nowhere",
        "doctor",
        "",
        without=[WEIGHTS],
        files={f"{WEIGHTS}.index.json": {"metadata": {}, "weight_map": {"lm_head.weight": "a.safetensors"}}},
    ),
    of_model(
        "index of files outside",
        "sft",
        "",
        without=[WEIGHTS],
        files={f"{WEIGHTS}.index.json": {"metadata": {}, "weight_map": {"lm_head.weight": "../../../etc/passwd"}}},
    ),
    of_model("index that is torn", "doctor", "", without=[WEIGHTS], files={f"{WEIGHTS}.index.json": "{"}),
    of_model("weights without a layer", "doctor", "lack", tensors=lost("layers.1.")),
    of_model("weights without the head", "remax", "lack", tensors=lost("lm_head")),
    of_model("weights without the embedding", "prompt_eval", "lack", tensors=lost("embed_tokens")),
    of_model(
        "weights under other names",
        "doctor",
        "",
        tensors=lambda tensors: {f"x.{name}": t for name, t in tensors.items()},
    ),
    of_model("weights of another shape", "sft", "", tensors=each(lambda t: t[:8].clone(), "q_proj")),
    of_model("weights of nothing", "doctor", "", tensors=lambda tensors: {}),
    of_model(
        "a tensor too many",
        "doctor",
        "",
        tensors=lambda tensors: {**tensors, "model.layers.7.mlp.up_proj.weight": next(iter(tensors.values())).clone()},
    ),
    of_model("weights that are nan", "prompt_eval", "", tensors=each(nan)),
    of_model("one tensor of nan", "remax", "", tensors=each(nan, "layers.1.mlp.up_proj")),
    of_model("weights that are infinite", "reward", "", tensors=each(infinite)),
    of_model("weights that are nan, prompt_eval", "prompt_eval", "", tensors=each(nan)),
    of_model("weights that are nan, rw_eval", "rw_eval", "", tensors=each(nan)),
    of_model("weights that are nan, doctor", "doctor", "", tensors=each(nan)),
    Case(
        "baseline of nan",
        "prompt_eval",
        "--model_name_or_path_baseline ./m",
        "--model_name_or_path_baseline",
        {"m": model(tensors=each(nan))},
    ),
    Case(
        "language model as a reward model",
        "rw_eval",
        "--model_name_or_path $POLICY",
        "--model_name_or_path: ... expected a reward model",
    ),
    Case("reward model as a policy", "sft", "--model_name_or_path $SCORER", "--model_name_or_path"),
    Case(
        "reward model as a policy, step 3", "remax", "--actor_model_name_or_path $SCORER", "--actor_model_name_or_path"
    ),
    Case(
        "generation config that is torn",
        "sft",
        "--model_name_or_path ./m",
        "generation",
        {"m": model(files={"generation_config.json": "{"})},
    ),
    of_model("generation config that is a list", "remax", "generation", files={"generation_config.json": "[]"}),
    of_model("generation config of words", "prompt_eval", "generation", generation_config={"eos_token_id": "end"}),
    of_model("generation config with an end beyond", "remax", "", generation_config={"eos_token_id": [1, 4000]}),
    of_model("generation config with an end below 0", "remax", "", generation_config={"eos_token_id": -1}),
]

TOKENIZERS = [
    of_model("no tokenizer", "doctor", "holds no tokenizer", without=["tokenizer.json"]),
    of_model("tokenizer that is empty", "sft", "no usable tokenizer", files={"tokenizer.json": ""}),
    of_model("tokenizer that is torn", "doctor", "no usable tokenizer", files={"tokenizer.json": "{"}),
    of_model("tokenizer of nothing", "prompt_eval", "no usable tokenizer", files={"tokenizer.json": "{}"}),
    of_model("tokenizer that is a list", "remax", "no usable tokenizer", files={"tokenizer.json": "[]"}),
    of_model("tokenizer that is a folder", "doctor", "", without=["tokenizer.json"], files={"tokenizer.json/x": ""}),
    of_model("tokenizer that is a pipe", "prompt_eval", "", without=["tokenizer.json"], files={"tokenizer.json": fifo}),
    of_model("tokenizer nested deep", "doctor", "", files={"tokenizer.json": "[" * 100_000}),
    of_model(
        "tokenizer of a sentencepiece that is none",
        "sft",
        "",
        without=["tokenizer.json"],
        files={"tokenizer.model": "no pieces"},
    ),
    of_model("tokenizer of vocab.json alone", "doctor", "", without=["tokenizer.json"], files={"vocab.json": "{}"}),
    of_model("tokenizer config that is torn", "doctor", "", files={"tokenizer_config.json": "{"}),
    of_model("tokenizer config that is a list", "prompt_eval", "", files={"tokenizer_config.json": "[]"}),
    of_tokenizer("no end token", "sft", "has no end token", eos_token=None),
    of_tokenizer("end token that is a number", "sft", "", eos_token=3),
    of_tokenizer("end token that is a list", "doctor", "", eos_token=["a"]),
    of_tokenizer(
        "tokenizer of foreign code", "sft", "", auto_map={"AutoTokenizer": ["x.T", None]}, tokenizer_class="T"
    ),
    of_tokenizer("end token that is new", "sft", "", eos_token="<new end>"),
    of_tokenizer("pad token that is new", "remax", "", pad_token="<new pad>"),
    Case(
        "reward model with another tokenizer",
        "remax",
        "--reward_model_name_or_path ./m",
        "its vocabulary differs from that of",
        {"m": model("SCORER", files={"tokenizer.json": swap_two_tokens})},
    ),
    of_reward("reward model without its head", "remax", "", tensors=lost("score")),
    of_reward("reward model of nan", "remax", "", tensors=each(nan)),
    of_reward("reward model of nan, doctor", "doctor", "", tensors=each(nan)),
    of_reward("reward model without a layer", "remax", "lack", tensors=lost("layers.1.")),
    of_reward("reward model with two labels", "doctor", "", config={"num_labels": 2}),
    of_reward("reward model with few positions", "remax", "positions", config={"max_position_embeddings": 16}),
    of_reward("reward model that is torn", "remax", "", files={WEIGHTS: "torn"}),
    of_reward("reward model without a tokenizer", "remax", "holds no tokenizer", without=["tokenizer.json"]),
    Case(
        "policy as a reward model",
        "remax",
        "--reward_model_name_or_path $POLICY",
        "--reward_model_name_or_path: ... expected a reward model",
    ),
    Case(
        "reward model that is nowhere",
        "remax",
        "--reward_model_name_or_path ./nowhere",
        "--reward_model_name_or_path ./nowhere: no such folder",
    ),
    Case(
        "reward model of no name",
        "remax",
        "--reward_model_name_or_path ''",
        "--reward_model_name_or_path '': expected some text",
    ),
    Case(
        "critic that is a policy",
        "remax",
        "--algo ppo --critic_model_name_or_path $POLICY",
        "--critic_model_name_or_path: ... expected a reward model",
    ),
    Case(
        "deviation of 0",
        "remax",
        "--normalize_reward --reward_model_name_or_path ./m",
        "has score_mean 0 and score_std 0",
        {"m": model("SCORER", config={"score_mean": 0, "score_std": 0})},
    ),
    Case(
        "deviation that is a text",
        "remax",
        "--normalize_reward --reward_model_name_or_path ./m",
        "score_std",
        {"m": model("SCORER", config={"score_mean": 0, "score_std": "wide"})},
    ),
]

REWARDS = [
    Case(
        "function without a name",
        "remax",
        "--reward_fn r.py",
        "--reward_fn r.py: expected module:function or file.py:function",
    ),
    Case("function of no file", "remax", "--reward_fn nowhere.py:f", "--reward_fn nowhere.py:f: no such file"),
    Case(
        "function of no module",
        "remax",
        "--reward_fn nowhere.module:f",
        "--reward_fn nowhere.module:f: no module nowhere.module",
    ),
    Case("function with odd signs", "remax", "--reward_fn 'a b:c'", "--reward_fn a b:c: expected module:function"),
    Case("function of no text", "remax", "--reward_fn ''", "--reward_fn '': expected some text"),
    of_function("function that is not there", "def g(prompt, answer): return 1.0", "r.py has no f; it has g"),
    of_function("function that is a number", "f = 3", "f is a int; expected a function"),
    of_function("function of no parameters", "def f(): return 1.0", "takes (); expected"),
    of_function("function of other parameters", "def f(x, y): return 1.0", "takes (x, y); expected"),
    of_function("function with a syntax error", "def f(prompt, answer) return", "r.py cannot be imported"),
    of_function("function whose file divides by zero", "1 / 0", "r.py cannot be imported: ZeroDivisionError"),
    of_function("function whose file ends Python", "import sys; sys.exit(0)", "r.py cannot be imported"),
    of_function(
        "function whose file needs another", "import nothing_like_that", "r.py cannot be imported: ModuleNotFoundError"
    ),
    of_function("function that raises", "def f(prompt, answer): raise ValueError('no')", "ValueError: no"),
    of_function("function that gives None", "def f(prompt, answer): return None", "returned None; expected a number"),
    of_function(
        "function that gives a text", "def f(prompt, answer): return '3'", "returned '3' (str); expected a number"
    ),
    of_function(
        "function that gives nan",
        "def f(prompt, answer): return float('nan')",
        "returned nan (float); expected a finite number",
    ),
    of_function("function that gives 10^400", "def f(prompt, answer): return 10**400", "expected a"),
    of_function("function that gives a list", "def f(prompt, answer): return [1.0]", "expected a number"),
    of_function(
        "function of lists that gives a number",
        "def f(prompts, answers): return 1.0",
        "returned 1.0 (float); expected 4 numbers",
    ),
    of_function(
        "function of lists that gives too few",
        "def f(prompts, answers): return [1.0]",
        "returned 1 values; expected 4 numbers",
    ),
    of_function("function that ends Python", "import sys\ndef f(prompt, answer): sys.exit(0)", "SystemExit"),
    of_function(
        "function that never ends",
        "def f(prompt, answer):\n    while True: pass",
        "no answer within 1 s",
        flags="--reward_fn_timeout 1",
    ),
    of_function("function that exits at once", "import os\ndef f(prompt, answer): os._exit(0)", ""),
    of_function("function that takes all", "def f(prompt, answer): raise KeyboardInterrupt", ""),
    of_function("function that recurses", "def f(prompt, answer): return f(prompt, answer)", "RecursionError"),
    of_function(
        "function with a weight of a word",
        "def f(prompt, answer): return 1.0",
        "expected module:function",
        entry="r.py:f:heavy",
    ),
    of_function(
        "function with a weight of 0",
        "def f(prompt, answer): return 1.0",
        "the weight after the colon",
        entry="r.py:f:0",
    ),
    of_function(
        "function of the doctor", "def f(prompt, answer): raise ValueError('no')", "ValueError: no", program="doctor"
    ),
]

CASES = [*FOLDERS, *TOKENIZERS, *REWARDS]

"""Text files of flags: prompts, --config, chat templates."""

from __future__ import annotations

from tests.bad_input.kit import Case, fifo, folder

PROMPTS = [
    Case(
        "prompts that are nowhere",
        "prompt_eval",
        "--prompts_file nowhere.txt",
        "--prompts_file nowhere.txt: no such file",
    ),
    Case(
        "prompts that are a folder", "prompt_eval", "--prompts_file p", "--prompts_file p: is a folder", {"p": folder}
    ),
    Case("no prompts", "prompt_eval", "--prompts_file p.txt", "--prompts_file p.txt: holds no prompt", {"p.txt": ""}),
    Case(
        "blank prompts",
        "prompt_eval",
        "--prompts_file p.txt",
        "--prompts_file p.txt: holds no prompt",
        {"p.txt": "\n \n"},
    ),
    Case(
        "prompts in latin-1",
        "prompt_eval",
        "--prompts_file p.txt",
        "--prompts_file p.txt: line 1 is not UTF-8",
        {"p.txt": b"caf\xe9?\n"},
    ),
    Case(
        "prompts in UTF-16",
        "prompt_eval",
        "--prompts_file p.txt",
        "--prompts_file p.txt ... not UTF-8",
        {"p.txt": "a?\n".encode("utf-16")},
    ),
    Case(
        "prompts that are a pipe",
        "prompt_eval",
        "--prompts_file p.txt",
        "--prompts_file p.txt: is no regular file",
        {"p.txt": fifo},
    ),
    Case(
        "prompt longer than the model",
        "prompt_eval",
        "--prompts_file p.txt",
        "--max_new_tokens",
        {"p.txt": "why " * 3000},
    ),
    Case(
        "prompts of plain text",
        "prompt_eval",
        "--data_path d.jsonl",
        "--data_path d.jsonl: holds no prompt",
        {"d.jsonl": [{"text": "a"}]},
    ),
    Case(
        "prompts of a torn file",
        "prompt_eval",
        "--data_path d.jsonl",
        "--data_path: d.jsonl, line 1: not valid JSON",
        {"d.jsonl": "{"},
    ),
]

CONFIGS = [
    Case("config that is nowhere", "sft", "--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    Case("config that is a folder", "sft", "--config c", "--config c: is a folder; expected", {"c": folder}),
    Case(
        "config that is empty",
        "sft",
        "--config c.yaml",
        "--config c.yaml: is empty; expected a mapping",
        {"c.yaml": ""},
    ),
    Case(
        "config that is a list",
        "sft",
        "--config c.yaml",
        "--config c.yaml: is a list; expected a mapping",
        {"c.yaml": "- a\n"},
    ),
    Case(
        "config that is a text",
        "sft",
        "--config c.yaml",
        "--config c.yaml: is a str; expected a mapping",
        {"c.yaml": "hello"},
    ),
    Case("config with tabs", "sft", "--config c.yaml", "--config c.yaml: is no yaml", {"c.yaml": "seed:\t\n\t- 3"}),
    Case("config that is torn", "sft", "--config c.json", "--config c.json: is no json", {"c.json": '{"seed": '}),
    Case(
        "config in latin-1",
        "sft",
        "--config c.yaml",
        "--config c.yaml: line 1 is not UTF-8",
        {"c.yaml": b"output_dir: \xe9"},
    ),
    Case("config with a zero byte", "sft", "--config c.yaml", "--config c.yaml", {"c.yaml": b"seed: 3\0"}),
    Case(
        "config of an unknown flag",
        "sft",
        "--config c.yaml",
        "--config c.yaml: sed: unknown flag; did you mean --seed",
        {"c.yaml": "sed: 3"},
    ),
    Case(
        "config with a key twice",
        "sft",
        "--config c.yaml",
        "--config c.yaml: seed: is set 2 times",
        {"c.yaml": "seed: 3\nseed: 4"},
    ),
    Case(
        "config with a flag twice",
        "sft",
        "--config c.yaml",
        "is the same flag as",
        {"c.yaml": "max_steps: 3\nmax-steps: 4"},
    ),
    Case(
        "config with a list",
        "sft",
        "--config c.yaml",
        "--config c.yaml: seed: is a list; expected a whole number",
        {"c.yaml": "seed: [3]"},
    ),
    Case(
        "config with a mapping",
        "sft",
        "--config c.yaml",
        "--config c.yaml: seed: is {'a': 3}; expected",
        {"c.yaml": "seed: {a: 3}"},
    ),
    Case(
        "config with a list in a list",
        "sft",
        "--config c.yaml",
        "--config c.yaml: data_path",
        {"c.yaml": "data_path: [[a]]"},
    ),
    Case(
        "config with a number for a text",
        "sft",
        "--config c.yaml",
        "--config c.yaml: output_dir: is 3; expected text",
        {"c.yaml": "output_dir: 3"},
    ),
    Case(
        "config with a date",
        "sft",
        "--config c.yaml",
        "--config c.yaml: output_dir",
        {"c.yaml": "output_dir: 2026-01-01"},
    ),
    Case(
        "config with a seed of 10^30", "sft", "--config c.yaml", "--config c.yaml: seed", {"c.yaml": f"seed: {10**30}"}
    ),
    Case(
        "config with an empty text",
        "sft",
        "--config c.yaml",
        "--config c.yaml: output_dir: is ''; expected some text",
        {"c.yaml": "output_dir: ''"},
    ),
    Case(
        "config with a zero byte in a text",
        "sft",
        "--config c.yaml",
        "--config c.yaml: output_dir ... without zero bytes",
        {"c.yaml": 'output_dir: "a\\0b"'},
    ),
    Case(
        "config of another config",
        "sft",
        "--config c.yaml",
        "--config c.yaml: config: a file cannot name another one",
        {"c.yaml": "config: d.yaml"},
    ),
    Case(
        "config of another stage",
        "sft",
        "--config c.json",
        "--config c.json: is a run of step3, not of step1",
        {"c.json": {"stage": "step3", "arguments": {"seed": 1}}},
    ),
    Case(
        "config of no stage",
        "sft",
        "--config c.json",
        "--config c.json: is a run of None",
        {"c.json": {"arguments": {"seed": 1}}},
    ),
    Case(
        "config that runs code",
        "sft",
        "--config c.yaml",
        "--config c.yaml: is no yaml",
        {"c.yaml": "seed: !!python/object/apply:os.getpid []"},
    ),
    Case(
        "config of endless aliases",
        "sft",
        "--config c.yaml",
        "--config c.yaml",
        {
            "c.yaml": "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8))
            + "output_dir: *i\n"
        },
    ),
    Case("config that holds itself", "sft", "--config c.yaml", "--config c.yaml", {"c.yaml": "data_path: &a [*a]"}),
    Case(
        "config nested deep",
        "sft",
        "--config c.yaml",
        "--config c.yaml: is nested too deeply",
        {"c.yaml": "seed: " + "[" * 5000},
    ),
    Case(
        "config nested deep, json",
        "sft",
        "--config c.json",
        "--config c.json: is nested too deeply",
        {"c.json": '{"seed": ' + "[" * 100_000},
    ),
    Case("config that is a pipe", "sft", "--config c.yaml", "--config c.yaml: is no regular file", {"c.yaml": fifo}),
    Case("config with keys that are lists", "sft", "--config c.yaml", "--config c.yaml", {"c.yaml": "? [a]\n: 3"}),
    Case(
        "config with a number as key", "sft", "--config c.yaml", "--config c.yaml: 3: unknown flag", {"c.yaml": "3: 4"}
    ),
    Case(
        "template that is nowhere",
        "sft",
        "--chat_template nowhere.jinja",
        "--chat_template nowhere.jinja: no such file",
    ),
    Case("template that is a folder", "sft", "--chat_template t", "--chat_template t: is a folder", {"t": folder}),
    Case(
        "template without braces",
        "sft",
        "--chat_template t",
        "--chat_template t: holds no Jinja template",
        {"t": "hello"},
    ),
    Case(
        "template in latin-1",
        "sft",
        "--chat_template t",
        "--chat_template t: line 1 is not UTF-8",
        {"t": b"{{ \xe9 }}"},
    ),
    Case(
        "template with a syntax error",
        "sft",
        "--chat_template '{{ messages'",
        "--chat_template: cannot write a question",
    ),
    Case(
        "template with an unknown name",
        "sft",
        "--chat_template '{{ nothing.x }}'",
        "--chat_template: cannot write a question",
    ),
    Case(
        "template that writes nothing",
        "sft",
        "--chat_template '{% if false %}{% endif %}'",
        "--chat_template: writes a question as ''",
    ),
    Case("template that divides by zero", "sft", "--chat_template '{{ 1 / 0 }}'", "--chat_template"),
    Case(
        "template that calls itself",
        "sft",
        "--chat_template '{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}'",
        "--chat_template",
    ),
    Case(
        "template of a long range",
        "sft",
        "--chat_template '{% for i in range(99999999) %}{% endfor %}'",
        "--chat_template",
    ),
    Case(
        "template that never ends",
        "sft",
        "--chat_template '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'",
        "--chat_template: ... it takes longer than",
    ),
    Case("template that explodes", "sft", "--chat_template '{{ \"a\" * 99999999999 }}'", "--chat_template"),
    Case("template that is a pipe", "sft", "--chat_template t", "--chat_template t: is no regular file", {"t": fifo}),
    Case("template that reaches out", "sft", "--chat_template '{{ messages.__class__.__mro__ }}'", "--chat_template"),
]

CASES = [*PROMPTS, *CONFIGS]

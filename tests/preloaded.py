"""What a fork of tests/zygote.py has imported already: the programs, and what libraries import in their course."""

# ruff: noqa: F401
import functools
import gc

import cpuinfo
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import pandas
import peft
import torch
import torch.utils.tensorboard
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt
import yaml

import remax.stages.doctor
import remax.stages.finetune
import remax.stages.prompt_eval
import remax.stages.reward_eval
import remax.stages.rlhf

torch.set_num_threads(1)
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()  # takes a second, and each engine that offloads to the CPU asks three times
gc.collect()
gc.freeze()  # or each collection, of which DeepSpeed asks for many, would go through all of this again: 0.3 s

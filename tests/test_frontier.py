"""`python -m minirlhf.frontier`: what it runs, keeps, measures and says, on models of one narrow layer. Its runs happen in
this process, but for one test with real ones."""
import contextlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import types

import pytest
import torch

from conftest import Command, Tiny
from minirlhf import checkpoint, evaluate, frontier
from minirlhf.frontier import METHODS, Method, Options, Results, Runner

TINY = f"""\
device = "cpu"
dtype = "float32"
lora_rank = 0
[sft]
init_from = scratch
n_layer = 1
n_head = 2
n_embd = 8
vocab_size = 260
block_size = 12
batch_size = 16
num_train_epochs = 12
learning_rate = 0.05
muon_learning_rate = 0.1
response_length = 4
eval_interval = 100
[rm]
batch_size = 4
num_scale_samples = 4
response_length = 4
[ppo]
total_episodes = 8
batch_size = 4
response_length = 3
num_eval_prompts = 2
num_mini_batches = 2
value_warmup = 0
micro_batch_size = 4
[dpo]
batch_size = 4
max_steps = 2
response_length = 3
num_eval_prompts = 2
"""
FEW = {"ppo": Method("train_ppo.py", "kl_coef", (0.01, 0.1), 0.1, (1e-3, 3e-3, 1e-2), ()),
       "rloo": Method("train_ppo.py", "kl_coef", (0.1,), 0.1, (3e-3, 1e-2), ("--advantages", "rloo", "--group_size", "2")),
       "dpo": Method("minirlhf.dpo", "beta", (0.1, 1.0), 0.1, (3e-3, 1e-2), ()),
       "dpo-on-policy": Method("minirlhf.dpo", "beta", (0.1,), 0.1, (3e-3, 1e-2), ()), "best-of-n": None}

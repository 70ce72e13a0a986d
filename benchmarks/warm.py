"""What the ranks of started.py find imported: all modules of the project, and what DeepSpeed and torch import late."""

# ruff: noqa: F401

import importlib
import pkgutil

import deepspeed.runtime.zero.muon.muon_optimizer  # by DeepSpeed as it builds an engine, with torch's compiler
import einops._torch_specific
import torch.utils.tensorboard

import benchmarks.started
import fewshot
import finetune
import pretrain

for package in (pretrain, finetune, fewshot):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

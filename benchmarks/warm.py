"""What the ranks of started.py find imported: the project's commands, and what they import late."""

# ruff: noqa: F401

import deepspeed.runtime.zero.muon.muon_optimizer  # by DeepSpeed as it builds an engine, with torch's compiler
import einops._torch_specific
import fewshot.cache
import torch.utils.tensorboard

import benchmarks.started
import fewshot.evaluator
import fewshot.page
import fewshot.report
import finetune.config
import finetune.head
import pretrain.run.experiment
import pretrain.run.origin
import pretrain.shards.scan
import pretrain.shards.write

"""Validate a small fixed network on the ranks of one process group; rank 0 writes what it found."""

import json
import sys
from pathlib import Path

import torch

from pretrain.engine import processgroup
from pretrain.images.transforms import EvalImages
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.stream.section import DataSection
from pretrain.training.evaluation import Validation
from pretrain.training.loss import softmax_loss

shards, out, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
world = processgroup.start()
spec = ViTSpec(patch_size=4, layers=2, width=24, mlp=48, heads=2, image_size=16, channels=1, num_classes=10)
model = VisionTransformer(spec).eval()
initialize(model, 0)
torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
validation = Validation(
    Index.open(shards),
    softmax_loss,
    world,
    DataSection(workers=1),
    EvalImages(16, 1),
    batch=batch,
    dtype=torch.float32,
    every=None,
)
with torch.no_grad():
    values = dict(validation.run(model, 1))
if world.main:
    out.write_text(json.dumps(values))
processgroup.stop()

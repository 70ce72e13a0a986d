"""Write the tables of docs/config.md and configs/schema.json from the fields of the configs: python docs/generate.py"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from fewshot.config import FewshotConfig
from finetune.config import FinetuneConfig
from finetune.evaluation.config import EvaluateConfig
from pretrain.keys import json_schema, keys, markdown, refused_markdown
from pretrain.training.config import RunConfig

BEGIN = "<!-- From here on generated: python docs/generate.py -->\n"


def contents() -> dict[Path, str]:
    """Each generated file as it should be."""
    page = ROOT / "docs" / "config.md"
    written = page.read_text(encoding="utf-8").partition(BEGIN)[0]
    training = list(keys(RunConfig))
    tables = {
        "Pre-training": markdown(training),
        "DeepSpeed options that are refused": refused_markdown(training),
        "Fine-tuning: as pre-training, but for": markdown(key for key in keys(FinetuneConfig) if key not in training),
        "Few-shot": markdown(keys(FewshotConfig), resume=False),
        "Evaluation": markdown(keys(EvaluateConfig), resume=False),
    }
    generated = "".join(f"\n## {title}\n\n{table}\n" for title, table in tables.items())
    schema = json.dumps(
        json_schema([RunConfig, FinetuneConfig, FewshotConfig, EvaluateConfig]), indent=1, ensure_ascii=False
    )
    return {page: f"{written}{BEGIN}{generated}", ROOT / "configs" / "schema.json": f"{schema}\n"}


if __name__ == "__main__":
    for path, text in contents().items():
        path.write_text(text, encoding="utf-8")

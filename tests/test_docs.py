"""What the pages say is there: paths, links, short table cells; the recipes of docs/extending.md do what they say."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fewshot.features
import fewshot.probes.table
import pretrain.engine.optimizer
import pretrain.weights.formats.format
import pretrain.weights.formats.table
import pretrain.weights.read
from fewshot.config import FewshotConfig
from fewshot.probes.support import Support
from pretrain.configfile import read_config
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.weights.load import load_weights

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w/.<~-])(?:pretrain|finetune|fewshot|launch|tests|docs|configs|benchmarks)/[\w/.-]*\w\.\w+")
LONGEST_CELL = 300


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def snippets() -> dict[str, str]:
    """The Python of docs/extending.md, by heading."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        code = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
        found[section.partition("\n")[0]] = textwrap.dedent("\n".join(code))
    return found


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
class TestPage:
    def test_paths_exist(self, page):
        named = PATH.findall(page.read_text(encoding="utf-8"))
        # `--config` looks under configs/ too.
        assert not [path for path in named if not ((ROOT / path).exists() or (ROOT / "configs" / path).exists())]

    def test_links_resolve(self, page):
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" not in link:
                path, _, anchor = link.partition("#")
                target = (page.parent / path).resolve() if path else page
                assert target.exists(), link
                assert not anchor or anchor in anchors(target), link

    def test_table_cells_are_short(self, page):
        cells = [cell for line in prose(page).splitlines() if line.startswith("|") for cell in line.split("|")]
        assert [cell for cell in cells if len(cell) > LONGEST_CELL] == []


def test_the_few_shot_commands_of_the_pages_are_understood(monkeypatch):
    monkeypatch.setattr(sys, "path", ["launch", *sys.path])
    command = runpy.run_path(str(ROOT / "launch" / "fewshot.py"))
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/fewshot.md"))
    found = re.findall(r"^ *(?:deepspeed|python) launch/fewshot\.py (.*)$", pages, flags=re.M)
    assert len(found) > 5
    for words in found:
        if words != "--keys":
            given = command["parser"]().parse_intermixed_args(shlex.split(words, comments=True))
            read_config(FewshotConfig, given.config or command["DEFAULT"], command["overrides"](given))


def test_the_house_names_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    house = re.findall(r"^  (\w+)/ ", text.partition("## The house")[2], flags=re.M)
    assert sorted(house) == sorted(path.parent.name for path in ROOT.glob("pretrain/*/__init__.py"))


def test_extending_answers_each_question_with_code():
    found = snippets()
    assert len(found) == 10
    for heading, code in found.items():
        compile(code, heading, "exec")
        assert len(code.splitlines()) in range(1, 46), heading


def test_the_probe_of_the_page_separates(monkeypatch):
    monkeypatch.setattr(fewshot.probes.table, "PROBES", dict(fewshot.probes.table.PROBES))
    names = dict(vars(fewshot.probes.table))
    exec(snippets()["A probe"], names)
    labels = torch.arange(12) % 4
    features = torch.nn.functional.one_hot(labels, 4).double() + 0.01 * torch.randn(12, 4, dtype=torch.double)
    assert names["PROBES"]["cosine_mean"].fit(Support(features, labels, 4), 0.0)(features).tolist() == labels.tolist()


def test_the_layer_of_the_page_is_found(monkeypatch):
    monkeypatch.setattr(fewshot.features, "LAYERS", dict(fewshot.features.LAYERS))
    exec(snippets()["A feature layer"], vars(fewshot.features))
    spec = ViTSpec(patch_size=4, layers=3, width=24, mlp=24, heads=3, image_size=8, num_classes=3)
    assert fewshot.features.widths(spec, ["cls_second_last"]) == {"cls_second_last": 24}


def test_the_weight_format_of_the_page_reads(tmp_path, monkeypatch):
    names = {**vars(pretrain.weights.formats.format), **vars(pretrain.weights.formats.table)}
    exec(snippets()["A weight format"], names)
    monkeypatch.setitem(pretrain.weights.read.FORMATS, "mmpretrain", names["MMPRETRAIN"])
    model = VisionTransformer(spec_from_arch("vit_ti_16", image_size=32, num_classes=3))
    initialize(model, 0)
    ours = model.state_dict()
    theirs = {row.name: ours[row.ours] for row in names["MMPRETRAIN"].rows(model.spec)}
    torch.save({"meta": {}, "state_dict": theirs}, tmp_path / "vit.pth")
    found = load_weights(tmp_path / "vit.pth")
    assert found.spec == model.spec
    assert all(torch.equal(value, found.tensors[name]) for name, value in ours.items())


def test_the_optimizer_of_the_page_steps_and_holds():
    names = dict(vars(pretrain.engine.optimizer))
    exec(snippets()["An optimizer"], names)
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = names["Lion"]([{"params": [weights], "weight_decay": 0.0}], {"lr": 0.1, "betas": (0.9, 0.99)})
    optimizer.allocate(weights)
    weights.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert torch.allclose(weights.detach(), torch.tensor([0.9, 1.1, 1.0]))
    optimizer.hold = True
    optimizer.step()
    assert torch.allclose(weights.detach(), torch.tensor([0.9, 1.1, 1.0]))

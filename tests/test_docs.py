# SPDX-License-Identifier: Apache-2.0

"""The documents: their code runs, their commands are parsed, their links lead somewhere, and the site is built."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.cli.cli import AnomalibCLI
from PIL import Image

from anomalib_recon import estimate
from anomalib_recon.config_files import config_path
from anomalib_recon.experiments import image_size
from anomalib_recon.experiments.compare import __main__ as compare
from anomalib_recon.experiments.reproduce import __main__ as reproduce

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("anomalib_recon/models/*/README.md")),
]
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    is_run: bool


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[2], match[3], text.count("\n", 0, match.start(3)), bool(match[1])) for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_blocks(language: str) -> Any:
    pages = [page for page in PAGES if blocks(page, language)]
    assert pages
    return pytest.mark.parametrize("page", pages, ids=name_of)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the images that the pages speak of."""
    random = np.random.default_rng(0)

    def save(name: str, pixels: np.ndarray) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for folder, count in {"GOOD": 12, "IMAGES": 3, "MINE/good": 12, "MINE/defective": 5}.items():
        for index in range(count):
            save(f"{folder}/{index}.png", random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for index in range(5):
        save(f"MINE/masks/{index}.png", 255 * np.eye(64, dtype=np.uint8))
    for folder, count in {"GOOD_16": 12, "IMAGES_16": 3}.items():
        for index in range(count):
            save(f"{folder}/{index}.png", random.integers(20000, 40000, (64, 64), dtype=np.uint16))
    (tmp_path / "CKPT").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@with_blocks("python")
def test_python_runs(page: Path, workplace: Path) -> None:
    run_python(page)


def test_levels_are_taken_from_good_images_with_a_margin(workplace: Path) -> None:
    names = run_python(ROOT / "docs" / "sixteen_bit.md")
    # of a uniform distribution, with a quarter of its width more on each side
    assert names["black_level"] == pytest.approx(15_000, abs=300)
    assert names["white_level"] == pytest.approx(45_000, abs=300)
    assert len(names["predictions"]) == 3


def run_python(page: Path) -> dict[str, Any]:
    """Run the code of a page, and the imports of the code that is not run; return its names."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        tree = ast.parse("\n" * block.line + block.code)
        if not block.is_run:
            tree.body = [part for part in tree.body if isinstance(part, ast.Import | ast.ImportFrom)]
        exec(compile(tree, name_of(page), "exec"), names)
    return names


def commands(page: Path) -> list[list[str]]:
    lines = "".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    separated = [command for line in lines for command in line.split("&&")]
    return [words for command in separated if (words := shlex.split(command, comments=True))]


def parse(words: list[str]) -> None:
    """Parse a command by the parser that would read it."""
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    while "=" in words[0]:  # environment variables
        words = words[1:]
    program, *arguments = words
    if program == "anomalib":
        parse_anomalib(arguments)
    elif Path(program).name == "python" and arguments[0] == "-m":
        parse_module(*arguments[1:])


def parse_anomalib(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        AnomalibCLI([*arguments, "--print_config"], run=False)
    assert ended.value.code == 0


def source_of(module: str) -> str:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def parse_module(module: str, *arguments: str) -> None:
    if module == "anomalib_recon.quickstart":
        parse_anomalib(["train", "--config", str(ROOT / "configs/quickstart/intra.yaml"), *arguments])
    elif module == "anomalib_recon.experiments.image_size":
        _, further = image_size.build_parser().parse_known_args(arguments)
        parse_anomalib(["train", "--model", "InTra", *further])
    elif module == "anomalib_recon.experiments.reproduce":
        options, further = reproduce.build_parser().parse_known_args(arguments)
        rows = reproduce.chosen_methods(reproduce.read_table(options.table), options.methods)
        parse_anomalib(["train", "--config", str(config_path(rows[0].config)), *further])
    elif module == "anomalib_recon.experiments.compare":
        options, further = compare.build_parser().parse_known_args(arguments)
        assert options.config.is_file()
        parse_anomalib(["train", "--model", "InTra", "--data", "DemoAD", *further])
    elif module in {"anomalib_recon.experiments.compare.benchmark", "anomalib_recon.experiments.tiled_ensemble"}:
        assert Path(arguments[arguments.index("--config") + 1]).is_file()
    elif module == "anomalib_recon.estimate":
        options, further = estimate.build_parser().parse_known_args(arguments)
        parse_anomalib(["train", "--config", str(options.config), "--data", "DemoAD", *further])
    elif module in {"anomalib_recon.card", "anomalib_recon.parity", "anomalib_recon.deploy.thresholds"}:
        import_module(module).build_parser().parse_args(arguments)
    elif module.startswith("benchmarks."):
        script = source_of(module)
        # scripts share arguments
        scripts = script + "".join(map(source_of, re.findall(r"^from (benchmarks\.\w+) import", script, re.MULTILINE)))
        assert all(f'"{word}"' in scripts for word in arguments if word.startswith("--"))
    else:
        assert module in {"venv", "pytest"}


@with_blocks("bash")
def test_commands_are_parsed(page: Path, workplace: Path) -> None:
    for words in commands(page):
        parse(words)


def test_a_mistyped_command_is_found(workplace: Path) -> None:
    with pytest.raises(AssertionError):
        parse(["anomalib", "train", "--model", "InTra", "--model.image_sise", "320"])


def defined_names(path: Path) -> set[str]:
    """Classes, functions and methods of a file."""

    def find(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for part in body:
            if isinstance(part, ast.ClassDef | ast.FunctionDef):
                found |= {prefix + part.name}
            if isinstance(part, ast.ClassDef):
                found |= find(part.body, f"{prefix}{part.name}.")
        return found

    return find(ast.parse(path.read_text(encoding="utf-8")).body, "")


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/models/*.md")), ids=name_of)
def test_names_beside_the_paper_exist(page: Path) -> None:
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for file, name in rows:
        folder = "." if "/" in file else f"models/{page.stem}"
        assert name in defined_names(ROOT / "anomalib_recon" / folder / file), f"{file} has no {name}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_site_is_built(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="the extra docs is not installed")
    # --strict: a link, an anchor or a name that is not there is an error
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "models" / "intra" / "index.html").read_text(encoding="utf-8")
    assert "Held-out images" in page  # from the README, by a snippet

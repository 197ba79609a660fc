"""What the documentation claims: words, commands, settings, links and snippets are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import typer.main
import yaml
from pydantic import BaseModel

import tidegate
from tidegate import errors, policy, types
from tidegate.cli import app
from tidegate.guards.cascade import AskOptions, CascadeConfig, ConfirmOptions
from tidegate.guards.remote import RemoteConfig
from tidegate.guards.tidegate_live import TidegateConfig
from tidegate.guards.vllm_stream import VllmStreamConfig
from tidegate.policy import PRESETS
from tidegate.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
GATEWAY = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        found = [line for block in snippets(text, "sh") for line in block.splitlines()]
        found += re.findall(r"`((?:tidegate|make) [^`]*)`", text)
        for line in found:
            for part in re.split(r"\||&&", line):
                if part.strip().startswith(("tidegate ", "make ")):
                    yield path, part.strip().rstrip("\\ ")


def ids(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [each for each in targets if "://" not in each and not (path.parent / each).exists()]
    assert missing == []


def anchors(path: Path) -> set[str]:
    """What a link can name behind the # of a page: its headings, as GitHub writes them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in found)
    return {re.sub(r"[^\w\- ]", "", each).replace(" ", "-") for each in words}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_to_headings_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8"))
    pages = [(path.parent / page if page else path, heading) for page, heading in links if "://" not in page]
    assert [f"{page}#{heading}" for page, heading in pages if heading not in anchors(page)] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in seen or path.suffix != ".md" or not path.is_file():
            continue
        seen.add(path)
        links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        waiting += [(path.parent / each).resolve() for each in links if "://" not in each]
    assert {path.resolve() for path in PAGES} - seen == set()


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_python_snippets_compile_and_use_names_that_exist(path: Path) -> None:
    for snippet in snippets(path.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(snippet)):
            match node:
                case ast.Attribute(value=ast.Name(id="tidegate"), attr=name):
                    assert hasattr(tidegate, name), name


def verbs() -> dict[str, set[str]]:
    """The options of each verb, by its words."""
    group = typer.main.get_command(app)
    found: dict[str, set[str]] = {}

    def walk(command: object, words: tuple[str, ...]) -> None:
        found[" ".join(words)] = {
            option for each in getattr(command, "params", ()) for option in (*each.opts, *each.secondary_opts)
        } | {"-h", "--help"}
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))

    walk(group, ())
    return found


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=ids)
def test_commands_in_the_documentation_exist_with_their_options(path: Path, command: str) -> None:
    program, *words = command.split()
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words if "=" not in word)
        return
    known = verbs()
    verb = next((verb for verb in (" ".join(words[:2]), words[0]) if verb in known), None)
    assert verb is not None or words[0].startswith("-"), f"{path}: no verb {words[0]}"
    options = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
    assert options <= known[verb or ""], path


def test_every_verb_is_in_the_readme() -> None:
    for verb in verbs():
        assert not verb or f"`tidegate {verb.split()[0]}`" in README


def test_every_word_that_names_a_type_names_one() -> None:
    words = re.findall(r"^\| \*\*(\w+)\*\*", CONCEPTS, re.MULTILINE)
    assert len(words) > 15
    not_types = {"Guard", "Key", "Session", "Policy", "Rule", "Benchmark", "Recipe"}
    not_types |= {"Upstream", "Door", "Exchange", "Alarm"}
    for word in words:
        if word in not_types:
            continue
        assert hasattr(types, word), word
    assert hasattr(policy, "Policy")
    assert hasattr(policy, "Rule")


def test_every_type_has_its_word() -> None:
    details = {"CoverageState", "InterventionKind", "Span", "ToolCall"}
    for name in types.__all__:
        if isinstance(getattr(types, name), type) and name not in details:
            assert f"| **{name}** |" in CONCEPTS, name


def test_categories_severities_and_actions_are_written_as_they_are() -> None:
    for category in types.CATEGORIES:
        assert f"| {category} |" in CONCEPTS
    assert " < ".join(severity.name for severity in types.Severity) in CONCEPTS
    assert " < ".join(action.name for action in types.Action) in CONCEPTS


def test_every_setting_is_documented_with_its_default() -> None:
    documented = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| ([^|]+) \|", GATEWAY, re.MULTILINE))
    assert {name.upper() for name in Settings.model_fields} == set(documented)
    shown = {"max_body_bytes": "2 MiB", "max_stream_bytes": "128 MiB"}
    for name, field in Settings.model_fields.items():
        default = documented[name.upper()]
        match field.default:
            case None:
                assert default == "none"
            case bool(chosen):
                assert default == f"`{str(chosen).lower()}`"
            case float(number):
                assert default in (f"{number:g} s", f"`{number:g}`"), name
            case value:
                assert default in (f"`{value}`", shown.get(name)), name


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("remote", RemoteConfig),
        ("vllm-stream", VllmStreamConfig),
        ("tidegate", TidegateConfig),
        ("cascade", CascadeConfig),
    ],
)
def test_every_key_of_a_guards_file_is_documented_with_its_default(kind: str, config: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    section = page.split(f"### `{kind}:FILE`")[1].split("\n### ")[0]
    documented: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`[^|]+`) \| ((?:\\\||[^|])+) \|", section, re.MULTILINE):
        for name, value in zip(re.findall(r"`([\w.]+)`", names), cycle(default.split(", ")), strict=False):
            documented[name] = value.strip("`")
    expected = set(config.model_fields)
    if config is CascadeConfig:
        expected -= {"ask", "confirm"}
        expected |= {f"ask.{key}" for key in AskOptions.model_fields}
        expected |= {f"confirm.{key}" for key in ConfirmOptions.model_fields}
    assert set(documented) == expected
    for name, field in config.model_fields.items():
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert documented[name] == f"{field.default:g}", name


def test_every_metric_is_documented() -> None:
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("operations", "tenants"))
    made = r"(?:Counter|Gauge|Histogram)\(\s*\"(tidegate_\w+)\""
    names = {
        name for path in (ROOT / "src").rglob("*.py") for name in re.findall(made, path.read_text(encoding="utf-8"))
    }
    assert len(names) > 25
    assert {name for name in names if f"`{name}" not in pages} == set()


def test_every_preset_is_documented_and_ships() -> None:
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    for preset in PRESETS:
        assert f"`{preset}`" in page
        assert (ROOT / "policies" / f"{preset}.yaml").is_file()


def test_every_yaml_snippet_about_policies_is_yaml() -> None:
    for snippet in snippets((ROOT / "docs" / "policy.md").read_text(encoding="utf-8"), "yaml"):
        assert yaml.safe_load(snippet)


def test_exit_codes_in_the_readme_are_those_of_the_command_line() -> None:
    from tidegate import cli

    assert "| 0 | allowed |" in README
    assert f"| {cli.FLAGGED} | flagged" in README
    assert f"| {cli.WRONG} | usage or input error" in README


def test_every_error_is_drawn_in_the_tree() -> None:
    for name in errors.__all__:
        assert name in (errors.__doc__ or "")


def test_the_layers_on_the_map_are_those_that_are_checked() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (layers,) = re.findall(r"^layers = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    page = (ROOT / "docs" / "flow.md").read_text(encoding="utf-8")
    assert "\n".join(re.findall(r'"([^"]+)"', layers)) in page


@pytest.mark.parametrize("page", ["faults", "attacks"])
def test_every_row_of_a_table_of_faults_or_attacks_names_tests_that_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith("| Held by |")]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            code = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^(?:async )?def {name}\(", code, re.MULTILINE), f"{file}::{name}"


def test_no_page_names_a_file_of_the_tree_that_is_not_there() -> None:
    for line in re.findall(r"^[├└]── (.*)$", README, re.MULTILINE):
        names = re.match(r"(?:[\w./]+(?:, )?)+", line)
        assert names is not None
        for name in names[0].strip().split(", "):
            assert (ROOT / "src" / "tidegate" / name.strip()).exists(), name

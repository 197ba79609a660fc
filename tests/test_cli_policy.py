"""``tidegate policy``: check, explain, replay."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from test_cli import run
from tidegate.policy import FIELDS, PRESETS, decide, parse_policy
from tidegate.store import open_store
from tidegate.types import Conversation, GuardFailure, Probabilities, Scope, Severity, Span, Target, Verdict

OLD = """
name: old
on_guard_error: block
otherwise: allow
controversial: safe
rules:
  - {name: stop, severity: unsafe, action: block}
"""
NEW = """
name: new
on_guard_error: {default: block, timeout: warn}
otherwise: allow
controversial: safe
rules:
  - {name: data, severity: unsafe, categories: [PII], action: warn}
  - {name: stop, severity: controversial, action: block}
  - {name: look, severity: safe, action: review, observe: true}
layers:
  tenant:
    kind: {rules: [{name: kindly, severity: unsafe, action: allow}], message: Sorry.}
"""
ODDS = {
    Severity.SAFE: Probabilities(0.9, 0.06, 0.04),
    Severity.CONTROVERSIAL: Probabilities(0.1, 0.8, 0.1),
    Severity.UNSAFE: Probabilities(0.02, 0.08, 0.9),
}


@pytest.fixture
def new(tmp_path: Path) -> Path:
    path = tmp_path / "new.yaml"
    path.write_text(NEW)
    return path


@pytest.fixture
def database(tmp_path: Path) -> str:
    """Six decisions of the old policy; the last one of a guard that did not answer."""
    url = f"sqlite:///{tmp_path / 'kept.db'}"
    old = parse_policy(OLD)
    said = [
        Verdict(Target.PROMPT, Severity.UNSAFE, ODDS[Severity.UNSAFE], ("PII",)),
        Verdict(Target.PROMPT, Severity.UNSAFE, ODDS[Severity.UNSAFE], ("Violent",)),
        Verdict(Target.RESPONSE, Severity.CONTROVERSIAL, ODDS[Severity.CONTROVERSIAL], ("PII",), span=Span(0, 3)),
        Verdict(Target.PROMPT, Severity.SAFE, ODDS[Severity.SAFE]),
        GuardFailure("GuardTimeout", "late"),
    ]
    with open_store(url) as store:
        for one in said:
            asyncio.run(store.keep(decide(old, one, Scope(tenant="a")), Conversation.of("x"), retention="hash"))
    return url


# --- check --------------------------------------------------------------------------------------------------------


def test_check_prints_one_line_for_each_policy_and_the_place_of_each_error(new: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(NEW.replace("severity", "sevrity", 1))

    result = run("policy", "check", new, wrong, "strict")

    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 2
    assert [(row["name"], row["rules"], row["layers"], row["observed"]) for row in rows] == [
        ("new", 4, ["tenant kind"], 1),
        ("strict", 8, [], 0),
    ]
    assert f"{wrong}:7:18: rules[0]: unknown key 'sevrity', did you mean 'severity'?" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("guard", [None, "edge"])
def test_check_says_what_a_policy_needs_of_the_gateway(
    new: Path, guard: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    new.write_text(f"{NEW}confirm: true\n")
    if guard:
        monkeypatch.setenv("TIDEGATE_CONFIRM_GUARD", guard)

    result = run("policy", "check", new, "balanced")

    assert result.exit_code == 0
    needs = [json.loads(line)["needs"] for line in result.stdout.splitlines()]
    assert needs == [["TIDEGATE_CONFIRM_GUARD"], []]
    assert ("confirm needs TIDEGATE_CONFIRM_GUARD, which is not set here" in result.stderr) is (guard is None)


def test_check_is_content_with_all_that_ships() -> None:
    result = run("policy", "check", *PRESETS, *FIELDS)

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(PRESETS) + len(FIELDS)


# --- explain ------------------------------------------------------------------------------------------------------


def explained(*arguments: str | Path) -> dict[str, object]:
    result = run("policy", "explain", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    content: dict[str, object] = json.loads(result.stdout)
    return content


def test_explain_says_which_rule_wins_for_whom(new: Path) -> None:
    assert explained(new, "--severity", "unsafe", "--category", "PII")["rule"] == "data"
    assert explained(new, "--severity", "unsafe", "--tenant", "kind")["rule"] == "kindly"
    assert explained(new, "--severity", "unsafe", "--tenant", "kind")["layers"] == ["default", "tenant kind"]
    assert explained(new, "--severity", "safe")["observed"] == {"action": "review", "rule": "look"}
    failed = explained(new, "--failure", "GuardTimeout")
    assert explained(new, "--failure", "timeout") == failed
    assert (failed["action"], failed["rule"]) == ("warn", "on_guard_error")


def test_explain_takes_probabilities_and_shares(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: p\non_guard_error: block\notherwise: allow\ncontroversial: safe\nthresholds: {PII: 0.4}\nrules:\n"
        "- {name: data, severity: unsafe, categories: [PII], probability: {unsafe: 0.6}, action: block}\n"
        "- {name: near, severity: safe, probability: {flagged: 0.5}, action: warn}\n"
    )

    def rule(*more: str) -> object:
        return explained(path, *more)["rule"]

    assert rule("--severity", "unsafe", "--category", "PII=0.4", "--unsafe", "0.6") == "data"
    assert rule("--severity", "unsafe", "--category", "PII=0.39", "--unsafe", "0.6") == "near"
    assert rule("--severity", "unsafe", "--category", "PII", "--unsafe", "0.59", "--flagged", "0.6") == "near"
    assert rule("--severity", "safe", "--flagged", "0.49") == "otherwise"
    assert rule("--severity", "safe", "--flagged", "0.5") == "near"


def test_explain_prints_it_for_people(new: Path) -> None:
    result = run("policy", "explain", new, "--severity", "unsafe", "--category", "Violent=0.7", "--tenant", "kind")

    lines = result.stdout.splitlines()
    assert lines[0] == "ALLOW  kindly"
    assert lines[1] == "  it is the first rule that matches, and stands in tenant kind"
    assert "  default < tenant kind" in lines
    assert "  matches  Violent: kindly (tenant kind): all that it asks for is so" in lines
    assert any(line.split() == ["message", "Sorry.", "[tenant", "kind]"] for line in lines)


def test_explain_explains_a_kept_decision(new: Path, database: str) -> None:
    with open_store(database) as store:
        identity = asyncio.run(store.decisions(limit=1))[0].id

    told = explained(new, "--decision", identity, "--database", database)
    assert (told["action"], told["rule"]) == ("warn", "on_guard_error")
    missing = run("policy", "explain", new, "--decision", "dec_0", "--database", database)
    assert (missing.exit_code, "no such decision" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected one of --severity, --failure and --decision"),
        (["--severity", "unsafe", "--failure", "GuardTimeout"], "expected one of"),
        (["--failure", "timeot"], "failure: unknown kind 'timeot': expected one of unavailable, overloaded, timeout"),
        (["--severity", "worse"], "unknown severity 'worse'"),
        (["--severity", "unsafe", "--target", "both"], "'both'"),
        (["--severity", "unsafe", "--category", "PII=much"], "got 'much'"),
        (["--severity", "unsafe", "--category", "PII=2"], "got '2'"),
        (["--severity", "unsafe", "--category", "Violence"], "category: unknown category 'Violence': expected one of"),
        (["--severity", "unsafe", "--unsafe", "0.9", "--flagged", "0.1"], "no less"),
    ],
)
def test_explain_says_what_is_wrong_with_a_question(arguments: list[str], expected: str) -> None:
    result = run("policy", "explain", "strict", *arguments)

    assert result.exit_code == 2
    assert expected in result.stderr.replace("\n", " ")


# --- replay -------------------------------------------------------------------------------------------------------


def test_replay_counts_what_a_candidate_would_change(new: Path, database: str) -> None:
    result = run("policy", "replay", new, "--since", "7d", "--database", database, "--json")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["decisions"], found["changed"], found["stricter"], found["milder"]) == (5, 3, 1, 2)
    assert (found["estimates"], found["failures"], found["observed"]) == (1, 1, 1)
    assert {(row["before"], row["after"]): row["count"] for row in found["actions"]} == {
        ("allow", "allow"): 1,
        ("allow", "block"): 1,
        ("block", "block"): 1,
        ("block", "warn"): 2,
    }
    assert {example["after"]["rule"] for example in found["examples"]} == {"data", "stop", "on_guard_error"}


def test_replay_prints_it_for_people(new: Path, database: str) -> None:
    result = run("policy", "replay", new, "--database", database, "--examples", "1")

    lines = result.stdout.splitlines()
    assert lines[0] == "5 decisions, 3 would change: 1 to stricter, 2 to milder"
    assert "block warn 2" in [" ".join(line.split()) for line in lines]
    assert sum("->" in line for line in lines) == 2
    assert "1 are from streams" in result.stderr


def test_replay_against_a_policy_and_of_a_time_without_decisions(new: Path, database: str) -> None:
    same = run("policy", "replay", new, "--against", new, "--database", database)
    assert same.stdout.startswith("5 decisions, 0 would change")

    none = run("policy", "replay", new, "--until", "1w", "--database", database)
    assert none.stdout.startswith("0 decisions")


def test_replay_needs_a_candidate_that_can_be_read_and_a_database(new: Path, database: str, tmp_path: Path) -> None:
    assert run("policy", "replay", tmp_path / "none.yaml", "--database", database).exit_code == 2
    assert run("policy", "replay", new, "--database", f"sqlite:///{tmp_path / 'none.db'}").exit_code == 2
    assert run("policy", "replay", new, "--since", "lately", "--database", database).exit_code == 2

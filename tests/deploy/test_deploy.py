"""What is delivered to run Tidegate somewhere: read by the tools that will read it there, and true to the code.

The tools come from PyPI (extra ``dev``), Debian (promtool) and npm (helm); where one is not there its tests skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tidegate.gateway.telemetry import Telemetry
from tidegate.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "tidegate"
PROMETHEUS = DEPLOY / "prometheus"

NEEDED = {
    "upstream.url": "http://llm:8000/v1",
    "database.existingSecret": "database",
    "fingerprint.existingSecret": "fingerprint",
}
ALL_ON = {
    **NEEDED,
    "autoscaling.enabled": "true",
    "spool.claim": "true",
    "spool.storageClass": "fast",
    "networkPolicy.enabled": "true",
    "ingress.enabled": "true",
    "ingress.host": "guard.example.org",
    "ingress.tlsSecret": "certificate",
    "redis.existingSecret": "redis",
    "upstream.existingSecret": "upstream",
    "settings.TIDEGATE_JUDGE_SYSTEM": "true",
}


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rendered(values: dict[str, str], *more: str) -> str:
    given = [
        f"--set-string={key}={value}" if "settings" in key else f"--set={key}={value}" for key, value in values.items()
    ]
    return run(tool("helm"), "template", "guard", CHART, "--kube-version", "1.30.0", *given, *more)


def parts(text: str) -> dict[str, dict[str, Any]]:
    return {part["kind"]: part for part in yaml.safe_load_all(text) if part}


def environment(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return {variable["name"]: variable for variable in container["env"]}


# --- read by the tools ---------------------------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter() -> None:
    run(tool("hadolint"), "Dockerfile")


class Health(BaseHTTPRequestHandler):
    """``/healthz``, well or not."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *said: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_container_is_as_healthy_as_its_gateway_says(status: int, tls: bool, tmp_path: Path) -> None:
    """Also where it speaks TLS, with a certificate for the name that others know it by."""
    said = re.search(r"^HEALTHCHECK .*\\\n  CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert said is not None
    python, *rest = json.loads(said.group(1))
    assert python == "python"
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Now", (Health,), {"status": status})) as server:
        settings = {f"{PREFIX}PORT": str(server.server_port)}
        if tls:
            settings[f"{PREFIX}TLS_CERT"] = str(tmp_path / "server.pem")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trustme.CA().issue_cert("guard.example.org").configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run([sys.executable, *rest], env={**os.environ, **settings}, capture_output=True, timeout=60)
        server.shutdown()

    assert done.returncode == (0 if status == 200 else 1), done.stderr.decode()


def test_compose_is_what_the_specification_says() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_prometheus_reads_its_configuration_and_the_alerts() -> None:
    run(tool("promtool"), "check", "config", PROMETHEUS / "prometheus.yml")
    run(tool("promtool"), "test", "rules", PROMETHEUS / "tidegate.rules.test.yml")


def test_helm_finds_nothing_wrong_with_the_chart() -> None:
    run(tool("helm"), "lint", "--strict", CHART, *(f"--set={key}={value}" for key, value in NEEDED.items()))


@pytest.mark.parametrize("values", [NEEDED, ALL_ON], ids=["least", "all on"])
def test_what_the_chart_renders_is_valid_for_kubernetes(values: dict[str, str], tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    file = tmp_path / "rendered.yaml"
    file.write_text(rendered(values, f"--set-file=policy.file={ROOT / 'policies' / 'balanced.yaml'}"))
    run(validate, "--strict", "-k", "1.30", file)


# --- what the chart says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        ("upstream.url", "upstream.url is missing"),
        ("database.existingSecret", "more than one replica needs PostgreSQL"),
        ("fingerprint.existingSecret", "all replicas need the same key"),
    ],
)
def test_the_chart_refuses_what_cannot_work(left_out: str, says: str) -> None:
    given = [f"--set={key}={value}" for key, value in NEEDED.items() if key != left_out]
    command = [tool("helm"), "template", "guard", str(CHART), "--kube-version", "1.30.0", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert says in done.stderr


def test_pods_are_ready_when_the_guard_judges_and_alive_when_the_process_answers() -> None:
    (container,) = parts(rendered(NEEDED))["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_a_pod_has_time_to_let_its_streams_end() -> None:
    pod = parts(rendered({**NEEDED, "shutdown": "120"}))["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (shutdown,) = (one["value"] for one in container["env"] if one["name"] == "TIDEGATE_SHUTDOWN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > waits + int(shutdown)


def test_secrets_come_from_secrets_and_a_policy_of_ones_own_is_mounted(tmp_path: Path) -> None:
    policy = ROOT / "policies" / "strict.yaml"
    found = parts(rendered(ALL_ON, f"--set-file=policy.file={policy}"))
    told = environment(found["StatefulSet"])
    for name in ("UPSTREAM_KEY", "DATABASE_URL", "FINGERPRINT_KEY", "REDIS_URL"):
        assert "secretKeyRef" in told[f"{PREFIX}{name}"]["valueFrom"]
    assert found["ConfigMap"]["data"]["policy.yaml"].strip() == policy.read_text().strip()
    assert told[f"{PREFIX}POLICY"]["value"] == "/etc/tidegate/policy.yaml"


def test_numbers_of_a_values_file_are_written_out_as_the_gateway_reads_them(tmp_path: Path) -> None:
    said = {
        "max_body_bytes": 4194304,
        "keep_days": 0.5,
        "judge_system": True,
        "guard_timeout": "2",
        "log_level": "debug",
    }
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"settings": {f"{PREFIX}{name.upper()}": value for name, value in said.items()}}))
    told = environment(parts(rendered(NEEDED, f"--values={values}"))["Deployment"])
    read = Settings(**{name: told[f"{PREFIX}{name.upper()}"]["value"] for name in said})

    assert {name: getattr(read, name) for name in said} == {**said, "guard_timeout": 2.0}


# --- true to the code ----------------------------------------------------------------------------------------------


def settings_in(text: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", text))


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "deploy/helm/tidegate/templates/gateway.yaml"])
def test_every_setting_that_is_named_exists(file: str) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    own = {"TIDEGATE_VERSION"}  # of compose.yaml itself
    for name in settings_in((ROOT / file).read_text()) - own:
        assert name in known or name.removesuffix("_FILE") in known, name


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\btidegate_[a-z_]+\b", text))


@pytest.mark.parametrize("file", ["prometheus/tidegate.rules.yml", "grafana/tidegate.json"])
def test_every_metric_that_is_named_exists(file: str) -> None:
    known: set[str] = set()
    for family in Telemetry().registry.collect():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        known.update(f"{family.name}{end}" for end in ends)
    assert metrics_in((DEPLOY / file).read_text()) - known == set()


def test_the_dashboard_has_a_place_of_its_own_for_every_panel() -> None:
    panels = json.loads((DEPLOY / "grafana" / "tidegate.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_the_secrets_are_made_once_and_fit_the_settings(tmp_path: Path) -> None:
    script = tmp_path / "make_secrets.py"
    shutil.copy(DEPLOY / "make_secrets.py", script)
    run(sys.executable, script)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    run(sys.executable, script)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    Settings(database_url=made["database_url"], fingerprint_key=made["fingerprint_key"])
    assert made["postgres_password"] in made["database_url"]

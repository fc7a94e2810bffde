"""Files for operators: options and metrics that they name exist, and they are well formed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from transfuse.cli import find_command
from transfuse.serving.engine_client import Metrics

FOLDER = Path(__file__).parents[2] / "deploy"


def test_every_command_starts_a_server(tmp_path: Path) -> None:
    """Options of the container, of the services and of the unit are options of `transfuse serve`."""
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    container = (FOLDER / "Containerfile").read_text()
    entry, default = (
        json.loads(re.findall(rf"^{word} (\[.*\])", container, re.M)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    (unit,) = re.findall(r"^ExecStart=\S+/transfuse (.*)", (FOLDER / "transfuse.service").read_text(), re.M)
    commands = [[*entry[1:], *default], [*entry[1:], *compose["services"]["model"]["command"]], shlex.split(unit)]
    for command in commands:
        assert command[0] == "serve"
        options = find_command(command).keywords["options"]
        assert options.port == 8000
    assert (FOLDER / compose["services"]["model"]["build"]["context"] / "pyproject.toml").is_file()
    for copied in re.findall(r"^COPY (.*) \S+$", container, re.M):
        assert all((FOLDER.parent / name).exists() for name in copied.split())


def test_every_metric_of_the_dashboard_is_one_the_server_has() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"transfuse_\w+", query)}
    known = {metric.name for metric in Metrics().registry.collect()}
    assert {re.sub(r"_(total|bucket)$", "", name) for name in named} == known, "all of them are shown"


def test_prometheus_reads_the_services_of_compose() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    (job,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    (targets,) = job["static_configs"]
    assert {target.partition(":")[0] for target in targets["targets"]} <= set(services)
    caddy = (FOLDER / "Caddyfile").read_text()
    assert all(target in caddy for target in targets["targets"])


def test_compose_tells_clients_apart_and_shows_the_dashboard() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    server, grafana = compose["services"]["model"], compose["services"]["grafana"]
    assert "ports" not in server
    assert server["environment"]["FORWARDED_ALLOW_IPS"] == "*"
    files = {config["target"].split("/")[-2]: compose["configs"][config["source"]] for config in grafana["configs"]}
    content = {kind: yaml.safe_load(config["content"]) for kind, config in files.items()}
    assert content["datasources"]["datasources"][0]["url"].split("/")[2].partition(":")[0] in compose["services"]
    source, target, _ = grafana["volumes"][0].split(":")
    assert json.loads((FOLDER / source).read_text())["uid"] == "transfuse"
    assert Path(target).parent == Path(content["dashboards"]["providers"][0]["options"]["path"])


def test_a_proxy_asks_again_only_where_nothing_was_computed() -> None:
    (again,) = re.findall(r"proxy_next_upstream (.*);", (FOLDER / "nginx.conf").read_text())
    assert again.split() == ["error", "http_503", "non_idempotent"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_the_unit_is_well_formed(tmp_path: Path) -> None:
    unit = tmp_path / "transfuse.service"
    unit.write_text(
        re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (FOLDER / "transfuse.service").read_text(), flags=re.M)
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "transfuse.service" not in done.stderr, done.stderr

"""A real Prometheus that scrapes a real gateway, and what packaging/ has for it: alerts and a dashboard."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from gateway_process import Gateway, inside, namespace_files, portal_in

from tests.lab.process import REPOSITORY, Process, lab_environment
from tests.lab.scripted_portal import wait_until

RULES = REPOSITORY / "packaging" / "prometheus" / "firezone-gateway.rules.yml"
RULE_TESTS = REPOSITORY / "packaging" / "prometheus" / "firezone-gateway.test.yml"
SCRAPE = REPOSITORY / "packaging" / "prometheus" / "scrape.yml"
DASHBOARD = REPOSITORY / "packaging" / "grafana" / "firezone-gateway.json"
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
METRIC = re.compile(r"\b(?:firezone_gateway|connlib|tunnel|portal|dns|eventloop|process)_\w+\b(?!\s*=~?\")")
# Without relays there is no round trip to show; all other panels must have something to draw.
EMPTY_WITHOUT_RELAYS = {"Round trip to relays"}
PATIENCE_S = 40.0

pytestmark = pytest.mark.slow


# --- offline ---


@pytest.mark.needs("promtool")
def test_the_rules_are_sound_and_each_raises_its_alert_when_it_should_and_not_before():
    for command in (("check", "rules", RULES), ("test", "rules", RULE_TESTS), ("check", "config", SCRAPE)):
        done = subprocess.run(["promtool", *command], check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_and_tells_what_to_do():
    tests, rules = RULE_TESTS.read_text(), RULES.read_text()
    assert len(ALERTS) == len(set(ALERTS)) >= 10
    for alert in ALERTS:
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts:", tests), alert
    assert rules.count("summary: ") == rules.count("description: ") == len(ALERTS)


def test_the_dashboard_is_whole():
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
    assert {each["name"] for each in dashboard["templating"]["list"]} == {"datasource", "instance"}


# --- with a gateway ---


class Scraper:
    """A Prometheus in the gateway's namespace."""

    def __init__(self, namespace):
        self.namespace = namespace
        self.folder = Path(namespace_files(namespace)) / "prometheus"
        self.folder.mkdir()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "firezone-gateway", "static_configs": [{"targets": ["127.0.0.1:8080"]}]},
            ],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps(config))  # YAML, too
        self.process = Process(
            "prometheus",
            [
                "prometheus",
                f"--config.file={self.folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.folder / 'data'}",
                "--web.listen-address=127.0.0.1:9090",
            ],
            log=self.folder / "log",
            prefix=namespace.prefix(),
            environment=lab_environment(),
        )

    def ask(self, path, **query):
        with inside(self.namespace):
            url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return json.load(answer)["data"]
            except urllib.error.HTTPError as error:
                if error.code == 503:  # it reads its files
                    return None
                pytest.fail(f"{path} {query}: {error.read().decode()}")
            except OSError:
                assert self.process.running, self.process.tail()
                return None

    def query(self, expression):
        return (self.ask("query", query=expression) or {"result": []})["result"]

    def value(self, expression):
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None


class Site(NamedTuple):
    gateway: Gateway
    portal: object
    scraper: Scraper


@pytest.fixture(scope="module")
def site(lab_network):
    namespace = lab_network.namespace("scraped")
    with portal_in(namespace) as portal:
        gateway = Gateway(namespace, portal=portal, FIREZONE_METRICS="prometheus")
        gateway.wait_ready()
        scraper = Scraper(namespace)
        try:
            ready = lambda: (scraper.value("count_over_time(firezone_gateway_ready[1m])") or 0) >= 5
            wait_until(ready, "five scrapes", PATIENCE_S)
            yield Site(gateway, portal, scraper)
        finally:
            scraper.process.stop()
            gateway.stop()


REAL = pytest.mark.needs("root", "ip", "setpriv", "unshare", "tun", "prometheus")


@REAL
@pytest.mark.spec("OPS-42")
def test_prometheus_takes_what_the_gateway_says(site):
    (target,) = site.scraper.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert site.scraper.value('up{job="firezone-gateway"}') == 1
    assert site.scraper.value("firezone_gateway_ready") == 1
    assert site.scraper.value("firezone_gateway_portal_joined") == 1
    assert site.scraper.value("process_resident_memory_bytes") > 10_000_000
    assert site.scraper.value("firezone_gateway_flow_log_spool_records") == 0
    assert site.scraper.query("firezone_gateway_build_info")[0]["metric"]["version"] == "1.6.1"


@REAL
def test_every_metric_that_the_alerts_and_the_dashboard_name_is_in_the_scrape(site):
    known = set(site.scraper.ask("label/__name__/values"))
    named = {
        name
        for text in (RULES.read_text(), *(expression for _, expression in expressions()))
        for name in METRIC.findall(re.sub(r"(alert|summary|description): .*", "", text))
    }
    assert len(named) > 30
    assert named - known == set()


@REAL
def test_every_panel_has_something_to_draw(site):
    def drawn(title, expression):
        filled = expression.replace("$instance", ".*").replace("$__rate_interval", "5s").replace("$__interval", "5s")
        return site.scraper.query(filled) or title in EMPTY_WITHOUT_RELAYS or title == "Restarts"

    for title, expression in expressions():
        wait_until(lambda title=title, expression=expression: drawn(title, expression), f"{title}: {expression}")


@REAL
def test_the_rules_work_on_real_figures_and_a_healthy_gateway_raises_no_alert(site):
    def rules():
        found = [rule for group in site.scraper.ask("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else None

    found = wait_until(rules, "all rules evaluated", PATIENCE_S)
    assert {rule["name"] for rule in found} == set(ALERTS)
    assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in found} == {
        (alert, "ok", None) for alert in ALERTS
    }
    states = {rule["name"]: rule["state"] for rule in found}
    assert {name for name, state in states.items() if state == "firing"} == set()
    assert {name for name, state in states.items() if state == "pending"} == {"FirezoneGatewayNoRelays"}


@REAL
def test_the_portal_s_absence_shows(site):
    site.portal.stop()
    wait_until(lambda: site.scraper.value("firezone_gateway_portal_joined") == 0, "it is seen", PATIENCE_S)
    assert site.scraper.value("firezone_gateway_ready") == 1
    wait_until(lambda: site.scraper.value("portal_connection_hiccup_total") >= 2, "hiccups", PATIENCE_S)
    wait_until(lambda: site.scraper.value("firezone_gateway_portal_partition_seconds") > 1, "its age", PATIENCE_S)


@pytest.mark.needs("root", "ip", "setpriv", "unshare", "tun")
@pytest.mark.spec("OPS-42")
def test_without_being_asked_for_there_are_no_metrics(portal, start):
    for words in ({}, {"FIREZONE_METRICS": "otel-collector"}):
        gateway = start(portal=portal, **words)
        gateway.wait_ready()
        assert gateway.http("/metrics")[0] == 404
        assert gateway.terminate() == 0


def expressions():
    """Title and expression of everything that the dashboard asks Prometheus for."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]

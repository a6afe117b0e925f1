"""Flow logs of a whole deployment: what is printed, what reaches the collector, what the end leaves behind."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from gateway_process import inside

from tests.lab.certificates import Authority
from tests.lab.process import wait_until
from tests.lab.scenario import PORTAL_NAME, Lab

pytestmark = [
    pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun", "openssl"),
    pytest.mark.slow,
]

MEGABYTE = 1_000_000
BY_DNS = "http://dns.httpbin.search.test/get"
COUNT_MARKED = """
table inet marked {
  chain out {
    type filter hook output priority 0
    tcp dport 443 meta mark 0xfd002021 counter comment "marked"
    tcp dport 443 meta mark != 0xfd002021 counter comment "unmarked"
  }
}
"""


class Collector:
    """Stores what is posted to port 443 of the portal's address; answers with `status`."""

    def __init__(self, lab):
        self.status = 200
        self.requests = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = b'{"data":{"status":"ok"}}'
                self.send_response(collector.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        place = lab.places["portal"]
        with inside(place.namespace):
            self.server = ThreadingHTTPServer((place.public_ipv4, 443), Handler, bind_and_activate=True)
        context = Authority(lab.directory / "tls").server_context(["collector", PORTAL_NAME])
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def records(self):
        return [record for _, _, body in list(self.requests) for record in body["flow_logs"]]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def deployment():
    """A lab whose gateway prints flow records and uploads them every second, and the collector."""
    environment = {"FIREZONE_FLOW_LOGS": "true"}
    with Lab(tls=True, gateway_id=None, gateway_environment=environment, start_gateway=False) as lab:
        collector = Collector(lab)
        lab.portal.settings(
            flow_logs={"api_url": f"https://{PORTAL_NAME}/x", "upload_interval_secs": 1, "upload_batch_size": 0}
        )
        lab.start_gateway()
        lab.places["gateway"].namespace.nft(COUNT_MARKED)
        lab.start_client(0)
        assert lab.client.curl(BY_DNS).ok
        wait_until(lambda: printed(lab), timeout=5, what="the end of that flow")
        yield SimpleNamespace(lab=lab, collector=collector)
        collector.close()


@pytest.fixture
def lab(deployment):
    """Warnings of this test fail it."""
    before = deployment.lab.warnings()
    yield deployment.lab
    assert deployment.lab.warnings()[len(before) :] == []


def printed(lab, since=0, message="TCP flow completed"):
    """Records of the log as tooling reads them: `key=value` at blanks."""
    lines = [
        line for line in lab.gateway.process.log_text()[since:].splitlines() if re.search(f"flow_logs.*{message}", line)
    ]
    return [dict(word.split("=", 1) for word in line.split(" ") if "=" in word) for line in lines]


def position(lab):
    return len(lab.gateway.process.log_text())


def completed(lab, since, count=1):
    """The completed TCP flows, once there are `count`; and no more than those two seconds later."""
    wait_until(lambda: len(printed(lab, since)) >= count, timeout=5, what=f"{count} completed flows")
    time.sleep(2.0)
    return printed(lab, since)


@pytest.mark.spec("OPS-38")
def test_s9_a_download_is_one_flow_with_all_its_bytes(lab):
    since = position(lab)
    assert lab.client.curl("http://download.httpbin/bytes?num=10000000", "-o", "/dev/null").ok
    (flow,) = completed(lab, since)
    assert flow["inner_dst_ip"] == "172.21.0.101"
    assert flow["domain"] == "download.httpbin"
    assert 10_000_000 <= int(flow["rx_bytes"]) < 11_000_000
    assert flow["protocol"] == "tcp"
    assert flow["role"] == "responder"
    assert flow["inner_src_ip"].startswith("100.")
    (started,) = printed(lab, since, "TCP flow started")
    assert started["flow_start"] == flow["flow_start"]
    for outer in json.loads(flow["outers"]):
        assert set(outer) == {"src_ip", "src_port", "dst_ip", "dst_port", "path_activated_at"}


def test_what_was_printed_reaches_the_collector_and_leaves_the_spool(deployment, lab):
    wanted = {(flow["inner_src_port"], flow["flow_start"]) for flow in printed(lab)}
    assert wanted

    def arrived():
        return {(str(r["inner_src_port"]), r["flow_start"]) for r in deployment.collector.records if "flow_end" in r}

    wait_until(lambda: wanted <= arrived(), timeout=10, what="all completed flows at the collector")
    path, headers, _ = deployment.collector.requests[0]
    assert path == "/ingestion/flow_logs"
    assert headers["Authorization"].startswith("Bearer eyJ")
    assert headers["Authorization"][7:60] not in lab.gateway.process.log_text()
    spool = lab.directory / "gateway-var-lib" / "firezone" / "flow_logs"
    wait_until(lambda: not list(spool.rglob("*.end.json")), timeout=5, what="an empty spool")
    assert json.loads((spool / "upload.json").read_text())["interval"] == 1


def test_uploads_are_marked_so_that_no_tunnel_takes_them(lab):
    counted = lab.places["gateway"].namespace.run("nft", "list", "table", "inet", "marked").stdout
    assert re.search(r'packets [1-9]\d* bytes \d+ comment "marked"', counted)
    assert re.search(r'packets 0 bytes 0 comment "unmarked"', counted)


@pytest.mark.spec("TUNNEL-100")
def test_the_end_records_open_flows_says_goodbye_and_takes_no_longer_than_six_seconds(deployment, lab):
    deployment.collector.status = 503
    spool = lab.directory / "gateway-var-lib" / "firezone" / "flow_logs"
    since, mark = position(lab), len(lab.client.log())
    with ThreadPoolExecutor(1) as pool:
        url = "http://download.httpbin/bytes?num=100000000"
        job = pool.submit(lab.client.curl, url, "-o", "/dev/null", "--limit-rate", "300k", "--max-time", "8")
        wait_until(lambda: printed(lab, since, "TCP flow started"), timeout=10, what="a flow")
        time.sleep(1.5)
        began = time.monotonic()
        assert lab.gateway.process.stop(timeout=15) == 0
        assert time.monotonic() - began < 6.5
        (flow,) = printed(lab, since)
        assert int(flow["rx_bytes"]) > 100_000
        ends = [json.loads(path.read_text())["payload"] for path in spool.rglob("*.end.json")]
        assert flow["flow_start"] in {end["flow_start"] for end in ends}
        wait_until(lambda: any("goodbye" in str(entry) for entry in lab.client.log()[mark:]), timeout=3, what="goodbye")
        job.cancel()
        assert not job.result(timeout=30).ok

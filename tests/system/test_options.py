"""Options, variables and defaults of the program, as its own log at DEBUG and its exit status tell them."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess

import pytest
from gateway_process import TOKEN

from tests.lab.process import lab_environment
from tests.lab.program import gateway_command

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "setpriv")]

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
DEFAULTS = {
    "api_url": "wss://api.firezone.dev",
    "no_telemetry": "False",
    "no_check": "True",  # by which these runs get so far
    "health_check_addr": "0.0.0.0:8080",
    "log_format": "human",
    "flow_logs": "False",
    "metrics": "sentry",
    "validate_checksums": "False",
    "no_inc_buf": "False",
    "masquerade": "auto",
    "max_partition_time": "86400.0",
}
# Option as the log names it: variable, its value, the long and the short option, its value, both values as logged.
VALUES = {
    "api_url": ("FIREZONE_API_URL", "ws://a.example", "--api-url", "-u", "ws://b.example", "ws://a.example"),
    "firezone_name": ("FIREZONE_NAME", "one", "--firezone-name", "-n", "other", "one"),
    "firezone_id": ("FIREZONE_ID", "mine", "--firezone-id", "-i", "yours", "mine"),
    "health_check_addr": ("HEALTH_CHECK_ADDR", "127.0.0.1:1", "--health-check-addr", "", "[::1]:2", "127.0.0.1:1"),
    "metrics": ("FIREZONE_METRICS", "stdout", "--metrics", "", "otel-collector", "stdout"),
    "otlp_grpc_endpoint": ("OTLP_GRPC_ENDPOINT", "h:1", "--otlp-grpc-endpoint", "", "h:2", "h:1"),
    "masquerade": ("FIREZONE_MASQUERADE", "on", "--masquerade", "", "off", "on"),
    "max_partition_time": ("FIREZONE_MAX_PARTITION_TIME", "1h 30m", "--max-partition-time", "-m", "5m", "5400.0"),
}
LOGGED = {"5m": "300.0"}
FLAGS = {
    "no_telemetry": ("FIREZONE_NO_TELEMETRY", "--no-telemetry"),
    "flow_logs": ("FIREZONE_FLOW_LOGS", "--flow-logs"),
    "validate_checksums": ("FIREZONE_VALIDATE_CHECKSUMS", "--validate-checksums"),
    "no_inc_buf": ("FIREZONE_NO_INC_BUF", "--no-inc-buf"),
}


def begin(namespace, *arguments, **environment):
    """Starts the program as nobody, so that a gateway ends where it makes its device."""
    return subprocess.Popen(
        [*namespace.prefix(), *NOBODY, *gateway_command(), *arguments],
        env={"PATH": os.environ["PATH"], **lab_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Its status and what it said, with no secret in it."""
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert TOKEN not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(namespace, *arguments, **environment):
    return end(begin(namespace, *arguments, **environment))


def run_all(namespace, *runs):
    """At the same time, with these arguments, or as dictionaries with these variables and a token."""
    begun = [
        begin(namespace, TOKEN, **each) if isinstance(each, dict) else begin(namespace, *each, FIREZONE_TOKEN=TOKEN)
        for each in runs
    ]
    return [end(process) for process in begun]


def options_of(namespace, *arguments, **environment):
    """What a gateway that is started like this takes its options to be."""
    log = {"RUST_LOG": "debug", "FIREZONE_LOG_FORMAT": "json"}
    done = run(namespace, "--no-check", *arguments, TOKEN, **log | environment)
    assert (done.returncode, done.stderr) == (1, ""), done
    entries = map(json.loads, done.stdout.splitlines())
    (shown,) = [entry for entry in entries if entry["message"] == "Options"]
    assert shown.pop("token") == "***"
    known = {*DEFAULTS, *VALUES}
    return {name: value for name, value in shown.items() if name in known}


@pytest.mark.spec("OPS-1", "OPS-41")
def test_defaults(namespace):
    done = run(namespace, "--no-check", TOKEN, RUST_LOG="debug")
    (line,) = [line for line in done.stdout.splitlines() if "Options" in line]
    assert dict(re.findall(r" (\w+)=(\S+)", line)).items() >= DEFAULTS.items()
    assert not {"firezone_name", "firezone_id", "otlp_grpc_endpoint"} & set(re.findall(r" (\w+)=", line))


@pytest.mark.spec("OPS-1", "OPS-6")
def test_every_variable_reaches_its_option(namespace):
    variables = {variable: text for variable, text, *_ in VALUES.values()}
    variables |= {variable: "true" for variable, _ in FLAGS.values()}
    shown = options_of(namespace, **variables)
    wanted = {name: value for name, (*_, value) in VALUES.items()} | dict.fromkeys(FLAGS, "True")
    assert shown == DEFAULTS | wanted | {"log_format": "json"}


@pytest.mark.spec("OPS-1", "OPS-2")
@pytest.mark.parametrize("form", ["long", "short"])
def test_every_option_wins_over_its_variable(namespace, form):
    variables = {variable: text for variable, text, *_ in VALUES.values()}
    variables |= {variable: "false" for variable, _ in FLAGS.values()}
    words, wanted = [], {}
    for name, (_, _, long, short, text, _) in VALUES.items():
        words += [short if form == "short" and short else long, text]
        wanted[name] = LOGGED.get(text, text)
    words += [flag for _, flag in FLAGS.values()]
    shown = options_of(namespace, *words, "--log-format", "json", **variables | {"FIREZONE_LOG_FORMAT": "human"})
    assert shown == DEFAULTS | wanted | dict.fromkeys(FLAGS, "True") | {"log_format": "json"}


@pytest.mark.spec("OPS-6")
def test_empty_variables_count_as_unset_and_false_is_false(namespace):
    variables = {variable: "" for variable, *_ in VALUES.values() if variable != "FIREZONE_API_URL"}  # empty: no start
    words = itertools.cycle(["false", "FALSE", "0", ""])
    variables |= {variable: next(words) for variable, _ in FLAGS.values()}
    assert options_of(namespace, **variables).items() >= (DEFAULTS | {"log_format": "json"}).items()


@pytest.mark.spec("OPS-6", "OPS-3")
def test_a_variable_that_is_no_boolean_is_a_usage_error_that_names_it(namespace):
    variables = [variable for variable, _ in FLAGS.values()]
    for variable, done in zip(variables, run_all(namespace, *({name: "maybe"} for name in variables)), strict=True):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            f"firezone-gateway: the variable {variable} cannot be used: 'maybe' is neither true nor false"
        )
        assert done.stderr.count("\n") == 1


@pytest.mark.spec("OPS-8")
def test_a_duration_has_units(namespace):
    accepted = ["5m", "1h", "30d", "1h 30m", "90s"]
    runs = [["-m", duration, "-i", "any", "id"] for duration in accepted]
    for done in run_all(namespace, *runs):
        assert (done.returncode, done.stderr) == (0, "")
    for done in run_all(namespace, ["-m", "90", TOKEN], {"FIREZONE_MAX_PARTITION_TIME": "90"}):
        assert (done.returncode, done.stdout) == (2, "")
        assert "'90' is not a duration" in done.stderr


@pytest.mark.spec("OPS-7")
def test_variables_of_old_unit_files_do_nothing(portal, start):
    gateway = start(
        portal=portal,
        FIREZONE_ENABLE_MASQUERADE="1",
        FIREZONE_NUM_TUN_THREADS="many",
        LOG_FORMAT="json",
        RUST_LOG_STYLE="always",
    )
    gateway.wait_ready()
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}
    assert "\x1b" not in gateway.output


@pytest.mark.spec("OPS-3", "OPS-5")
def test_help_and_version_are_no_errors_and_show_no_values(namespace):
    *helped, short, long = run_all(namespace, ["-h"], ["--help"], ["-V"], ["--version"])
    for done in helped:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: firezone-gateway ")
    for done in (short, long):
        assert (done.returncode, done.stdout, done.stderr) == (0, "firezone-gateway 1.6.1\n", "")

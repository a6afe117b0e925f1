"""Options, variables, defaults; what is said when they cannot be used. The process behind them is a stub."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys

import pytest

from fzg import app, cli
from fzg.host import capabilities

TOKEN = ".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl"
VARIABLES = {
    "FIREZONE_API_URL": ("api_url", "wss://portal.example", "wss://portal.example"),
    "FIREZONE_NAME": ("name", "edge", "edge"),
    "FIREZONE_ID": ("firezone_id", "identity", "identity"),
    "HEALTH_CHECK_ADDR": ("health_address", "127.0.0.1:9090", "127.0.0.1:9090"),
    "FIREZONE_FLOW_LOGS": ("flow_logs", "true", True),
    "FIREZONE_VALIDATE_CHECKSUMS": ("validate_checksums", "true", True),
    "FIREZONE_NO_INC_BUF": ("increase_buffers", "true", False),
    "FIREZONE_MAX_PARTITION_TIME": ("max_partition_time", "1h 30m", 5400.0),
    "FIREZONE_MASQUERADE": ("masquerade", "off", "off"),
}
OPTIONS = {
    ("-u", "ws://other.example"): ("api_url", "ws://other.example"),
    ("--api-url", "ws://other.example"): ("api_url", "ws://other.example"),
    ("-n", "node"): ("name", "node"),
    ("--firezone-name", "node"): ("name", "node"),
    ("-i", "me"): ("firezone_id", "me"),
    ("--firezone-id", "me"): ("firezone_id", "me"),
    ("--health-check-addr", "[::1]:1234"): ("health_address", "[::1]:1234"),
    ("--flow-logs",): ("flow_logs", True),
    ("--validate-checksums",): ("validate_checksums", True),
    ("--no-inc-buf",): ("increase_buffers", False),
    ("-m", "5m"): ("max_partition_time", 300.0),
    ("--max-partition-time", "5m"): ("max_partition_time", 300.0),
    ("--masquerade", "on"): ("masquerade", "on"),
}


class Outcome:
    def __init__(self, status, settings, out, err):
        self.status, self.settings, self.out, self.err = status, settings, out, err


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in an environment of its own, with an application that only keeps its settings."""
    for name in list(os.environ):
        if name.startswith(("FIREZONE_", "HEALTH_", "OTLP_", "RUST_LOG", "CREDENTIALS_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(capabilities, "has_net_admin", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a process that ends ignores signals; this one does not end
    seen = []

    class Stub:
        def __init__(self, settings):
            seen.append(settings)

        def run(self):
            return 0

    monkeypatch.setattr(app, "App", Stub)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def main(*arguments, identity="test", **environment):
        if identity is not None:
            environment.setdefault("FIREZONE_ID", identity)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["firezone-gateway", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code, seen[-1] if seen else None, *capsys.readouterr())

    yield main
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("pyroute2", "asyncio", "geventwebsocket", "websocket", "dns", "fzg"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.raiseExceptions = True


def shown(value):
    return value if isinstance(value, bool | float) else str(value)


@pytest.mark.spec("OPS-1", "OPS-41")
@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_reaches_its_setting(run, variable):
    name, text, value = VARIABLES[variable]
    assert shown(getattr(run(TOKEN, **{variable: text}).settings, name)) == value


@pytest.mark.spec("OPS-1", "OPS-41")
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_its_setting(run, option):
    name, value = OPTIONS[option]
    assert shown(getattr(run(*option, TOKEN).settings, name)) == value


@pytest.mark.spec("OPS-1", "OPS-41", "OPS-58")
def test_defaults(run):
    settings = run(TOKEN).settings
    assert settings.api_url == "wss://api.firezone.dev"
    assert settings.name == socket.gethostname()
    assert str(settings.health_address) == "0.0.0.0:8080"
    assert settings.max_partition_time == 86_400
    assert settings.increase_buffers is True
    assert settings.flow_logs is False
    assert settings.validate_checksums is False
    assert settings.masquerade == "auto"
    assert settings.tun_fd is None
    assert (settings.offloads.udp_gso, settings.offloads.udp_gro, settings.offloads.tun) == (True, True, True)
    assert (settings.udp_send_buffer, settings.udp_receive_buffer) == (None, None)


@pytest.mark.spec("OPS-1")
def test_what_has_no_effect_is_accepted(run):
    outcome = run(
        "--no-telemetry", "--metrics", "otel-collector", "--otlp-grpc-endpoint", "127.0.0.1:4317", "--no-check", TOKEN
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert run(TOKEN, FIREZONE_METRICS="stdout", FIREZONE_NO_TELEMETRY="true", OTLP_GRPC_ENDPOINT="h:1").status == 0


@pytest.mark.spec("OPS-2")
@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("FIREZONE_API_URL", ("-u", "ws://other.example")),
        ("FIREZONE_NAME", ("-n", "node")),
        ("FIREZONE_ID", ("-i", "me")),
        ("HEALTH_CHECK_ADDR", ("--health-check-addr", "[::1]:1234")),
        ("FIREZONE_MAX_PARTITION_TIME", ("-m", "5m")),
        ("FIREZONE_MASQUERADE", ("--masquerade", "on")),
    ],
)
def test_the_command_line_wins_over_the_environment(run, variable, option):
    name, value = OPTIONS[option]
    assert shown(getattr(run(*option, TOKEN, **{variable: VARIABLES[variable][1]}).settings, name)) == value


@pytest.mark.spec("OPS-2")
def test_a_flag_on_the_command_line_wins_over_a_false_variable(run):
    assert run("--flow-logs", TOKEN, FIREZONE_FLOW_LOGS="false").settings.flow_logs is True


@pytest.mark.spec("OPS-2", "OPS-13")
def test_the_token_comes_from_the_argument_then_the_variable_then_the_credential(run, tmp_path):
    (tmp_path / "FIREZONE_TOKEN").write_text("third\n")
    sources = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert run(**sources).settings.token.reveal() == "third"
    sources["FIREZONE_TOKEN"] = "sec ond"
    assert run(**sources).settings.token.reveal() == "second"
    assert run("first", **sources).settings.token.reveal() == "first"


def test_an_empty_portal_url_is_not_the_default_one_to_which_the_token_would_go(run):
    assert run(TOKEN, FIREZONE_API_URL="").settings.api_url == ""
    assert run("-u", "wss://portal.example", TOKEN, FIREZONE_API_URL="").settings.api_url == "wss://portal.example"


@pytest.mark.spec("OPS-6")
@pytest.mark.parametrize("variable", [name for name in VARIABLES if "TOKEN" not in name])
def test_an_empty_variable_counts_as_unset(run, variable):
    name, _, value = VARIABLES[variable]
    outcome = run(TOKEN, **{variable: ""})
    assert outcome.status == 0
    assert shown(getattr(outcome.settings, name)) != value


@pytest.mark.spec("OPS-6")
@pytest.mark.parametrize(
    "variable",
    [
        "FIREZONE_NO_TELEMETRY",
        "FIREZONE_FLOW_LOGS",
        "FIREZONE_VALIDATE_CHECKSUMS",
        "FIREZONE_NO_INC_BUF",
        "FIREZONE_NO_UDP_GSO",
        "FIREZONE_NO_UDP_GRO",
        "FIREZONE_NO_TUN_OFFLOAD",
    ],
)
def test_a_variable_that_is_no_boolean_is_a_usage_error_that_names_it(run, variable):
    for word in ("true", "FALSE", "1", "no", ""):
        assert run(TOKEN, **{variable: word}).status == 0
    outcome = run(TOKEN, **{variable: "maybe"})
    assert outcome.status == 2
    assert f"the variable {variable} cannot be used: 'maybe' is neither true nor false" in outcome.err


@pytest.mark.spec("OPS-7")
@pytest.mark.parametrize(
    "variable",
    [
        "FIREZONE_ENABLE_MASQUERADE",
        "FIREZONE_NUM_TUN_THREADS",
        "LOG_FORMAT",
        "RUST_LOG_STYLE",
        "GOOGLE_CLOUD_PROJECT_ID",
    ],
)
def test_variables_of_old_unit_files_do_no_harm(run, variable):
    outcome = run(TOKEN, **{variable: "anything"})
    assert (outcome.status, outcome.err) == (0, "")
    assert "Logging started" in outcome.out


@pytest.mark.spec("OPS-3", "OPS-19")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense"], "No such option '--nonsense'"),
        (["-m"], "requires an argument"),
        (["-m", "90"], "'90' is not a duration"),
        (["--log-format", "xml"], "'xml' is not one of 'human', 'json'"),
        (["--log-format", "JSON"], "'JSON' is not one of"),
        (["--metrics", "none"], "'none' is not one of"),
        (["--health-check-addr", "localhost:80"], "'localhost:80' is not an address"),
        (["--masquerade", "maybe"], "'maybe' is not one of"),
        (["-m", "5m", "-m", "5m"], "--max-partition-time stands more than once"),
        (["-n", "a", "--firezone-name", "b"], "stands more than once"),
        (["--flow-logs", "--flow-logs"], "--flow-logs stands more than once"),
    ],
)
def test_a_usage_error_is_one_line_on_standard_error_and_status_2(run, arguments, said):
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("firezone-gateway: ")


@pytest.mark.spec("OPS-3")
@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("HEALTH_CHECK_ADDR", "nonsense", "is not an address"),
        ("FIREZONE_LOG_FORMAT", "xml", "is not one of"),
        ("FIREZONE_MAX_PARTITION_TIME", "90", "is not a duration"),
    ],
)
def test_a_bad_variable_is_named(run, variable, text, said):
    outcome = run(TOKEN, **{variable: text})
    assert outcome.status == 2
    assert f"the variable {variable} cannot be used" in outcome.err
    assert said in outcome.err


@pytest.mark.spec("OPS-5")
def test_a_surplus_argument_is_not_repeated(run):
    outcome = run("--flow-logs", "first", TOKEN)
    assert outcome.status == 2
    assert "more than one argument that is not an option" in outcome.err
    assert TOKEN not in outcome.err


@pytest.mark.parametrize(("typo", "meant"), [("statsu", "status"), ("dran", "drain"), ("doctors", "doctor")])
def test_a_token_that_looks_like_a_misspelt_command_is_a_token_and_told_so(run, typo, meant):
    outcome = run(typo, RUST_LOG="no-level=x")
    assert f"the argument is taken as the token; if it was to be the command {meant}, stop this" in outcome.err


@pytest.mark.parametrize("token", ["t", TOKEN, "some-token"])
def test_of_other_tokens_nothing_is_said(run, token):
    assert "taken as the token" not in run(token, RUST_LOG="no-level=x").err


@pytest.mark.spec("OPS-3", "OPS-4")
@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_one_line(run, option):
    outcome = run(option)
    assert (outcome.status, outcome.out, outcome.err) == (0, "firezone-gateway 1.6.1\n", "")


@pytest.mark.spec("OPS-1", "OPS-3", "OPS-5")
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_the_public_options_and_no_values(run, option):
    outcome = run(option, FIREZONE_TOKEN=TOKEN, FIREZONE_NAME="bureau")
    assert (outcome.status, outcome.err) == (0, "")
    for name in ("--firezone-name", "--firezone-id", "--no-telemetry", "--no-check", "--log-format", "--flow-logs"):
        assert name in outcome.out
    for name in ("--no-inc-buf", "--max-partition-time", "TOKEN", "FIREZONE_TOKEN", "-V", "-h"):
        assert name in outcome.out
    for name in ("--otlp-grpc-endpoint", "--validate-checksums", "--api-url", "--tun-fd"):
        assert name not in outcome.out
    assert TOKEN not in outcome.out
    assert "bureau" not in outcome.out


@pytest.mark.spec("OPS-14", "OPS-19")
def test_without_a_token_all_three_sources_are_named(run):
    outcome = run()
    assert outcome.status == 1
    (line,) = [line for line in outcome.out.splitlines() if "ERROR" in line]
    assert "argument" in line
    assert "variable FIREZONE_TOKEN" in line
    assert "systemd credential FIREZONE_TOKEN" in line


@pytest.mark.spec("OPS-14", "OPS-19")
def test_a_credential_that_is_not_there_is_told_with_its_cause(run, tmp_path):
    outcome = run(CREDENTIALS_DIRECTORY=str(tmp_path))
    assert outcome.status == 1
    assert "the credential could not be read): [Errno 2] No such file" in outcome.out


@pytest.mark.spec("OPS-20")
@pytest.mark.parametrize("directives", ["info,fzg=loud", "=debug", "fzg=", "fzg::app=info=debug"])
def test_a_filter_that_cannot_be_understood_is_reported_on_standard_error(run, directives):
    outcome = run(TOKEN, RUST_LOG=directives)
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith("firezone-gateway: the log filter RUST_LOG cannot be used: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.spec("OPS-15")
def test_without_the_privilege_two_lines_say_what_to_do(run, monkeypatch):
    monkeypatch.setattr(capabilities, "has_net_admin", lambda: False)
    outcome = run(TOKEN)
    assert (outcome.status, outcome.out, outcome.settings) == (1, "", None)
    assert "root" in outcome.err
    assert "CAP_NET_ADMIN" in outcome.err
    assert "setcap cap_net_admin+eip" in outcome.err
    assert run("--no-check", TOKEN).status == 0


@pytest.mark.spec("OPS-5")
def test_the_options_are_logged_at_debug_without_the_token(run):
    outcome = run(TOKEN, RUST_LOG="trace", FIREZONE_NAME="bureau")
    (line,) = [line for line in outcome.out.splitlines() if "Options" in line]
    assert " DEBUG " in line
    assert "firezone_name=bureau" in line
    assert "token=***" in line
    assert TOKEN not in outcome.out


@pytest.mark.spec("OPS-34")
def test_json_lines_on_request(run):
    outcome = run("--log-format", "json", TOKEN)
    first = json.loads(outcome.out.splitlines()[0])
    assert first["message"] == "Logging started"
    assert first["version"] == "1.6.1"
    assert {"timestamp", "level", "target", "arch", "os", "system_uptime"} <= first.keys()


def test_buffer_sizes_come_from_the_environment_and_nonsense_is_ignored(run):
    settings = run(TOKEN, FIREZONE_UDP_SEND_BUFFER_SIZE="65536", FIREZONE_UDP_RECV_BUFFER_SIZE="many").settings
    assert (settings.udp_send_buffer, settings.udp_receive_buffer) == (65_536, None)


def test_a_buffer_size_that_is_ignored_is_told_at_debug(run):
    said = run(TOKEN, RUST_LOG="debug", FIREZONE_UDP_SEND_BUFFER_SIZE="2 MiB", FIREZONE_UDP_RECV_BUFFER_SIZE="1").out
    (line,) = [line for line in said.splitlines() if "is ignored" in line]
    assert "DEBUG" in line
    assert "variable=FIREZONE_UDP_SEND_BUFFER_SIZE" in line
    assert 'value="2 MiB"' in line


def test_offloads_can_be_switched_off(run):
    settings = run(TOKEN, FIREZONE_NO_UDP_GSO="1", FIREZONE_NO_UDP_GRO="yes", FIREZONE_NO_TUN_OFFLOAD="on").settings
    assert (settings.offloads.udp_gso, settings.offloads.udp_gro, settings.offloads.tun) == (False, False, False)

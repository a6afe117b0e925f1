"""The command line (spec operations 1.1 to 1.5): options and variables to `Settings`, errors to one line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click
from click.core import ParameterSource

from fzg import commands, early_signals
from fzg import settings as s
from fzg.host.arguments import hide_argument
from fzg.host.masquerade import Masquerade
from fzg.ops import logs
from fzg.secret import MASK
from fzg.settings import LogFormat, MetricsExporter, Offloads, SettingError, Settings
from fzg.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from click.shell_completion import CompletionItem

T = TypeVar("T")

_LOG = logging.getLogger("firezone_gateway")

EXIT_FAILURE = 1
EXIT_USAGE = 2


class _Parsed(click.ParamType[Any, Any]):
    """A click type around one of the parsers of `fzg.settings`."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


class _OnceOption(click.Option):
    """An option that may stand once only, and whose flag form reads our words for true and false.

    `empty_counts`: a variable that is set and empty is a value, where click takes it as unset.
    """

    def __init__(self, *names: Any, empty_counts: bool = False, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self._empty_counts = empty_counts

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        for name in (*self.opts, *self.secondary_opts):
            option = parser._long_opt.get(name) or parser._short_opt.get(name)  # noqa: SLF001 - click has no hook for this
            if option is not None:
                _refuse_repetition(option, name)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        value = self.resolve_envvar_value(ctx)
        if value is None and self._empty_counts and isinstance(self.envvar, str):
            value = os.environ.get(self.envvar)
        if value is None or not self.is_flag:
            return value
        try:
            return s.parse_flag(value)
        except SettingError as error:
            # click records where a value came from only after it has it
            raise click.UsageError(f"the variable {self.envvar} cannot be used: {error}") from error


def _refuse_repetition(option: Any, name: str) -> None:
    process = option.process

    def once(value: Any, state: Any) -> None:
        if option.dest in state.opts:
            raise click.UsageError(f"the option {name} stands more than once")
        process(value, state)

    option.process = once


def _option(*names: str, env: str | None = None, **attributes: Any) -> Callable[[T], T]:
    """An option; its help names the variable but never shows a value, which may be a secret (operations 1.1)."""
    if env is not None and "help" in attributes:
        attributes["help"] += f" [env: {env}]"
    return click.option(*names, cls=_OnceOption, envvar=env, **attributes)  # type: ignore[return-value]


class _GatewayCommand(click.Command):
    """Stops at the first argument that is no option; if that is a command's word, the rest belongs to the command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options: list[click.Parameter] = [param for param in self.params if isinstance(param, click.Option)]
        parser = click.Command(self.name, params=options).make_parser(ctx)
        parser.allow_interspersed_args = False
        seen, rest, _ = parser.parse_args(list(args))
        ctx.meta[_VERBOSE] = bool(seen.get("verbose"))
        own = args[: len(args) - len(rest)]
        if rest and rest[0] in commands.COMMANDS and own[-1:] != ["--"]:
            ctx.meta[_COMMAND] = rest
            args = own
        return super().parse_args(ctx, args)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The operator's commands, each with what it is for."""
        with formatter.section("Commands (firezone-gateway COMMAND --help says more)"):
            formatter.write_dl([(name, commands.load(name).short_help or "") for name in commands.COMMANDS])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What may stand here; behind a command's word that is the command's own."""
        if _COMMAND not in ctx.meta:
            return super().shell_complete(ctx, incomplete)
        name = ctx.meta[_COMMAND][0]
        own = commands.load(name)
        return own.shell_complete(click.Context(own, info_name=name, parent=ctx), incomplete)


def _complete_word(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The commands; tokens are nobody's to guess."""
    return [] if _COMMAND in ctx.meta else [name for name in commands.COMMANDS if name.startswith(incomplete)]


_LONGEST_TYPO = 16  # characters: tokens of portals have a hundred and more
_ALIKE = 0.7  # of difflib: two letters exchanged, one missing or one too many
_COMMAND = "fzg.command"
_VERBOSE = "fzg.verbose"


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - click's signature
    if not wanted:
        return
    if ctx.meta[_VERBOSE]:
        from fzg.ops import about

        click.echo("\n".join(about.lines()))
    else:
        click.echo(f"firezone-gateway {VERSION}")
    ctx.exit()


@click.command(cls=_GatewayCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("token", required=False, metavar="[TOKEN]", shell_complete=_complete_word)
@_option(
    "-u",
    "--api-url",
    env="FIREZONE_API_URL",
    empty_counts=True,  # else a template without a value would give the token to the default portal
    default=s.DEFAULT_API_URL,
    metavar="URL",
    hidden=True,
)
@_option(
    "-n",
    "--firezone-name",
    env="FIREZONE_NAME",
    metavar="NAME",
    help="Name shown in the portal. Default: the host name.",
)
@_option(
    "-i",
    "--firezone-id",
    env="FIREZONE_ID",
    metavar="ID",
    help="Stable identity of this gateway. Default: derived from the machine.",
)
@_option(
    "--no-telemetry",
    is_flag=True,
    env="FIREZONE_NO_TELEMETRY",
    help="Accepted and without effect: no telemetry is ever sent.",
)
@_option("--no-check", is_flag=True, help="Skip the check for root or CAP_NET_ADMIN.")
@_option(
    "--health-check-addr",
    env="HEALTH_CHECK_ADDR",
    default=s.DEFAULT_HEALTH_ADDRESS,
    type=_Parsed("IP:PORT", s.parse_socket_address),
    metavar="IP:PORT",
    help="Where /healthz and /readyz listen. Default: 0.0.0.0:8080.",
)
@_option(
    "--log-format",
    env="FIREZONE_LOG_FORMAT",
    default="human",
    type=click.Choice([str(f) for f in LogFormat]),
    help="Format of log lines.",
)
@_option(
    "--flow-logs",
    is_flag=True,
    env="FIREZONE_FLOW_LOGS",
    help="Track flows and print them, whatever the portal says.",
)
@_option(
    "--metrics",
    env="FIREZONE_METRICS",
    default="sentry",
    type=click.Choice([str(m) for m in MetricsExporter]),
    metavar="WORD",
    help="`prometheus` serves /metrics on the health address; other words are accepted and without effect.",
)
@_option("--otlp-grpc-endpoint", env="OTLP_GRPC_ENDPOINT", metavar="HOST:PORT", hidden=True)
@_option("--validate-checksums", is_flag=True, env="FIREZONE_VALIDATE_CHECKSUMS", hidden=True)
@_option(
    "--no-inc-buf",
    is_flag=True,
    env="FIREZONE_NO_INC_BUF",
    help="Leave net.core.rmem_max and wmem_max alone.",
)
@_option(
    "--masquerade",
    env="FIREZONE_MASQUERADE",
    default="auto",
    type=click.Choice([str(m) for m in Masquerade]),
    help="Translate clients' addresses to the host's.",
)
@_option(
    "-m",
    "--max-partition-time",
    env="FIREZONE_MAX_PARTITION_TIME",
    default=s.DEFAULT_MAX_PARTITION_TIME,
    type=_Parsed("DURATION", s.parse_duration),
    metavar="DURATION",
    help="How long to serve on without the portal, e.g. 5m, 1h, 30d. Default: 24h.",
)
@_option(
    "--tun-fd", type=int, hidden=True, help="Use this inherited descriptor (virtio framing) instead of a TUN device."
)
@_option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@_option("--verbose", is_flag=True, help="With --version: also the engine, the libraries and the build.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Let Firezone clients reach the resources of this network.

    TOKEN is the site's or gateway's token; better put it into FIREZONE_TOKEN, or into the systemd credential of that
    name, since arguments are visible to every user of the host.
    """
    if options.pop("verbose"):
        raise click.UsageError("--verbose goes with --version; RUST_LOG=debug makes the log say more")
    _refuse_what_is_no_text(options)
    options["offloads"] = _offloads(os.environ)
    if _COMMAND in ctx.meta:
        name, *arguments = ctx.meta[_COMMAND]
        early_signals.give_back()
        sys.exit(commands.run(name, arguments, options))
    sys.exit(_run(options, os.environ))


def main() -> NoReturn:
    """Run the command line; usage errors exit 2, every other failure 1."""
    try:
        code = command.main(prog_name="firezone-gateway", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"firezone-gateway: {_sentence(error)} (--help lists the options)", err=True)
        code = EXIT_USAGE
    except click.ClickException as error:  # of a command
        click.echo(f"firezone-gateway: {error.format_message()}", err=True)
        code = EXIT_FAILURE
    except click.exceptions.Abort:  # an interrupt before the gateway had begun
        code = EXIT_FAILURE
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:
            click.echo(f"firezone-gateway: {error.strerror}", err=True)
        code = EXIT_FAILURE  # else nobody reads what we print
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the interpreter's own end would make the second one fatal
            signal.signal(number, signal.SIG_IGN)
        _close_output()
    sys.exit(code or 0)


def _sentence(error: click.UsageError) -> str:
    """One line; it never repeats a surplus argument, which may be a token."""
    if "extra argument" in error.message:
        return "there is more than one argument that is not an option"
    if (
        isinstance(error, click.BadParameter)
        and error.ctx is not None
        and isinstance(error.param, click.Option)
        and error.ctx.get_parameter_source(error.param.name or "") is ParameterSource.ENVIRONMENT
    ):
        return f"the variable {error.param.envvar} cannot be used: {error.message}".rstrip(".")
    return " ".join(error.format_message().split()).rstrip(".")


def _close_output() -> None:
    """Nobody may read what we print any more; the interpreter would make that a failure of ours at its end."""
    streams: tuple[TextIO | None, ...] = (sys.stdout, sys.stderr)
    for descriptor, stream in enumerate(streams, 1):
        if stream is None:  # it was closed when we began
            continue
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _run(options: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    from fzg.host import capabilities

    if options["token"]:
        hide_argument(options["token"])
        if meant := _command_like(options["token"]):
            shown = (
                f"firezone-gateway: the argument is taken as the token; if it was to be the command {meant}, stop this"
            )
            click.echo(shown, err=True)
    if not options["no_check"] and options["tun_fd"] is None and not capabilities.has_net_admin():
        click.echo(capabilities.privilege_remedy(_executable(), os.getuid()), err=True)
        return EXIT_FAILURE
    configure_logging = partial(
        logs.configure,
        json_lines=options["log_format"] == LogFormat.JSON,
        directives=environment.get("RUST_LOG"),
        flow_logs=options["flow_logs"],
    )
    try:
        configure_logging()
    except logs.FilterError as error:
        click.echo(f"firezone-gateway: the log filter RUST_LOG cannot be used: {error}", err=True)
        return EXIT_FAILURE
    logs.announce()
    from fzg.app import App, FatalError  # half of the start-up time goes here, so the operator has seen a line before

    configure_logging()  # pyroute2 resets its logger's level when it is imported
    _LOG.debug("Options", extra={name: _shown(name, value) for name, value in options.items() if value is not None})
    try:
        settings = _settings(options, environment)
        return App(settings).run()
    except FatalError as error:
        logs.fatal(error)
        return EXIT_FAILURE


def _command_like(token: str) -> str | None:
    """The command that was misspelt, maybe: whoever mistypes `status` does not expect a gateway to start."""
    if len(token) > _LONGEST_TYPO:
        return None
    import difflib

    return next(iter(difflib.get_close_matches(token, commands.COMMANDS, n=1, cutoff=_ALIKE)), None)


def _settings(options: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    from fzg.app import FatalError
    from fzg.portal import identity

    credentials = environment.get("CREDENTIALS_DIRECTORY")
    try:
        firezone_id = identity.firezone_id(options["firezone_id"])
        token = identity.find_token(
            options["token"], environment.get("FIREZONE_TOKEN"), Path(credentials) if credentials is not None else None
        )
    except identity.IdentityError as error:
        raise FatalError(str(error)) from error
    return Settings(
        token=token,
        firezone_id=firezone_id,
        api_url=options["api_url"],
        name=identity.gateway_name(options["firezone_name"], _host_name()),
        health_address=options["health_check_addr"],
        max_partition_time=options["max_partition_time"],
        masquerade=Masquerade(options["masquerade"]),
        flow_logs=options["flow_logs"],
        validate_checksums=options["validate_checksums"],
        increase_buffers=not options["no_inc_buf"],
        udp_send_buffer=_buffer_size(environment, "FIREZONE_UDP_SEND_BUFFER_SIZE"),
        udp_receive_buffer=_buffer_size(environment, "FIREZONE_UDP_RECV_BUFFER_SIZE"),
        offloads=options["offloads"],
        metrics=options["metrics"] == MetricsExporter.PROMETHEUS,
        tun_fd=options["tun_fd"],
    )


def _buffer_size(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable)
    size = s.parse_size(text)
    if text and size is None:
        _LOG.debug("What is no number of bytes is ignored", extra={"variable": variable, "value": text})
    return size


def _refuse_what_is_no_text(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            shown = "TOKEN" if name == "token" else "--" + name.replace("_", "-")
            raise click.UsageError(f"the value for {shown} is not UTF-8 text") from error


def _offloads(environment: Mapping[str, str]) -> Offloads:
    def wanted(name: str) -> bool:
        try:
            return not s.parse_flag(environment.get(name, ""))
        except SettingError as error:
            raise click.UsageError(f"the variable {name} cannot be used: {error}") from error

    return Offloads(
        udp_gso=wanted("FIREZONE_NO_UDP_GSO"),
        udp_gro=wanted("FIREZONE_NO_UDP_GRO"),
        tun=wanted("FIREZONE_NO_TUN_OFFLOAD"),
    )


def _shown(name: str, value: object) -> str:
    return MASK if name == "token" else str(value)


def _host_name() -> str | None:
    try:
        name = socket.gethostname()
        name.encode()
    except (OSError, UnicodeError):
        return None
    return name


def _executable() -> str:
    """The file that `setcap` must be told: the frozen one, or the interpreter."""
    return str(Path(sys.executable).resolve())

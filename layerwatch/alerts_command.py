"""`layerwatch alerts`: who is told of what, and a message to everybody to see that it arrives."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .terminal import new_table, plain, say, tell

if TYPE_CHECKING:
    from .monitor.alerts.config import Config
    from .monitor.alerts.routing import Route

#: The name of the run in a test message.
SAMPLE = "sample-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be typed."""
    parser.add_argument(
        "action", choices=("show", "test"), metavar="show|test",
        help="show: channels, routes and times; test: send a sample to every channel",
    )  # fmt: skip
    parser.add_argument(
        "dir", nargs="?", default="runs", metavar="DIR",
        help="folder of runs: the layerwatch.toml in it, above it or in the working directory counts "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="this settings file instead")
    parser.add_argument(
        "--channel", action="append", default=[], metavar="NAME",
        help="test: only this one; may be given several times",
    )  # fmt: skip


def alerts(options: argparse.Namespace) -> int:
    """Show it, or send it: 1 when a channel did not take the message."""
    from .monitor.alerts.config import FILE, find_config, read_config
    from .monitor.alerts.settings import closest

    path = options.config or find_config(options.dir)
    if path is None:
        raise ValueError(
            f"expected a {FILE} in {options.dir}, above it or in the working directory, found none: write "
            "one (docs/alerts.md), or give --config FILE"
        )
    config = read_config(path)
    for name in options.channel:
        if name not in config.channels:
            raise ValueError(f'expected a channel of {path}, got "{name}"{closest(name, config.channels)}')
    if options.action == "show":
        _show(config)
        return 0
    return _test(config, options.channel or list(config.channels))


def _test(config: Config, names: list[str]) -> int:
    """Whatever the routes and the quiet hours say."""
    import time

    from .monitor.alerts.alert import TEST, Alert
    from .monitor.alerts.channels import Undelivered
    from .monitor.alerts.message import Message

    failed = 0
    for name in names:
        words = f"The channel {name} works. Findings that its routes name will arrive like this."
        link = config.link(SAMPLE, TEST)
        alert = Alert(SAMPLE, SAMPLE, TEST, "info", words, link=link, time=time.time())
        began = time.monotonic()
        try:
            remark = config.channels[name].send(Message([alert]))
            took = f" in {time.monotonic() - began:.1f} s"
            tell(f"{name}: sent{took}{f', but {remark}' if remark else ''}")
        except Undelivered as error:
            failed += 1
            tell(f"{name}: NOT sent: {error}")
    return int(failed > 0)


def _show(config: Config) -> None:
    """As tables; nothing secret is in what channels say of themselves."""
    import time

    from rich.markup import escape

    from .monitor.alerts.message import duration

    unset = config.unset()
    table = new_table("channel", "what", "ready")
    for name, channel in config.channels.items():
        missing = unset.get(name)
        ready = f"[red]no: set {' and '.join(missing)}[/]" if missing else "[green]yes[/]"
        table.add_row(name, escape(channel.words()), ready)
    say(plain(config.source))
    say(table)
    table = new_table("from severity", "and only", "to")
    for route in config.routes:
        table.add_row(route.severity, escape(_conditions(route)), ", ".join(route.channels))
    say(table)
    reached = {name for route in config.routes for name in route.channels}
    for name in config.channels.keys() - reached:
        say(f"[yellow]no route leads to {plain(name)}[/]")
    times = [
        "nothing is told twice" if config.repeat is None
        else f"what lasts is told again after {duration(config.repeat)}",
        "silence is not told" if config.silent is None else f"silent after {duration(config.silent)}",
        f"messages at least {duration(config.digest)} apart",
        f"tried again for {duration(config.give_up)}",
    ]  # fmt: skip
    if config.quiet is not None:
        now = time.time()
        times.append(
            f"quiet now, until {config.quiet.clock(now)}" if config.quiet.at(now) else "not quiet now"
        )
    say(plain("; ".join(times)))


def _conditions(route: Route) -> str:
    named = {"problem": route.problems, "tag": route.tags, "run": route.runs, "owner": route.owners}
    said = [f"{what} {' or '.join(words)}" for what, words in named.items() if words]
    return ", ".join(said) or "whatever it is"

"""Logging of a node process: JSON lines on standard error, gunicorn's own log included.

At `info`, a node logs when it serves, when it stopped, and errors. Connects and disconnects are logged at `debug` only:
a node that comes back gets all its users within seconds, and 100 000 of them would write more log than traffic. Their
numbers are in /metrics, and the edge's access log has a line for each.
"""

import io
import logging
import sys
import traceback
import warnings

from gunicorn.config import Config
from gunicorn.glogging import Logger
from pythonjsonlogger.json import JsonFormatter

LIBRARIES = ("engineio.server", "socketio.server")
SERVERS = ("uvicorn.error",)
"""What they log at `info` is in the node's own lines."""


def configure(level: str, node_name: str) -> None:
    """Send every log record of this process and its children to standard error.

    A line has `time` (ISO 8601 in UTC), `level`, `logger`, `message`, `pid`, `node` and the record's extra fields. What
    an application prints is in the same stream under systemd, and comes in whole lines too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    formatter = JsonFormatter(
        ["levelname", "name", "message", "process"],
        rename_fields={"levelname": "level", "name": "logger", "process": "pid"},
        static_fields={"node": node_name},
        timestamp="time",
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # Known, and the reason why the worker class is a setting.
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    for server in SERVERS:
        logging.getLogger(server).setLevel(logging.INFO if level == "debug" else logging.WARNING)
    for library in LIBRARIES:
        # Both log every packet at info. With a level set, they do not add a plain-text handler of their own.
        logging.getLogger(library).setLevel(logging.INFO if level == "debug" else logging.ERROR)


class GunicornLogger(Logger):
    """gunicorn's log through the root logger, with its lines about ordinary process events at `debug`."""

    def setup(self, cfg: Config) -> None:
        """Use the logging that `configure` set up instead of adding handlers."""
        super().setup(cfg)
        self.error_log.propagate = True

    def exception(self, msg: str, *args: object, **kwargs: object) -> None:
        """Log without the query of a request's target, which contains user ids."""
        targets = (arg.partition("?")[0] if isinstance(arg, str) and arg.startswith("/") else arg for arg in args)
        super().exception(msg, *targets, **kwargs)

    def info(self, msg: str, *args: object, **kwargs: object) -> None:
        """Log at `debug`: the node's own lines already cover these events."""
        self.error_log.debug(msg, *args, **kwargs)


def one_line(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    return " ".join("".join(traceback.format_exception_only(error)).split())

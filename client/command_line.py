"""invprop, or python -m client: the service from a shell. In: arguments, paths on stdin.
Out: text or JSON lines on stdout, files, an exit code; what is told to people goes to stderr.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from client import commands
from client.blocking import Client
from client.completion import SHELLS, completion
from client.errors import ConnectionFailed, InvpropError
from client.version import VERSION

URL = "http://127.0.0.1:8000"
FAILED, USAGE, INTERRUPTED, NO_READER = 1, 2, 130, 141
EPILOG = """\
environment:
  INVPROP_URL      the service, http://127.0.0.1:8000 without it
  INVPROP_API_KEY  the key, where the service wants one

exit codes:
  0    done
  1    failed: no service, refused, or some pictures could not be used (named on stderr)
  2    wrong arguments
  129  the terminal was closed (files are whole or absent)
  130  interrupted (the same; `add FOLDER` goes on when called again)
  141  whoever read the output went away
"""


class Ended(BaseException):
    """The terminal was closed, or somebody wants the program to end: the signal's number."""


def parser() -> argparse.ArgumentParser:
    """The arguments; client.completion reads them too."""
    top = argparse.ArgumentParser(
        prog="invprop",
        description="Embed, add, search and group pictures with an invprop service.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"invprop {VERSION}")
    top.add_argument("--url", default=os.environ.get("INVPROP_URL", URL), help="the service")
    top.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="of a request")
    named = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # After the command too, where people write it.
    where = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where.add_argument("--url", help="the service")
    where.add_argument("--timeout", type=float, metavar="SECONDS", help="of a request")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return named.add_parser(name, help=help, parents=[where])

    info = command("info", help="the model, the gallery, the limits")
    info.add_argument("--json", action="store_true", help="everything, as JSON")

    embed = command("embed", help="embeddings of pictures")
    embed.add_argument("pictures", nargs="+", metavar="PATH", help="files, folders; - reads paths")
    embed.add_argument("--features", action="store_true", help="the backbone's features instead")
    _outputs(embed)

    add = command("add", help="add pictures to the gallery")
    add.add_argument(
        "pictures",
        nargs="+",
        metavar="PATH",
        help="one folder (ids are paths in it; goes on after a stop), or files; - reads paths",
    )
    add.add_argument("--journal", metavar="FILE", help="of a folder; beside it by default")
    add.add_argument(
        "--metadata",
        metavar="FILE",
        help="of the pictures: CSV with a column `id`, or lines of JSON as `export --no-vectors`",
    )
    add.add_argument("--json", action="store_true", help="the counts as JSON")

    neighbours = command("neighbours", help="the most similar items")
    _queries(neighbours)
    neighbours.add_argument("-k", type=int, default=10, help="how many of each (10)")
    neighbours.add_argument(
        "--filter", action="append", default=[], metavar="FIELD=VALUE", help="of the metadata"
    )

    groups = command("groups", help="what propagation reaches from a picture or item")
    _queries(groups)
    groups.add_argument("-k", type=int, default=4, help="neighbours of each (4)")
    groups.add_argument("--steps", type=int, default=3, help="hops (3)")
    groups.add_argument("--order", choices=["nearest", "hardest", "step"], default="nearest")
    groups.add_argument("--limit", type=int, default=200, help="members listed of each (200)")

    evaluate = command("evaluate", help="run an evaluation and wait for its report")
    evaluate.add_argument("protocol", nargs="?", help="knn, linear_probe, ...")
    evaluate.add_argument("dataset", nargs="?", help="its name; without both: list them")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="a setting of the protocol"
    )
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--no-wait", action="store_true", help="only submit it")
    evaluate.add_argument("--json", action="store_true", help="the whole object as JSON")

    export = command("export", help="the items of the gallery with their vectors")
    _outputs(export)
    export.add_argument("--no-vectors", action="store_true", help="ids and metadata, JSON only")
    export.add_argument(
        "--filter", action="append", default=[], metavar="FIELD=VALUE", help="of the metadata"
    )

    delete = command("delete", help="delete items")
    delete.add_argument("ids", nargs="+", metavar="ID", help="- reads ids from stdin")

    shell = named.add_parser("completion", help="completion for a shell, to be sourced")
    shell.add_argument("shell", choices=SHELLS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = parser()
    try:
        given = words.parse_args(arguments)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    if given.command == "completion":
        sys.stdout.write(completion(given.shell, words))
        return 0
    for name in ("SIGHUP", "SIGTERM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _hang_up)
    try:
        with Client(
            given.url, api_key=os.environ.get("INVPROP_API_KEY"), timeout_s=given.timeout
        ) as service:
            code = commands.COMMANDS[given.command](service, given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Ended as end:
        return 128 + int(end.args[0])
    except BrokenPipeError:
        # Python flushes stdout once more at its end: to nowhere, so that it does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NO_READER
    except (ValueError, TypeError) as error:
        _say(f"invprop {given.command}: {error}")
        return USAGE
    except (InvpropError, OSError, ImportError) as error:
        if isinstance(error, ConnectionFailed):
            error.add_note(f"is a service running at {given.url}? --url or INVPROP_URL says where")
        _say("\n  ".join([f"invprop {given.command}: {error}", *getattr(error, "__notes__", ())]))
        return FAILED


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _hang_up(number: int, frame: FrameType | None) -> None:
    raise Ended(number)


def _outputs(words: argparse.ArgumentParser) -> None:
    kind = words.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="JSON lines on stdout (the default)")
    kind.add_argument("--npy", metavar="FILE", help="a float32 array, ids in FILE.ids.jsonl")
    kind.add_argument("--parquet", metavar="FILE", help="id, vector, metadata; wants pyarrow")


def _queries(words: argparse.ArgumentParser) -> None:
    words.add_argument("pictures", nargs="*", metavar="PATH", help="pictures; - reads paths")
    words.add_argument("--id", action="append", default=[], dest="ids", help="an item instead")
    words.add_argument("--json", action="store_true", help="a JSON line for each query")

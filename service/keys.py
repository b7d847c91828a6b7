"""API keys: who a caller is. Make one with: python -m service.keys NAME [--role read|write]

In: lines `NAME ROLE sha256:HEX` from a file or the environment, never the keys themselves; and the
key that a request presents. Out: name and role. The key is 256 random bits, so one round of SHA-256
keeps it as well as a slow hash would.
"""

import argparse
import hashlib
import hmac
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.policy import Role

MAX_KEYS = 1000  # every one of them is compared with what a request presents
MAX_KEY_LENGTH = 256
PREFIX = "invprop_"  # what secret scanners can look for
RECHECK_S = 1.0  # how often the file is looked at
ROLES = {"read": Role.READ, "write": Role.WRITE}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")

_log = structlog.get_logger("service")


class KeysError(Exception):
    """Keys cannot be read; the message names the place and never repeats what stands there."""


@dataclass(frozen=True)
class Key:
    """One key, without the key."""

    name: str
    role: Role
    digest: bytes


def parse_keys(lines: Iterable[str], where: str) -> tuple[Key, ...]:
    """Read lines `NAME ROLE sha256:HEX`; empty ones and those that begin with # are skipped.

    Raises:
        KeysError: a line is something else, a name or a key stands there twice, there is no key.
    """
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        found = _HASH.fullmatch(parts[2]) if len(parts) == 3 else None
        if found is None or not _NAME.fullmatch(parts[0]) or parts[1] not in ROLES:
            raise KeysError(
                f"{where}, line {number}: wanted `NAME ROLE sha256:HEX` with the role read or "
                "write, as `python -m service.keys NAME` prints it"
            )
        key = Key(parts[0], ROLES[parts[1]], bytes.fromhex(found[1]))
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise KeysError(f"{where}, line {number}: this name or key stands there twice")
        keys.append(key)
    if not 1 <= len(keys) <= MAX_KEYS:
        raise KeysError(f"{where}: wanted 1..{MAX_KEYS} keys, got {len(keys)}")
    return tuple(keys)


class ApiKeys:
    """The keys of a service: given once, or from a file that is read again when it changes.

    Args:
        given: lines separated by `;` (an environment variable holds one line); None: none.
        file: a file of such lines; None: none.
        clock: monotonic seconds.

    Raises:
        KeysError: something cannot be read.
    """

    def __init__(
        self,
        given: str | None,
        file: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._clock = clock
        self._fixed = () if given is None else parse_keys(given.split(";"), "api_keys")
        self._keys = self._fixed
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at = clock()
        self.failure: str | None = None
        if file is not None:
            self._read()
            if self.failure is not None:
                raise KeysError(self.failure)

    @property
    def configured(self) -> bool:
        """Whether callers need a key at all."""
        return self._file is not None or bool(self._fixed)

    def identify(self, presented: str) -> Key | None:
        """The key that was presented; None when it is unknown or was taken from the file.

        Raises:
            KeysError: the file was changed to something that cannot be read. Nobody is let in on
                what it said before: it may have been changed to shut somebody out.
        """
        self.refresh()
        if self.failure is not None:
            raise KeysError(self.failure)
        digest = hashlib.sha256(presented.encode()).digest()
        found = None
        for key in self._keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def refresh(self) -> None:
        """Read the file again when it has changed; looks at most once in RECHECK_S."""
        now = self._clock()
        if self._file is None or now - self._checked_at < RECHECK_S:
            return
        self._checked_at = now
        self._read()

    def _read(self) -> None:
        assert self._file is not None
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            lines = self._file.read_text("utf-8").splitlines()
            self._keys = (*self._fixed, *parse_keys(lines, str(self._file)))
        except (OSError, UnicodeDecodeError, KeysError) as error:
            text = str(error)
            if not isinstance(error, KeysError):
                reason = error.strerror if isinstance(error, OSError) else "this is no UTF-8"
                text = f"{self._file}: {reason}"
            if text != self.failure:
                _log.error("keys_unreadable", reason=text)
            self._stamp, self.failure = None, text
            return
        self._stamp, self.failure = stamp, None
        _log.info("keys_loaded", keys=len(self._keys))


def make_key(name: str, role: str) -> tuple[str, str]:
    """A new key, and its line for the keys file.

    Raises:
        KeysError: the name cannot stand in the file.
    """
    if not _NAME.fullmatch(name):
        raise KeysError(f"the name {name!r}: wanted 1..64 of A-Z a-z 0-9 . _ -")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} {role} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one key; the key goes to the terminal once and is stored nowhere."""
    parser = argparse.ArgumentParser(prog="python -m service.keys", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help="whose key it is; stands in the log lines")
    parser.add_argument("--role", choices=sorted(ROLES), default="read", help="default: read")
    given = parser.parse_args(arguments)
    try:
        key, line = make_key(given.name, given.role)
    except KeysError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(
        f"key, shown this once:\n  {key}\nline for api_keys_file (or INVPROP_API_KEYS):\n  {line}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

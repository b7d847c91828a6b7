"""What is promised of the proxy with a certificate."""

import contextlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from stack import Broken, Report, Stack

RENEWED_S = 30.0


def tls(stack: Stack, report: Report, folder: Path) -> None:
    """Callers over HTTPS, a certificate that is renewed while they call, and back to HTTP."""
    where = folder / "tls"
    where.mkdir()
    _make_certificate(stack, where)
    plain = stack.url
    before = dict(stack.environment)
    stack.environment |= {"INVPROP_TLS": "on", "INVPROP_TLS_FILES": str(where)}
    try:
        stack.up()
        stack.url = plain.replace("http://", "https://")
        stack.trust = ssl.create_default_context(cafile=where / "cert.pem")
        stack.until_answers()
        report.add("TLS: a search, the certificate verified", "answered", "answered", True)
        with urllib.request.urlopen(f"{stack.url}/", context=stack.trust, timeout=35) as answer:
            hsts = answer.headers.get("Strict-Transport-Security", "none")
        report.add("TLS: Strict-Transport-Security", hsts, "max-age", "max-age" in hsts)
        said = _plainly(stack.port)
        wanted = "400: plain HTTP was sent to the port of TLS"
        report.add("TLS: HTTP at the same port", said, wanted, said.startswith("400"))
        try:
            Stack.read(_distrusting(stack), "GET", "/info")
            said = "answered"
        except urllib.error.URLError as error:
            said = str(error.reason)
        wanted = "certificate verify failed"
        report.add("TLS: a caller who does not know it", said[:80], wanted, wanted in said)
        _renew(stack, report, where)
    finally:
        stack.url, stack.trust, stack.environment = plain, None, before
        stack.up()
    stack.until_answers()


def _make_certificate(stack: Stack, where: Path) -> None:
    """cert.pem and key.pem for this host, by the OpenSSL of the service's image."""
    names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    request = f"openssl req -x509 -days 2 -newkey rsa:2048 -nodes {names}"
    script = f"cd /tmp && {request} -keyout key.pem -out cert.pem 2>&1 && cat key.pem cert.pem"
    words = ("--entrypoint", "sh", "service", "-c", script)
    said = stack.compose("run", "--rm", "-T", "--no-deps", *words)
    for name, what in (("key.pem", "PRIVATE KEY"), ("cert.pem", "CERTIFICATE")):
        begin, end = f"-----BEGIN {what}-----", f"-----END {what}-----"
        found = said[said.index(begin) : said.index(end) + len(end)]
        (where / name).write_text(found + "\n")  # the same file: the proxy has it mounted
        (where / name).chmod(0o644)


def _renew(stack: Stack, report: Report, where: Path) -> None:
    """Another certificate, and SIGHUP: it is served, and no request fails meanwhile."""
    old = ssl.get_server_certificate(("127.0.0.1", stack.port))
    _make_certificate(stack, where)
    both = ssl.create_default_context(cadata=old)
    both.load_verify_locations(cafile=where / "cert.pem")
    stack.trust = both
    stack.compose("kill", "--signal", "HUP", "proxy")
    began, failed, asked = time.monotonic(), 0, 0
    while ssl.get_server_certificate(("127.0.0.1", stack.port)) == old:
        if time.monotonic() - began > RENEWED_S:
            raise Broken(f"the renewed certificate is not served after {RENEWED_S:.0f} s")
        asked += 1
        try:
            stack.search()
        except OSError:
            failed += 1
    stack.search()
    report.add(
        "TLS: certificate renewed, SIGHUP, the new one is served",
        f"{time.monotonic() - began:.1f} s, {failed} of {asked + 1} requests failed meanwhile",
        "no failed request",
        failed == 0,
    )


def _plainly(port: int) -> str:
    """What is said to a caller who speaks HTTP to the port of TLS."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/info")
        answer = connection.getresponse()
        return f"{answer.status} {answer.read()[:200].decode()!r}"


def _distrusting(stack: Stack) -> Stack:
    """The same address, with no certificate but those of the system known."""
    other = Stack(stack.project)
    other.url, other.trust = stack.url, ssl.create_default_context()
    return other

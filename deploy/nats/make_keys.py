"""Writes what nats-server.conf needs: an nkey for each user, a certificate authority and the server's certificate.

Needs `openssl`, and `pip install dynamo-kvtc[cluster]`. Keys that are there are never replaced: remove them first.
The seeds (*.nk) and *.key are secrets: a worker gets worker.nk and tls/ca.pem, no more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import nkeys

USERS = ("worker", "watcher", "operator")


def write(path: Path, text: str) -> None:
    """For its owner alone."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def make_user(folder: Path, name: str) -> str:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    write(folder / f"{name}.nk", seed.decode() + "\n")
    return f'KVTC_{name.upper()}: "{nkeys.from_seed(bytearray(seed)).public_key.decode()}"\n'


def make_certificates(folder: Path, hosts: list[str], days: int) -> None:
    tls = folder / "tls"
    tls.mkdir(exist_ok=True)
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ",".join(f"{'IP' if host.replace('.', '').isdigit() else 'DNS'}:{host}" for host in hosts)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tls, check=True, capture_output=True, umask=0o077)

    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=kvtc", "-days", str(days))
    openssl("req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", f"/CN={hosts[0]}")
    (tls / "names").write_text(f"subjectAltName={names}\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out",
            "server.pem", "-days", str(days), "-extfile", "names")  # fmt: skip
    for left in ("server.csr", "names", "ca.srl"):
        (tls / left).unlink(missing_ok=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--host", action="append", default=[], help="name or address of the server; may be repeated")
    asked.add_argument("--days", type=int, default=365)
    asked.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = asked.parse_args()
    users = "".join(make_user(given.folder, name) for name in USERS)
    write(given.folder / "users.conf", users)
    make_certificates(given.folder, given.host or ["localhost", "127.0.0.1"], given.days)
    print(f"written to {given.folder}: {', '.join(f'{n}.nk' for n in USERS)}, users.conf, tls/")


if __name__ == "__main__":
    main()

"""Who may connect: a CA of the cluster's own, certificates that it signs, and addresses that need them.

Every connection outside loopback is TLS with certificates on both sides. A holder of a certificate may run any code on
every node, since Dask unpickles what it sends; see docs/cluster.md.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pipeload.errors import ClusterError, ConfigError
from pipeload.foreign import first_line, foreign_errors

__all__ = ["Role", "check_accepted", "is_loopback", "make_certificates", "security_of"]

Role: TypeAlias = Literal["scheduler", "node", "client"]

_ROLES: tuple[Role, ...] = ("scheduler", "node", "client")
_DASK_ROLES: Mapping[Role, str] = {"scheduler": "scheduler", "node": "worker", "client": "client"}
_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\[\]:/]+):(\d{1,5})")
_VALID = timedelta(days=5 * 365)
_SKEW = timedelta(days=1)
"""Clocks of boards without a battery are behind."""
_HANDSHAKE_S = 10.0
_MOST_PORT = 65_535
_CA = "ca.pem"


def make_certificates(directory: Path) -> list[Path]:
    """Make a CA, and a certificate for the scheduler, the nodes and the clients of one cluster.

    Args:
        directory: gets ca.pem and ca-key.pem, and NAME.pem and NAME-key.pem for each of scheduler, node and client.
            Keys can be read by their owner only (mode 0600). It is made where it does not exist.

    Returns:
        The files.

    Raises:
        ConfigError: one of the files exists, or cannot be written; nothing was changed that existed.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    names = ("ca", *_ROLES)
    files = [directory / f"{name}{kind}.pem" for name in names for kind in ("", "-key")]
    if existing := [path.name for path in files if path.exists()]:
        raise ConfigError(
            f"{directory} already has {', '.join(existing)}. Name another directory, or remove these files; nodes that "
            "have the old certificates then need the new ones."
        )
    begin = datetime.now(UTC) - _SKEW

    def name_of(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pipeload {name}")])

    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in names}
    with foreign_errors(ConfigError, f"Certificates cannot be written to {directory}", "Name another directory."):
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            is_ca = name == "ca"
            signed = (
                x509.CertificateBuilder()
                .subject_name(name_of(name))
                .issuer_name(name_of("ca"))
                .public_key(keys[name].public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(begin)
                .not_valid_after(begin + _VALID)
                .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
                .sign(keys["ca"], hashes.SHA256())
            )
            key = keys[name].private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            _write(directory / f"{name}-key.pem", key, 0o600)
            _write(directory / f"{name}.pem", signed.public_bytes(serialization.Encoding.PEM), 0o644)
    return files


def security_of(address: str, certificates: Path | None, role: Role) -> Any:
    """The `distributed.Security` of a process of the cluster; None for a loopback address without TLS.

    Args:
        address: the scheduler's, as `tls://HOST:PORT` or `tcp://127.0.0.1:PORT`.
        certificates: the directory with ca.pem and the certificate and key of the role.
        role: of this process.

    Raises:
        ConfigError: the address is none, is reached by other machines and has no TLS, or certificates are missing or
            damaged.
    """
    from distributed.security import Security

    found = _ADDRESS.fullmatch(address)
    if not found or int(found[3]) > _MOST_PORT:
        raise ConfigError(f"'{address}' is no address of a cluster. Write it as tls://HOST:8786.")
    if found[1] == "tcp":
        if certificates is not None:
            raise ConfigError(f"{address} has no TLS, and certificates are given. Write tls:// instead of tcp://.")
        if not is_loopback(found[2]):
            raise ConfigError(
                f"{address} is reached by other machines, so it needs TLS. Write tls:// and give the certificates that "
                "`pipeload cluster init` makes."
            )
        return None
    if certificates is None:
        raise ConfigError(f"{address} needs certificates: give the directory that `pipeload cluster init` has made.")
    ca, certificate, key = (str(certificates / name) for name in (_CA, f"{role}.pem", f"{role}-key.pem"))
    if missing := [path for path in (ca, certificate, key) if not os.access(path, os.R_OK)]:
        raise ConfigError(
            f"{missing[0]} cannot be read. Copy it from the directory that `pipeload cluster init` has made."
        )
    # Each role connects to others too, as a client of their TLS.
    kind = _DASK_ROLES[role]
    fields = {f"tls_{kind}_cert": certificate, f"tls_{kind}_key": key}
    security = Security(require_encryption=True, tls_ca_file=ca, **fields)
    with foreign_errors(
        ConfigError,
        f"The certificates of the {role} in {certificates} cannot be used",
        "Copy them again from the directory that `pipeload cluster init` has made.",
    ):
        security.get_connection_args(kind)
    return security


async def check_accepted(address: str, security: Any, role: Role) -> None:
    """Try whether the scheduler and this process accept each other's certificates: Dask would try again and again.

    A scheduler that is not there yet is no error.

    Args:
        address: the scheduler's.
        security: of `security_of`.
        role: of this process.

    Raises:
        ClusterError: one of them refuses the other's certificate.
    """
    if security is None:
        return
    host, _, port = address.partition("://")[2].rpartition(":")
    context = security.get_connection_args(_DASK_ROLES[role])["ssl_context"]
    try:
        async with asyncio.timeout(_HANDSHAKE_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
            try:
                # A scheduler that refuses the certificate says so once this side takes the handshake for done.
                await reader.read(1)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except ssl.SSLError as error:
        raise ClusterError(
            f"The scheduler at {address} and this {role} do not accept each other's certificates: {first_line(error)}. "
            "Copy both from the directory that one `pipeload cluster init` has made."
        ) from error
    except (OSError, ValueError):
        # None is there, or the host is no name: Dask waits for it, and tells.
        return


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _write(path: Path, data: bytes, mode: int) -> None:
    # A key never lies in a file that others can read.
    path.touch(mode, exist_ok=False)
    path.write_bytes(data)

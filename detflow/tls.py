"""TLS of gRPC: the certificates that a process shows, and the authorities that it trusts."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from detflow.errors import InvalidArgument


def client_credentials(
    *, ca_file: str = "", cert_file: str = "", key_file: str = ""
) -> grpc.ChannelCredentials:
    """Returns what a client trusts and shows.

    Args:
        ca_file: PEM file with the authorities whose servers are trusted; "" trusts those that
            browsers trust.
        cert_file: PEM file with the certificate chain that is shown to servers that ask for one.
        key_file: PEM file with its key.

    Raises:
        InvalidArgument: A file cannot be read or does not hold what it should.
    """
    check_files(ca_file, cert_file, key_file)
    return grpc.ssl_channel_credentials(
        root_certificates=Path(ca_file).read_bytes() if ca_file else None,
        private_key=Path(key_file).read_bytes() if cert_file else None,
        certificate_chain=Path(cert_file).read_bytes() if cert_file else None,
    )


def server_credentials(
    *, cert_file: str, key_file: str, client_ca_file: str = ""
) -> grpc.ServerCredentials:
    """Returns what a server shows and asks for.

    Args:
        cert_file: PEM file with its certificate chain.
        key_file: PEM file with its key.
        client_ca_file: PEM file with the authorities whose clients are let in; "" asks clients for
            no certificate.

    Raises:
        InvalidArgument: A file cannot be read or does not hold what it should.
    """
    check_files(client_ca_file, cert_file, key_file)
    return grpc.ssl_server_credentials(
        [(Path(key_file).read_bytes(), Path(cert_file).read_bytes())],
        root_certificates=Path(client_ca_file).read_bytes() if client_ca_file else None,
        require_client_auth=bool(client_ca_file),
    )


def check_files(ca_file: str, cert_file: str, key_file: str) -> None:
    """Reads the files as they will be read, since gRPC says nothing about those it cannot use.

    Raises:
        InvalidArgument: BAD_CERTIFICATE.
    """
    for path in filter(None, (ca_file, cert_file, key_file)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise InvalidArgument(
                f"cannot read {path}: {error.strerror}", reason="BAD_CERTIFICATE"
            ) from error
    if bool(cert_file) != bool(key_file):
        raise InvalidArgument(
            "a certificate and its key belong together: name both files, or neither",
            reason="BAD_CERTIFICATE",
        )
    if ca_file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
        except ssl.SSLError as error:
            raise InvalidArgument(
                f"{ca_file} holds no certificate of an authority in PEM form",
                reason="BAD_CERTIFICATE",
            ) from error
    if cert_file:
        try:
            # A key with a password would have it asked for in the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                cert_file, key_file, password=""
            )
        except ssl.SSLError as error:
            raise InvalidArgument(
                f"{cert_file} and {key_file} are no certificate with its key, in PEM form and"
                f" without a password ({error.reason or 'unreadable'})",
                reason="BAD_CERTIFICATE",
            ) from error

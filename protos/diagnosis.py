"""Why a service cannot be reached, found out by trying: gRPC itself mostly says "Socket closed"."""

import os
import re
import socket
import ssl
import tempfile

from protos.connection import Connection

TRY_S = 3.0


def diagnose(address: str, connection: Connection) -> str:
    """One or two sentences about the likely cause, for the person who connects; empty: no idea.

    Blocks for a few seconds at most.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), TRY_S) as plain:
            return _look(plain, host, connection)
    except (OSError, ValueError):
        return ""  # nobody there: that is what gRPC says too


def _look(plain: socket.socket, host: str, connection: Connection) -> str:
    try:
        with _context(connection).wrap_socket(plain, server_hostname=host) as secured:
            if connection.ca is None:
                return (
                    "The service speaks TLS and was spoken to in plain text: give the authority of "
                    "its certificate (ca=, --ca, TEACHER_CA or a connection file)."
                )
            return _after_handshake(secured, connection)
    except ssl.SSLCertVerificationError as error:
        if connection.ca is None:
            return ""
        return _about_certificate(error, host)
    except (ssl.SSLError, OSError) as error:
        if connection.ca is None:
            return ""
        if "CERTIFICATE" in str(error).upper():
            return _about_client(connection)
        return (
            "The service does not speak TLS: leave out ca (--ca, TEACHER_CA), or have it started "
            "with --tls-cert and --tls-key."
        )


def _context(connection: Connection) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if connection.ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif connection.ca:
        context.load_verify_locations(cadata=connection.ca.decode(errors="replace"))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    else:
        context.load_default_certs()
    if connection.cert is not None and connection.key is not None:
        with tempfile.NamedTemporaryFile() as file:  # ssl reads them from files only; mode 0600
            file.write(connection.cert + b"\n" + connection.key)
            file.flush()
            os.fsync(file.fileno())
            context.load_cert_chain(file.name)
    return context


def _after_handshake(secured: ssl.SSLSocket, connection: Connection) -> str:
    """With TLS 1.3 a service refuses a client's certificate after the handshake."""
    secured.settimeout(TRY_S)
    try:
        if secured.recv(1):
            return ""  # an HTTP/2 server's first word: TLS is fine
    except TimeoutError:
        return ""
    except OSError:
        pass
    return _about_client(connection)


def _about_client(connection: Connection) -> str:
    if connection.cert is None:
        return (
            "The service asks for a client certificate: give cert and key (--cert and --key, "
            "TEACHER_CERT and TEACHER_KEY)."
        )
    return (
        "The service does not accept this client certificate: it has expired, or its authority is "
        "not the one of the service's --tls-client-ca."
    )


def _about_certificate(error: ssl.SSLCertVerificationError, host: str) -> str:
    reason = error.verify_message
    if re.search("mismatch|not valid for", reason, re.IGNORECASE):
        return (
            f"The service's certificate is not for {host} ({reason}): use a name or address that is "
            "in it, or have a certificate made that has this one."
        )
    if "expired" in reason or "not yet valid" in reason:
        return f"The service's certificate cannot be used now: {reason}. Its operator renews it."
    return (
        f"The service's certificate was not signed by the given authority ({reason}): is ca the one "
        "of this service?"
    )

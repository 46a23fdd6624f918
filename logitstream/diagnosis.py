"""Finds out by trying why a service cannot be reached: gRPC itself mostly says "Socket closed".

Problems reported here do not go away by waiting, so callers give up at once. They have to be certain
therefore: a tunnel whose far end is not up yet also accepts and closes connections.
"""

import os
import re
import socket
import ssl
import tempfile

import grpc

from logitstream.connection import Connection

TRY_S = 3.0
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")
"""What OpenSSL calls an answer that is not TLS; which one depends on its version."""
MOST_DETAIL = 100


def diagnose(address: str, connection: Connection) -> str:
    """Says in one or two sentences what is certainly wrong and will not go away by waiting.

    Empty: unknown. Blocks for a few seconds at most.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), TRY_S) as plain:
            return _try_tls(plain, (host, int(port)), connection)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return f"There is no host called {host} (or its name server does not know it)."
        return ""  # the name server did not answer, and may do so later
    except (OSError, ValueError):
        return ""  # nothing listens there, which gRPC says too


def in_short(code: grpc.StatusCode, details: str | None) -> str:
    """Writes a gRPC status on one line, without what gRPC puts around the last error."""
    text = (details or "").rpartition("last error: ")[2]
    text = re.sub(r"^(?:[A-Z_]+: )?(?:ipv[46]:\S+ )?", "", text)
    text = " ".join(text.split())
    if len(text) > MOST_DETAIL:
        text = f"{text[:MOST_DETAIL]}..."
    return f"{code.name}: {text}" if text else code.name


def _try_tls(plain: socket.socket, where: tuple[str, int], connection: Connection) -> str:
    host, _ = where
    try:
        with _context(connection).wrap_socket(plain, server_hostname=host) as secured:
            if connection.ca is None:
                return (
                    "The service speaks TLS and was spoken to in plain text: give the authority of "
                    "its certificate (ca=, --ca, TEACHER_CA or a connection file)."
                )
            if _says_something(secured) or not _ends_handshake(where, connection):
                return ""
            return _about_client(connection)
    except ssl.SSLCertVerificationError as error:
        if connection.ca is None:
            return ""
        return _about_certificate(error, host)
    except ssl.SSLError as error:
        if connection.ca is None:
            return ""
        if "CERTIFICATE" in (error.reason or ""):
            return _about_client(connection)
        if error.reason not in NOT_TLS:
            return ""
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


def _says_something(secured: ssl.SSLSocket) -> bool:
    """Whether an HTTP/2 server's first bytes follow the handshake, or nothing ends the connection."""
    secured.settimeout(TRY_S)
    try:
        return bool(secured.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def _ends_handshake(where: tuple[str, int], connection: Connection) -> bool:
    """Whether a service that hung up after the handshake did so because of the client's certificate.

    With TLS 1.3 it checks that after the handshake, with 1.2 within it. A peer that hangs up for
    another reason, such as a proxy without a service, completes the handshake of 1.2 too.
    """
    context = _context(connection)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(where, TRY_S) as plain:
        try:
            context.wrap_socket(plain, server_hostname=where[0]).close()
        except (ssl.SSLEOFError, ConnectionResetError):
            return True
        except ssl.SSLError as error:
            return "CERTIFICATE" in (error.reason or "")
    return False


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

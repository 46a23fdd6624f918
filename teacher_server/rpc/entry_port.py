"""Checks that the entry port, which the replicas of a host share, is not another service's.

The kernel would let two services share the port, and give each a part of the other's clients.
"""

import asyncio
import socket
import ssl

import grpc

from protos import teacher_pb2, teacher_pb2_grpc
from teacher_server.admission.access import SERVICE_METADATA
from teacher_server.errors import ServeError
from teacher_server.rpc.tls import Tls, context_without_checks, names_of

PROBE_S = 2.0


async def check_entry(host: str, port: int, service_id: str, tls: Tls | None) -> None:
    """Raises ServeError if another service answers at the entry port.

    Needs no token: a service names itself in its refusal too.
    """
    address = f"{host}:{port}"
    loop = asyncio.get_running_loop()
    try:
        certificate = await loop.run_in_executor(None, _certificate, host.strip("[]"), port)
    except OSError:
        return  # nothing listens there, or a frozen replica
    if (certificate is None) != (tls is None):
        speaks = "without TLS" if certificate is None else "with TLS"
        raise ServeError(
            f"a service answers at {address} {speaks}, unlike this one. Give every service an entry "
            "port of its own with --port; to turn TLS on or off, stop the service first."
        )
    credentials = None
    if certificate is not None and tls is not None:
        if tls.client_ca is not None:
            return  # it asks for a client certificate, which replicas do not have
        credentials = grpc.ssl_channel_credentials(certificate.encode())
    other = await _service_id(address, credentials, certificate)
    if other and other != service_id:
        raise ServeError(
            f"another service ({other}) answers at {address}. Give every service an entry port of "
            "its own with --port."
        )


def _certificate(host: str, port: int) -> str | None:
    """Returns the PEM of the service there; None: it speaks no TLS. Raises OSError if none answers."""
    with socket.create_connection((host, port), PROBE_S) as connection:
        try:
            with context_without_checks().wrap_socket(connection) as secured:
                return ssl.DER_cert_to_PEM_cert(secured.getpeercert(True) or b"")
        except (ssl.SSLError, ConnectionError):
            return None


async def _service_id(
    address: str, credentials: grpc.ChannelCredentials | None, certificate: str | None
) -> str:
    """Returns the id of the service that answers; empty if none does."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        name = _any_name(certificate or "")
        options = [("grpc.ssl_target_name_override", name)]
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    async with channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)
        try:
            info = await stub.Describe(teacher_pb2.DescribeRequest(), timeout=PROBE_S)
        except grpc.aio.AioRpcError as error:
            metadata = dict(error.trailing_metadata() or ())
            return str(metadata.get(SERVICE_METADATA, ""))
    return info.service_id


def _any_name(pem: str) -> str:
    """Returns a name that a certificate is for; empty if there is none."""
    from cryptography import x509

    return next(iter(names_of(x509.load_pem_x509_certificate(pem.encode()))), "")

"""Everything an operator can set: as flags, or in a TOML file given as @teacher.toml."""

import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, model_validator

from logitstream.command_line import AtAddress
from logitstream.connection import check_address


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class BatchConfig(_Section):
    """How sequences are joined into batches."""

    max_tokens: int = Field(default=4096, ge=1)
    """Padded tokens in one batch, unless one sequence is longer. Between two batches the teacher
    goes over to whoever's turn it is."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Padded tokens that may wait, of one team; beyond that requests are told to come back. All
    teams together may have four times as many, each an equal part of them."""


class TargetsConfig(_Section):
    """What may be asked for."""

    max_top_k: int = Field(default=256, ge=1)
    """Largest k of top_k."""
    max_reply_mib: int = Field(default=64, ge=1)
    """Largest answer to one request, in MiB, estimated before it is scored."""


class AdmissionConfig(_Section):
    """Limits of one request and one stream."""

    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Longest sequence; by default the model's context length."""
    max_request_tokens: int = Field(default=1 << 16, ge=2)
    """Tokens of one request."""
    max_request_sequences: int = Field(default=1024, ge=1)
    """Sequences of one request."""
    max_request_mib: int = Field(default=4, ge=1)
    """Size of one serialised request, in MiB."""
    max_stream_mib: int = Field(default=16, ge=1)
    """Unfinished answers of one stream, in MiB; further requests of it wait unread."""
    max_answers_mib: int = Field(default=1024, ge=1)
    """Unfinished answers of all streams of a replica, in MiB, shared by the teams that have any;
    a team may always have one."""
    max_connections: int = Field(default=16384, ge=1)
    """Connections to a replica. Beyond it, those over which nobody was let in yet are shut down, the
    oldest first."""
    max_connections_per_address: int = Field(default=8192, ge=1)
    """Connections from one address, likewise; proxies and NAT show many clients as one address."""
    max_strangers_mib: int = Field(default=64, ge=1)
    """What connections over which nobody was let in yet may hold in memory together, in MiB,
    likewise; one takes about 16 KiB, with TLS 64 KiB."""


class ServeConfig(_Section):
    """Serve a teacher: one line on stdout says when it is ready, Ctrl-C drains and stops it."""

    model: str
    """Folder written by save_pretrained (safetensors), or a hub id."""
    revision: str | None = None
    """Revision of a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and prints it. On Ray all replicas of a host share it,
    and each has a port of its own beside it."""
    standalone: tyro.conf.FlagCreatePairsOff[bool] = False
    """One replica in this process, without Ray."""
    replicas: int | None = Field(default=None, ge=1)
    """Replicas of the teacher, one by default; with --max-replicas the least."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What the service is called on its Ray cluster, "teacher" by default: one cluster can have
    several."""
    ray_address: str | None = None
    """Ray cluster to serve on: auto for the one of this machine, or HOST:PORT of its GCS. By
    default a Ray of its own is started here, and stopped at the end."""
    update: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --ray-address: replace the service of this name, one replica after the other, and exit
    when that is done; whoever started the service still owns it."""
    gpus_per_replica: float | None = Field(default=None, ge=0.0)
    """GPUs of one replica, parts of one too (0.5); by default 1 where the cluster has any and
    --device allows it, else 0."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Replicas are added up to this number while requests wait, and taken away again."""
    target_queued_tokens: int = Field(default=1 << 14, ge=1)
    """With --max-replicas: how many tokens may wait per replica before another one is started."""
    scale_up_after_s: float = Field(default=10.0, ge=0.0)
    """With --max-replicas: how long too much has to wait before a replica is added."""
    scale_down_after_s: float = Field(default=300.0, ge=0.0)
    """With --max-replicas: how long too little has to wait before a replica is taken away."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and the forward pass; auto is what the model was saved in."""
    attention: str | None = None
    """Attention implementation of transformers; by default eager for models with an attention
    softcap and sdpa for others."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the forward pass; by default one per core, and on Ray an equal share of the
    cores for each replica of a machine."""
    head_chunk_mib: int = Field(default=128, ge=1)
    """Size of one chunk of logits in the model's dtype, in MiB."""
    drain_s: float = Field(default=10.0, ge=0.0)
    """How long unfinished answers may take after Ctrl-C or SIGTERM, in seconds."""
    stuck_after_s: float = Field(default=120.0, gt=0.0)
    """A forward that takes longer, and ten times as long as any before it, ends its process."""
    peers: tuple[str, ...] = ()
    """Standalone only: HOST:PORT of the other replicas of this service, or of a name that stands
    for all of them, such as a headless Kubernetes Service. Needs --service-id."""
    service_id: str = ""
    """Standalone only: what the replicas of one service have in common; by default random."""
    advertise: str = ""
    """Host name or address that clients are told for this replica; by default --host, or this
    machine's address if that is a wildcard."""
    ledger: Path | None = None
    """Folder for what teams have used (SQLite) and what replicas have not reported yet; on a local
    disk. By default beside the teams file (teams.ledger); without teams in memory, until the end."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve Prometheus metrics on this port of --host; 0 takes a free one and logs it. Replicas
    that share a host take the next free ones."""
    teams: Path | None = None
    """TOML file that declares who may use the teacher, with which token or certificate, weight and
    limits (`teacher-server team` edits it); read again when it changes. Without it, everybody who
    reaches the port may. On Ray it has to be on every machine."""
    tls_cert: Path | None = None
    """Certificate of the service, PEM; read again when it changes, as the two below."""
    tls_key: Path | None = None
    """Its key, PEM."""
    tls_client_ca: Path | None = None
    """Every client has to show a certificate that this CA signed; `certificates` of a team name
    those that stand for it."""
    allow_public: tyro.conf.FlagCreatePairsOff[bool] = False
    """Listen on an address that is not loopback without TLS, or without teams: whoever can reach the
    port can use the teacher, or read what crosses the network."""
    batch: BatchConfig = BatchConfig()
    targets: TargetsConfig = TargetsConfig()
    admission: AdmissionConfig = AdmissionConfig()

    @model_validator(mode="after")
    def _check_modes(self) -> "ServeConfig":
        on_ray = {
            "--replicas": self.replicas,
            "--name": self.name,
            "--ray-address": self.ray_address,
            "--gpus-per-replica": self.gpus_per_replica,
            "--max-replicas": self.max_replicas,
        }
        given = [flag for flag, value in on_ray.items() if value is not None]
        if self.standalone and given:
            raise ValueError(f"--standalone is one replica without Ray, not with {given[0]}")
        if not self.standalone and (self.peers or self.service_id):
            flag = "--peers" if self.peers else "--service-id"
            raise ValueError(
                f"{flag} is for --standalone: replicas on Ray find each other by themselves"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both: --tls-cert and --tls-key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.update and not self.ray_address:
            raise ValueError("--update needs the --ray-address of the cluster that has the service")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise ValueError(
                f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas}"
            )
        if not self.standalone and self.device.startswith("cuda:"):
            raise ValueError(
                f"--device {self.device} is for --standalone: Ray chooses which GPUs a replica "
                "gets. Use --device cuda"
            )
        if self.peers and not self.service_id:
            raise ValueError(
                "peers need a --service-id that is the same for all of them, such as the name of "
                "the teacher"
            )
        wrong = [peer for peer in self.peers if not peer.rpartition(":")[2].isdigit()]
        if wrong:
            raise ValueError(f"peers are HOST:PORT, got {', '.join(wrong)}")
        return self

    def exposure(self) -> str | None:
        """What is wrong with where this listens, if something is."""
        missing = [] if self.tls_cert is not None else ["TLS"]
        missing += [] if self.teams is not None else ["teams with tokens"]
        if is_loopback(self.host) or self.allow_public or not missing:
            return None
        name = self.advertise or "NAME"
        return (
            f"{self.host} can be reached from other machines, which needs TLS and teams with tokens; "
            f"missing: {' and '.join(missing)}. For a trial:\n"
            f"  teacher-server certs --out certs --host {name}\n"
            f"  teacher-server team add FIRST --teams teams.toml --address {name}:{self.port} "
            "--ca certs/ca.pem\n"
            "  teacher-server serve ... --teams teams.toml --tls-cert certs/server.pem --tls-key "
            "certs/server-key.pem\n"
            "Or listen on 127.0.0.1 and use a tunnel (ssh -L), or pass --allow-public if everyone who "
            "can reach the port may use the teacher."
        )

    def with_absolute_paths(self) -> "ServeConfig":
        """The same for processes that work in another folder."""
        paths = {
            name: getattr(self, name)
            for name in ("teams", "ledger", "tls_cert", "tls_key", "tls_client_ca")
        }
        return self.model_copy(
            update={name: path.absolute() for name, path in paths.items() if path is not None}
        )

    def ledger_folder(self) -> Path | None:
        """Where usage is kept; None: in memory."""
        if self.ledger is None and self.teams is not None:
            return self.teams.with_suffix(".ledger")
        return self.ledger

    def advertised_host(self) -> str:
        """The host part of a replica's address, for clients."""
        if self.advertise or self.host not in ("0.0.0.0", "::", "[::]"):
            return self.advertise or self.host
        # No packet is sent: connecting a datagram socket only picks the outgoing address.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                return probe.getsockname()[0]
            except OSError:
                return socket.gethostname()


class FitIdsConfig(_Section):
    """Fit an id table to a teacher and put it beside its weights: ids take fewer bytes with it.

    The fingerprint of the teacher changes with it: services are to be started anew, and what was
    recorded before keeps its own table."""

    model: str
    """Folder written by save_pretrained (safetensors)."""
    text: Path
    """Text like that which students are trained on; a few thousand tokens are enough."""
    max_tokens: int = Field(default=4096, ge=64)
    """How much of the text is read; half of it is fitted on, the other half measures the gain."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and the forward pass; auto is what the model was saved in."""


class _TeamSection(_Section):
    teams: Path
    """The teams file."""


class TeamAdd(_TeamSection):
    """Add a team and show its token, once; makes the file if there is none."""

    name: tyro.conf.Positional[str]
    """Letters, digits, - and _."""
    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Its share, compared with those of other teams that have work at the same time."""
    scopes: tuple[Literal["score", "generate", "hidden", "dense", "admin"], ...] = ("score",)
    """What it may do: score; also ask for dense targets; admin sees all teams."""
    days: int = Field(default=365, ge=0)
    """How long the token is valid; 0: without an end."""
    certificates: tuple[str, ...] = ()
    """Names of client certificates that stand for the team, instead of a token."""
    address: str = ""
    """HOST:PORT of the service: write a connection file for the team."""
    ca: Path | None = None
    """Authority of the service's certificate, PEM; goes into the connection file."""
    out: Path = Path()
    """Folder of the connection file."""
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


class TeamList(_TeamSection):
    """Show the teams."""

    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


class TeamRotate(_TeamSection):
    """Give a team a new token and let its old ones expire."""

    name: tyro.conf.Positional[str]
    """The team."""
    overlap: int = Field(default=7, ge=0)
    """Days for which the old tokens are still let in; 0: not at all, when one has leaked."""
    days: int = Field(default=365, ge=0)
    """How long the new token is valid; 0: without an end."""
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


class TeamDisable(_TeamSection):
    """Let a team in no more; what it has open ends within seconds."""

    name: tyro.conf.Positional[str]
    """The team."""
    undo: tyro.conf.FlagCreatePairsOff[bool] = False
    """Let it in again."""


TeamAction = TeamAdd | TeamList | TeamRotate | TeamDisable


class CertsConfig(_Section):
    """Make a private authority and certificates, for a trial: nothing is to be bought or asked for."""

    out: Path
    """Folder for ca.pem, server.pem, client-NAME.pem and their keys. An authority that is there signs
    the new certificates."""
    host: tuple[str, ...] = ()
    """Names and addresses by which clients reach the service, by default those of this machine."""
    only_these: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out localhost, which is added otherwise: the near ends of tunnels are there."""
    client: tuple[str, ...] = ()
    """Names of clients to make certificates for, such as those of teams."""
    days: int = Field(default=365, ge=1, le=3650)
    """How long the certificates are valid; the authority is for ten years."""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace certificates that are there."""


class ServiceConfig(_Section):
    """A running service that a command asks; the token comes from TEACHER_TOKEN, never as a flag."""

    address: AtAddress
    """HOST:PORT of the service, or a connection file (*.toml) of it."""
    ca: Path | None = None
    """PEM of the authority that signed the service's certificate: use TLS. By default TEACHER_CA."""
    cert: Path | None = None
    """Client certificate, PEM; by default TEACHER_CERT."""
    key: Path | None = None
    """Its key, PEM; by default TEACHER_KEY."""


class UsageConfig(ServiceConfig):
    """Print what teams have used, by day (UTC): of the own team, or of all with the scope admin."""

    address: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HOST:PORT")] = ""
    """HOST:PORT of the service, or a connection file (*.toml) of it."""
    team: str = ""
    """Of this team only."""
    since: str = ""
    """First day, such as 2027-01-31; by default today."""
    ledger: Path | None = None
    """Read the ledger in this folder instead of asking a service."""
    as_csv: Annotated[bool, tyro.conf.arg(name="csv"), tyro.conf.FlagCreatePairsOff] = False
    """Print CSV."""
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    @model_validator(mode="after")
    def _check(self) -> "UsageConfig":
        if bool(self.address) == (self.ledger is not None):
            raise ValueError("usage needs either the HOST:PORT of a service or a --ledger FOLDER")
        if self.address:
            check_address(self.address)
        if self.as_csv and self.as_json:
            raise ValueError("--csv or --json, not both")
        return self


class DescribeConfig(ServiceConfig):
    """Ask a running service who it is, and who the caller is to it."""

    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


class StatusConfig(ServiceConfig):
    """Show how a running service is doing: of the own team, or of all teams and the replicas with the
    scope admin. Rates and times are of the last minute."""

    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Again every 2 s, until Ctrl-C."""
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON; with --watch one line each time."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

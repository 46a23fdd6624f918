"""Declares every option of `teacher-server`, one class for each command."""

import socket
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field, field_validator, model_validator

from logitstream.connection import check_address, is_loopback
from logitstream.options import AddressedService, Json, LogOptions, Settings

Quantization = Literal[
    "none", "torchao-fp8", "torchao-int8", "bitsandbytes-4bit", "compressed-tensors"
]


class BatchConfig(Settings):
    """Limits of a batch and of the queue."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens in one batch; by default 4,096 on a CPU and 8,192 on a GPU. The
    teacher may switch to another team between two batches. On a CPU a longer sequence is a batch of
    its own; on a GPU no sequence may be longer."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Maximum number of tokens of one team that may wait; further requests are rejected with a time
    to retry after. All teams together may have four times as many, in equal shares."""


class TargetsConfig(Settings):
    """Limits of the targets that one request may ask for."""

    max_top_k: int = Field(default=256, ge=1)
    """Largest k of top_k."""
    max_reply_mib: int = Field(default=64, ge=1)
    """Largest response to one request, in MiB, estimated before it is scored."""


class GenerationConfig(Settings):
    """Limits of the texts that the teacher writes."""

    pool_mib: int = Field(default=1024, ge=0)
    """Memory for the keys and values of texts that are being written, in MiB; on a CPU it is used as
    texts need it, on a GPU it is taken at the start. 0: this teacher writes no texts."""
    max_running: int = Field(default=64, ge=1)
    """Texts that are written at the same time; further ones wait."""


class AdmissionConfig(Settings):
    """Limits of requests, streams and connections."""

    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Longest sequence; by default the model's context length."""
    max_request_tokens: int = Field(default=1 << 16, ge=2)
    """Maximum number of tokens in one request."""
    max_request_sequences: int = Field(default=1024, ge=1)
    """Maximum number of sequences in one request."""
    max_request_mib: int = Field(default=4, ge=1)
    """Largest serialised request, in MiB."""
    max_stream_mib: int = Field(default=16, ge=1)
    """Maximum size of the unfinished responses of one stream, in MiB; its further requests wait
    unread."""
    max_answers_mib: int = Field(default=1024, ge=1)
    """Maximum size of the unfinished responses of all streams of a replica, in MiB, shared by the
    teams that have any; a team may always have one."""
    max_connections: int = Field(default=16384, ge=1)
    """Maximum number of connections to a replica. Beyond it, connections without an authenticated
    caller are closed, the oldest first."""
    max_connections_per_address: int = Field(default=8192, ge=1)
    """The same for connections from one address; many clients behind a proxy or NAT have one
    address."""
    max_strangers_mib: int = Field(default=64, ge=1)
    """The same for the memory of all connections without an authenticated caller, in MiB; one takes
    about 16 KiB, with TLS 64 KiB."""


class _Teacher(Settings):
    model: str = Field(kw_only=False)
    """Folder written by save_pretrained (safetensors), or a hub id."""


class ServeConfig(LogOptions, _Teacher):  # pydantic puts fields of the last base first
    """Serve a teacher.

    One line on stdout says when it is ready; Ctrl-C finishes accepted requests and stops it."""

    revision: str | None = None
    """Revision of a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and prints it. On Ray all replicas of a host share it,
    and each also has a port of its own."""
    standalone: bool = False
    """Run one replica in this process, without Ray."""
    replicas: int | None = Field(default=None, ge=1)
    """Number of replicas, one by default; with --max-replicas the minimum."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the service on its Ray cluster, "teacher" by default; one cluster can run several."""
    ray_address: str | None = None
    """Ray cluster to serve on: auto for the one on this machine, or HOST:PORT of its GCS. By
    default the command starts a Ray of its own here, and stops it at the end."""
    update: bool = False
    """With --ray-address: replace the replicas of the service of this name one by one, then exit;
    the command that started the service still owns it."""
    gpus_per_replica: float | None = Field(default=None, ge=0.0)
    """GPUs per replica, which may be a fraction (0.5); by default 1 if the cluster has any and
    --device allows it, else 0."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=8)
    """Devices that share one replica of the teacher, for one that does not fit on a single GPU: each
    holds a part of every layer and of the vocabulary. All are on one machine."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Scale up to this number of replicas while requests wait, and down again."""
    target_queue_s: float = Field(default=3.0, gt=0.0)
    """With --max-replicas: seconds of waiting work per replica above which others are started."""
    scale_up_after_s: float = Field(default=20.0, ge=0.0)
    """With --max-replicas: seconds above that limit before others are started."""
    scale_down_after_s: float = Field(default=240.0, ge=0.0)
    """With --max-replicas: seconds for which fewer must have been enough before replicas go."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and the forward pass; auto is the type that the model was saved in."""
    quantization: Quantization = "none"
    """How the linear layers are quantised while they are loaded; embeddings and vocabulary head keep
    the dtype. none: as the model was saved. compressed-tensors needs a checkpoint of that kind.
    torchao-fp8 needs a GPU from L40S or H100 on. The packages come with the extra [quantize]."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads safetensors. dummy makes random weights of the shapes in config.json, for
    benchmarks: the folder needs no other file."""
    attention: str | None = None
    """Attention implementation of transformers, such as sdpa or eager. By default the engine's own,
    which runs sequences of any lengths together; with another one, and for architectures that it
    does not fit, sequences are padded and run one by one (at --exactness tolerance, those of one
    length together), which is slower."""
    exactness: Literal["bytes", "tolerance"] = "bytes"
    """bytes: a sequence has the same targets, to the bit, whatever it is computed with. tolerance:
    they may differ by rounding; on a CPU bfloat16 is then faster, on a GPU short packs are."""
    warm_up_s: float = Field(default=600.0, gt=0.0)
    """Seconds that the first computations may take before the service is ready."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the forward pass; by default one per core, and on Ray each replica of a
    machine gets an equal share of the cores."""
    head_chunk_mib: int = Field(default=128, ge=1)
    """Size of one chunk of logits in the model's dtype, in MiB."""
    drain_s: float = Field(default=10.0, ge=0.0)
    """Seconds that unfinished responses may take after Ctrl-C or SIGTERM."""
    stuck_after_s: float = Field(default=120.0, gt=0.0)
    """Seconds after which a forward pass ends its process, if it also takes ten times as long as
    any before it."""
    peers: tuple[str, ...] = ()
    """With --standalone: HOST:PORT of the other replicas of this service, or of a name that
    resolves to all of them, such as a headless Kubernetes Service. Needs --service-id."""
    service_id: str = ""
    """With --standalone: an id that all replicas of one service share; random by default."""
    advertise: str = ""
    """Host name or address of this replica as clients see it; by default --host, or this machine's
    address if that is a wildcard."""
    ledger: Path | None = None
    """Folder, on a local disk, for the usage of teams (SQLite) and for usage that replicas have not
    reported yet. By default teams.ledger next to the teams file; without teams, memory."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve Prometheus metrics on this port of --host; 0 takes a free one and logs it. Further
    replicas on a host take the next free ports."""
    teams: Path | None = None
    """TOML file that declares who may use the teacher, with which token or certificate, weight and
    limits (`teacher-server team` edits it); read again when it changes. Without it, anyone who can
    reach the port may use the teacher. On Ray it must be on every machine."""
    tls_cert: Path | None = None
    """Certificate of the service, a PEM file. The three TLS files are read again when they
    change."""
    tls_key: Path | None = None
    """Private key of that certificate, a PEM file."""
    tls_client_ca: Path | None = None
    """Require a certificate signed by this CA from every client; `certificates` of a team name the
    ones that identify it."""
    allow_public: bool = False
    """Allow a non-loopback address without TLS or without teams: anyone who can reach the port can
    use the teacher, and anyone on the network can read along."""
    batch: BatchConfig = BatchConfig()
    targets: TargetsConfig = TargetsConfig()
    admission: AdmissionConfig = AdmissionConfig()
    generation: GenerationConfig = GenerationConfig()

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str) -> str:
        if model.endswith((".toml", ".yaml", ".yml")) and Path(model).is_file():
            raise ValueError(f"{model} is not a model: give @{model} to read options from it")
        return model

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
        scaling = {"target_queue_s", "scale_up_after_s", "scale_down_after_s"}
        fields = type(self).model_fields
        for name in (n for n in sorted(scaling) if getattr(self, n) != fields[n].default):
            if self.max_replicas is None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} {getattr(self, name):g} says when replicas come and go, which needs "
                    "--max-replicas"
                )
        if self.standalone and given:
            raise ValueError(f"--standalone is one replica without Ray, not with {given[0]}")
        if not self.standalone and (self.peers or self.service_id):
            flag = "--peers" if self.peers else "--service-id"
            raise ValueError(
                f"{flag} is for --standalone: replicas on Ray find each other by themselves"
            )
        if self.load_format == "dummy" and self.quantization != "none":
            raise ValueError(
                "--load-format dummy makes weights of --dtype, not with --quantization"
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
        if self.tensor_parallel_size > 1 and self.device.startswith("cuda:"):
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size} uses the first GPUs that are "
                f"visible, not --device {self.device}: use --device cuda, and CUDA_VISIBLE_DEVICES to "
                "choose them"
            )
        if self.tensor_parallel_size > 1 and self.quantization != "none":
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size} divides weights of --dtype, and "
                f"--quantization {self.quantization} is not tried with it: leave out one of them"
            )
        if self.tensor_parallel_size > 1 and self.attention is not None:
            raise ValueError(
                "--attention does not go with --tensor-parallel-size: a divided teacher runs packs"
            )
        gpus = self.gpus_per_replica
        if self.tensor_parallel_size > 1 and gpus not in (None, 0.0, self.tensor_parallel_size):
            raise ValueError(
                f"a replica with --tensor-parallel-size {self.tensor_parallel_size} takes as many "
                f"GPUs, not --gpus-per-replica {gpus:g}"
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
        """Explains what is unsafe about the address to listen on, if anything is."""
        missing = [] if self.tls_cert is not None else ["TLS"]
        missing += [] if self.teams is not None else ["teams with tokens"]
        if is_loopback(self.host) or self.allow_public or not missing:
            return None
        name = self.advertise or "NAME"
        return (
            f"{self.host} can be reached from other machines, which needs TLS and teams with "
            f"tokens; missing: {' and '.join(missing)}. For a trial:\n"
            f"  teacher-server certs --out certs --host {name}\n"
            f"  teacher-server team add FIRST --teams teams.toml --address {name}:{self.port} "
            "--ca certs/ca.pem\n"
            "  teacher-server serve ... --teams teams.toml --tls-cert certs/server.pem --tls-key "
            "certs/server-key.pem\n"
            "Or listen on 127.0.0.1 and use a tunnel (ssh -L), or pass --allow-public if everyone "
            "who can reach the port may use the teacher."
        )

    def with_absolute_paths(self) -> "ServeConfig":
        """Returns the same configuration for processes that run in another folder."""
        paths = {
            name: getattr(self, name)
            for name in ("teams", "ledger", "tls_cert", "tls_key", "tls_client_ca")
        }
        return self.model_copy(
            update={name: path.absolute() for name, path in paths.items() if path is not None}
        )

    def ledger_folder(self) -> Path | None:
        """Returns the folder for usage; None: it is kept in memory."""
        if self.ledger is None and self.teams is not None:
            return self.teams.with_suffix(".ledger")
        return self.ledger

    def advertised_host(self) -> str:
        """Returns the host part of a replica's address, for clients."""
        if self.advertise or self.host not in ("0.0.0.0", "::", "[::]"):
            return self.advertise or self.host
        # No packet is sent: connecting a datagram socket only picks the outgoing address.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                return probe.getsockname()[0]
            except OSError:
                return socket.gethostname()


class FitIdsConfig(LogOptions):
    """Fit an id table to a teacher and save it with the weights, so that ids take fewer bytes.

    The table changes the fingerprint of the teacher: restart its services to use it. Earlier
    recordings keep their own table."""

    model: str
    """Folder written by save_pretrained (safetensors)."""
    text: Path
    """Text like the students' training data; a few thousand tokens are enough."""
    max_tokens: int = Field(default=4096, ge=64)
    """Maximum number of tokens to read; one half is fitted, the other measures the gain."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and the forward pass; auto is the type that the model was saved in."""


class _OneTeam(Settings):
    name: str = Field(kw_only=False)
    """Name of the team: letters, digits, - and _."""
    teams: Path
    """The teams file."""


class TeamAdd(_OneTeam):
    """Add a team and show its token, once. Creates the teams file if there is none."""

    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Share of the teacher, relative to other teams that have work at the same time."""
    scopes: tuple[Literal["score", "generate", "hidden", "dense", "admin"], ...] = ("score",)
    """What the team may do: score text, also request dense targets or (hidden) hidden states and the
    vocabulary head, or (admin) see all teams."""
    days: int = Field(default=365, ge=0)
    """Days for which the token is valid; 0: no expiry."""
    certificates: tuple[str, ...] = ()
    """Names of client certificates that identify the team, instead of a token."""
    address: str = ""
    """HOST:PORT of the service; also writes a connection file for the team."""
    ca: Path | None = None
    """PEM file of the authority of the service's certificate; goes into the connection file."""
    out: Path = Path()
    """Folder for the connection file."""
    as_json: Json = False
    """Print JSON."""


class TeamList(Settings):
    """Show the teams."""

    teams: Path
    """The teams file."""
    as_json: Json = False
    """Print JSON."""


class TeamRotate(_OneTeam):
    """Give a team a new token and let its old ones expire."""

    overlap: int = Field(default=7, ge=0)
    """Days for which the old tokens stay valid; 0: revoke them now, such as after a leak."""
    days: int = Field(default=365, ge=0)
    """Days for which the new token is valid; 0: no expiry."""
    as_json: Json = False
    """Print JSON."""


class TeamDisable(_OneTeam):
    """Disable a team; its open streams end within seconds."""

    undo: bool = False
    """Enable the team again."""


TeamAction = TeamAdd | TeamList | TeamRotate | TeamDisable


class CertsConfig(Settings):
    """Create a private certificate authority and certificates, for a trial."""

    out: Path
    """Folder for ca.pem, server.pem, client-NAME.pem and their keys. An existing authority there
    signs the new certificates."""
    host: tuple[str, ...] = ()
    """Names and addresses by which clients reach the service; by default those of this machine."""
    only_these: bool = False
    """Leave out localhost, which is otherwise added for tunnels."""
    client: tuple[str, ...] = ()
    """Names of clients, such as teams, to create certificates for."""
    days: int = Field(default=365, ge=1, le=3650)
    """Days for which the certificates are valid; the authority is valid for ten years."""
    force: bool = False
    """Replace existing certificates."""


class UsageConfig(AddressedService):
    """Print usage by day (UTC): of the caller's team, or of all teams with the scope admin."""

    address: str = Field(default="", kw_only=False)
    """HOST:PORT of the service, or a connection file (*.toml) of it."""
    team: str = ""
    """Print the usage of this team only."""
    since: str = ""
    """First day, such as 2027-01-31; today by default."""
    ledger: Path | None = None
    """Read the ledger in this folder instead of asking a service."""
    as_csv: Annotated[bool, Parameter(name="csv")] = False
    """Print CSV."""
    as_json: Json = False
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


class DescribeConfig(AddressedService):
    """Describe a running service, and the caller as the service sees it."""

    as_json: Json = False
    """Print JSON."""


class StatusConfig(AddressedService):
    """Show the state of a running service.

    It covers the caller's team, or with the scope admin all teams and replicas. Rates and times are
    of the last minute."""

    watch: bool = False
    """Print it every 2 s until Ctrl-C."""
    as_json: Json = False
    """Print JSON; with --watch one line each time."""

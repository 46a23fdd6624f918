from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEVEL_UNSPECIFIED: _ClassVar[Level]
    LEVEL_INTERACTIVE: _ClassVar[Level]
    LEVEL_TRAINING: _ClassVar[Level]
    LEVEL_BULK: _ClassVar[Level]

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_UNSPECIFIED: _ClassVar[Finish]
    FINISH_STOP: _ClassVar[Finish]
    FINISH_LENGTH: _ClassVar[Finish]
LEVEL_UNSPECIFIED: Level
LEVEL_INTERACTIVE: Level
LEVEL_TRAINING: Level
LEVEL_BULK: Level
FINISH_UNSPECIFIED: Finish
FINISH_STOP: Finish
FINISH_LENGTH: Finish

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UsageRequest(_message.Message):
    __slots__ = ("team", "since")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    team: str
    since: str
    def __init__(self, team: _Optional[str] = ..., since: _Optional[str] = ...) -> None: ...

class UsageResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[UsageRow]
    def __init__(self, rows: _Optional[_Iterable[_Union[UsageRow, _Mapping]]] = ...) -> None: ...

class UsageRow(_message.Message):
    __slots__ = ("day", "team", "sequences", "tokens", "delivered_rows", "delivered_bytes", "rejected")
    DAY_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_ROWS_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    day: str
    team: str
    sequences: int
    tokens: int
    delivered_rows: int
    delivered_bytes: int
    rejected: int
    def __init__(self, day: _Optional[str] = ..., team: _Optional[str] = ..., sequences: _Optional[int] = ..., tokens: _Optional[int] = ..., delivered_rows: _Optional[int] = ..., delivered_bytes: _Optional[int] = ..., rejected: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("replica", "teams", "cost_per_second")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TEAMS_FIELD_NUMBER: _ClassVar[int]
    COST_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    replica: ReplicaStatus
    teams: _containers.RepeatedCompositeFieldContainer[TeamStatus]
    cost_per_second: float
    def __init__(self, replica: _Optional[_Union[ReplicaStatus, _Mapping]] = ..., teams: _Optional[_Iterable[_Union[TeamStatus, _Mapping]]] = ..., cost_per_second: _Optional[float] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("id", "address", "state", "queued_tokens", "streams", "batch_fill", "forward_ms", "head_ms", "encode_ms", "tokens_per_second", "memory_bytes", "device_memory_bytes", "busy", "fill_ms", "launch_ms", "wait_ms", "copy_ms", "compact_ms", "texts_running", "texts_waiting", "written_tokens_per_second")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FILL_FIELD_NUMBER: _ClassVar[int]
    FORWARD_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    FILL_MS_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    COPY_MS_FIELD_NUMBER: _ClassVar[int]
    COMPACT_MS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TEXTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    state: str
    queued_tokens: int
    streams: int
    batch_fill: float
    forward_ms: float
    head_ms: float
    encode_ms: float
    tokens_per_second: float
    memory_bytes: int
    device_memory_bytes: int
    busy: float
    fill_ms: float
    launch_ms: float
    wait_ms: float
    copy_ms: float
    compact_ms: float
    texts_running: int
    texts_waiting: int
    written_tokens_per_second: float
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., queued_tokens: _Optional[int] = ..., streams: _Optional[int] = ..., batch_fill: _Optional[float] = ..., forward_ms: _Optional[float] = ..., head_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., device_memory_bytes: _Optional[int] = ..., busy: _Optional[float] = ..., fill_ms: _Optional[float] = ..., launch_ms: _Optional[float] = ..., wait_ms: _Optional[float] = ..., copy_ms: _Optional[float] = ..., compact_ms: _Optional[float] = ..., texts_running: _Optional[int] = ..., texts_waiting: _Optional[int] = ..., written_tokens_per_second: _Optional[float] = ...) -> None: ...

class TeamStatus(_message.Message):
    __slots__ = ("team", "weight", "tokens_in_flight", "queued_tokens", "tokens_per_second", "share", "entitled", "waiting_p95_ms", "rejected", "tokens_left_today")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ENTITLED_FIELD_NUMBER: _ClassVar[int]
    WAITING_P95_MS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LEFT_TODAY_FIELD_NUMBER: _ClassVar[int]
    team: str
    weight: float
    tokens_in_flight: int
    queued_tokens: int
    tokens_per_second: float
    share: float
    entitled: float
    waiting_p95_ms: float
    rejected: int
    tokens_left_today: int
    def __init__(self, team: _Optional[str] = ..., weight: _Optional[float] = ..., tokens_in_flight: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., share: _Optional[float] = ..., entitled: _Optional[float] = ..., waiting_p95_ms: _Optional[float] = ..., rejected: _Optional[int] = ..., tokens_left_today: _Optional[int] = ...) -> None: ...

class Caller(_message.Message):
    __slots__ = ("team", "weight", "scopes", "max_tokens_in_flight", "max_tokens_per_second", "max_tokens_per_day", "max_request_tokens", "tokens_left_today")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LEFT_TODAY_FIELD_NUMBER: _ClassVar[int]
    team: str
    weight: float
    scopes: _containers.RepeatedScalarFieldContainer[str]
    max_tokens_in_flight: int
    max_tokens_per_second: int
    max_tokens_per_day: int
    max_request_tokens: int
    tokens_left_today: int
    def __init__(self, team: _Optional[str] = ..., weight: _Optional[float] = ..., scopes: _Optional[_Iterable[str]] = ..., max_tokens_in_flight: _Optional[int] = ..., max_tokens_per_second: _Optional[int] = ..., max_tokens_per_day: _Optional[int] = ..., max_request_tokens: _Optional[int] = ..., tokens_left_today: _Optional[int] = ...) -> None: ...

class FetchIdTableRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class FetchIdTableResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FetchHeadRequest(_message.Message):
    __slots__ = ("fingerprint", "offset")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    offset: int
    def __init__(self, fingerprint: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class HeadChunk(_message.Message):
    __slots__ = ("offset", "data", "total_bytes", "check")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    total_bytes: int
    check: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., check: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "token_ids", "lengths", "first_rows", "row_mask", "targets", "temperature", "seed", "epoch", "level", "teacher_fingerprint", "item_id", "given_ids", "given_counts")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_MASK_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    GIVEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: int
    token_ids: bytes
    lengths: _containers.RepeatedScalarFieldContainer[int]
    first_rows: _containers.RepeatedScalarFieldContainer[int]
    row_mask: bytes
    targets: TargetSpec
    temperature: float
    seed: int
    epoch: int
    level: Level
    teacher_fingerprint: str
    item_id: int
    given_ids: bytes
    given_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., lengths: _Optional[_Iterable[int]] = ..., first_rows: _Optional[_Iterable[int]] = ..., row_mask: _Optional[bytes] = ..., targets: _Optional[_Union[TargetSpec, _Mapping]] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., epoch: _Optional[int] = ..., level: _Optional[_Union[Level, str]] = ..., teacher_fingerprint: _Optional[str] = ..., item_id: _Optional[int] = ..., given_ids: _Optional[bytes] = ..., given_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class TargetSpec(_message.Message):
    __slots__ = ("top_k", "dense", "sampled", "given_ids", "hidden", "realized", "features", "omit_realized_logprob", "entropy", "omit_log_z", "id_table")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    GIVEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    REALIZED_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    OMIT_REALIZED_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    OMIT_LOG_Z_FIELD_NUMBER: _ClassVar[int]
    ID_TABLE_FIELD_NUMBER: _ClassVar[int]
    top_k: TopK
    dense: Dense
    sampled: Sampled
    given_ids: GivenIds
    hidden: Hidden
    realized: Realized
    features: Features
    omit_realized_logprob: bool
    entropy: bool
    omit_log_z: bool
    id_table: bytes
    def __init__(self, top_k: _Optional[_Union[TopK, _Mapping]] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ..., sampled: _Optional[_Union[Sampled, _Mapping]] = ..., given_ids: _Optional[_Union[GivenIds, _Mapping]] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., realized: _Optional[_Union[Realized, _Mapping]] = ..., features: _Optional[_Union[Features, _Mapping]] = ..., omit_realized_logprob: bool = ..., entropy: bool = ..., omit_log_z: bool = ..., id_table: _Optional[bytes] = ...) -> None: ...

class Sampled(_message.Message):
    __slots__ = ("n",)
    N_FIELD_NUMBER: _ClassVar[int]
    n: int
    def __init__(self, n: _Optional[int] = ...) -> None: ...

class TopK(_message.Message):
    __slots__ = ("k", "min_p", "bits", "top_p")
    K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    k: int
    min_p: float
    bits: int
    top_p: float
    def __init__(self, k: _Optional[int] = ..., min_p: _Optional[float] = ..., bits: _Optional[int] = ..., top_p: _Optional[float] = ...) -> None: ...

class GivenIds(_message.Message):
    __slots__ = ("bits", "ranks")
    BITS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    ranks: bool
    def __init__(self, bits: _Optional[int] = ..., ranks: bool = ...) -> None: ...

class Realized(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("bits",)
    BITS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    def __init__(self, bits: _Optional[int] = ...) -> None: ...

class Features(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layers: _Optional[_Iterable[int]] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ("bits",)
    BITS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    def __init__(self, bits: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "item_id", "cancel", "prompt_ids", "samples", "targets", "max_new_tokens", "draw", "target_temperature", "seed", "epoch", "stop_ids", "stop_strings", "ignore_teacher_stop_ids", "level", "teacher_fingerprint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    TARGET_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_TEACHER_STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: int
    item_id: int
    cancel: bool
    prompt_ids: bytes
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    targets: TargetSpec
    max_new_tokens: int
    draw: Draw
    target_temperature: float
    seed: int
    epoch: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    ignore_teacher_stop_ids: bool
    level: Level
    teacher_fingerprint: str
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[int] = ..., item_id: _Optional[int] = ..., cancel: bool = ..., prompt_ids: _Optional[bytes] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., targets: _Optional[_Union[TargetSpec, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., draw: _Optional[_Union[Draw, _Mapping]] = ..., target_temperature: _Optional[float] = ..., seed: _Optional[int] = ..., epoch: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., stop_strings: _Optional[_Iterable[str]] = ..., ignore_teacher_stop_ids: bool = ..., level: _Optional[_Union[Level, str]] = ..., teacher_fingerprint: _Optional[str] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("number", "received_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    received_ids: bytes
    def __init__(self, number: _Optional[int] = ..., received_ids: _Optional[bytes] = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "part", "error", "check")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    part: GeneratedPart
    error: RequestError
    check: bytes
    def __init__(self, request_id: _Optional[int] = ..., part: _Optional[_Union[GeneratedPart, _Mapping]] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ..., check: _Optional[bytes] = ...) -> None: ...

class GeneratedPart(_message.Message):
    __slots__ = ("sample", "first", "token_ids", "payload", "finish", "last", "teacher_fingerprint", "timing")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    sample: int
    first: int
    token_ids: bytes
    payload: bytes
    finish: Finish
    last: bool
    teacher_fingerprint: str
    timing: Timing
    def __init__(self, sample: _Optional[int] = ..., first: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., finish: _Optional[_Union[Finish, str]] = ..., last: bool = ..., teacher_fingerprint: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "part", "error", "check", "full_check")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    FULL_CHECK_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    part: TargetsPart
    error: RequestError
    check: bytes
    full_check: bytes
    def __init__(self, request_id: _Optional[int] = ..., part: _Optional[_Union[TargetsPart, _Mapping]] = ..., error: _Optional[_Union[RequestError, _Mapping]] = ..., check: _Optional[bytes] = ..., full_check: _Optional[bytes] = ...) -> None: ...

class TargetsPart(_message.Message):
    __slots__ = ("sequence", "first_row", "num_rows", "last", "ids_digest", "payload", "teacher_fingerprint", "timing")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    IDS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    first_row: int
    num_rows: int
    last: bool
    ids_digest: bytes
    payload: bytes
    teacher_fingerprint: str
    timing: Timing
    def __init__(self, sequence: _Optional[int] = ..., first_row: _Optional[int] = ..., num_rows: _Optional[int] = ..., last: bool = ..., ids_digest: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., teacher_fingerprint: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "forward_us", "head_us", "encode_us", "batch_sequences", "batch_tokens", "fill_us", "launch_us", "wait_us", "copy_us", "compact_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    FORWARD_US_FIELD_NUMBER: _ClassVar[int]
    HEAD_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FILL_US_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_US_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    COPY_US_FIELD_NUMBER: _ClassVar[int]
    COMPACT_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    forward_us: int
    head_us: int
    encode_us: int
    batch_sequences: int
    batch_tokens: int
    fill_us: int
    launch_us: int
    wait_us: int
    copy_us: int
    compact_us: int
    def __init__(self, queue_us: _Optional[int] = ..., forward_us: _Optional[int] = ..., head_us: _Optional[int] = ..., encode_us: _Optional[int] = ..., batch_sequences: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., fill_us: _Optional[int] = ..., launch_us: _Optional[int] = ..., wait_us: _Optional[int] = ..., copy_us: _Optional[int] = ..., compact_us: _Optional[int] = ...) -> None: ...

class RequestError(_message.Message):
    __slots__ = ("code", "message", "field", "retry_after_ms", "reason", "sequence", "row")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    field: str
    retry_after_ms: int
    reason: str
    sequence: int
    row: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ..., sequence: _Optional[int] = ..., row: _Optional[int] = ...) -> None: ...

class TeacherInfo(_message.Message):
    __slots__ = ("service_id", "model", "revision", "weights_fingerprint", "tokenizer_fingerprint", "teacher_fingerprint", "vocab_size", "effective_vocab_size", "max_sequence_tokens", "limits", "kinds", "exactness", "replicas", "team", "architecture", "dtype", "device", "attention", "format_versions", "server_version", "replica_id", "id_tables", "caller", "layout", "head_fingerprint", "hidden_size", "num_layers", "stop_ids", "max_generation_tokens", "quantization")
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ID_TABLES_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    service_id: str
    model: str
    revision: str
    weights_fingerprint: str
    tokenizer_fingerprint: str
    teacher_fingerprint: str
    vocab_size: int
    effective_vocab_size: int
    max_sequence_tokens: int
    limits: Limits
    kinds: _containers.RepeatedScalarFieldContainer[str]
    exactness: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    team: str
    architecture: str
    dtype: str
    device: str
    attention: str
    format_versions: _containers.RepeatedScalarFieldContainer[int]
    server_version: str
    replica_id: str
    id_tables: _containers.RepeatedScalarFieldContainer[bytes]
    caller: Caller
    layout: str
    head_fingerprint: str
    hidden_size: int
    num_layers: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    max_generation_tokens: int
    quantization: str
    def __init__(self, service_id: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., weights_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., teacher_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., effective_vocab_size: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., kinds: _Optional[_Iterable[str]] = ..., exactness: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., team: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., attention: _Optional[str] = ..., format_versions: _Optional[_Iterable[int]] = ..., server_version: _Optional[str] = ..., replica_id: _Optional[str] = ..., id_tables: _Optional[_Iterable[bytes]] = ..., caller: _Optional[_Union[Caller, _Mapping]] = ..., layout: _Optional[str] = ..., head_fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., max_generation_tokens: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_request_tokens", "max_request_sequences", "max_request_bytes", "max_top_k", "max_reply_bytes", "max_stream_bytes", "max_queued_tokens", "max_part_bytes", "max_answers_bytes")
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_request_tokens: int
    max_request_sequences: int
    max_request_bytes: int
    max_top_k: int
    max_reply_bytes: int
    max_stream_bytes: int
    max_queued_tokens: int
    max_part_bytes: int
    max_answers_bytes: int
    def __init__(self, max_request_tokens: _Optional[int] = ..., max_request_sequences: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_reply_bytes: _Optional[int] = ..., max_stream_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_part_bytes: _Optional[int] = ..., max_answers_bytes: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "address", "state", "busy_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BUSY_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    state: str
    busy_ms: int
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., busy_ms: _Optional[int] = ...) -> None: ...

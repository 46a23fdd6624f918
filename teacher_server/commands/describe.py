"""`teacher-server describe`: prints the answer of a service to Describe."""

import json

from google.protobuf import json_format
from google.protobuf.message import Message

from protos import teacher_pb2
from teacher_server.commands.remote_call import NoAnswer, ask, connection_of, report_failure
from teacher_server.config import DescribeConfig


def describe(config: DescribeConfig) -> int:
    """Prints who a running service is, and who the caller is to it; returns the exit code."""
    try:
        info = ask(connection_of(config), lambda stub: stub.Describe, teacher_pb2.DescribeRequest())
    except NoAnswer as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return 130
    content = json_format.MessageToDict(
        info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _restore_numbers(info.limits, content["limits"])
    _restore_numbers(info.caller, content["caller"])
    if config.as_json:
        print(json.dumps(content, indent=2))
        return 0
    for name, value in content.items():
        if name == "limits":
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        elif name == "replicas":
            value = ", ".join(f"{r['id']} {r['address']} {r['state']}" for r in value)
        elif name == "caller":
            value["scopes"] = " ".join(value["scopes"])
            value = ", ".join(f"{key} {v}" for key, v in value.items() if v and key != "team")
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name:22} {value}")
    return 0


def _restore_numbers(message: Message, content: dict[str, object]) -> None:
    """Turns 64-bit numbers, which protobuf's JSON writes as strings, back into numbers."""
    for name in content:
        value = getattr(message, name)
        if isinstance(value, int | float):
            content[name] = value

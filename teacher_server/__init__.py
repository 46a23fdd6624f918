"""Hosts a teacher: tokens in, compressed logit tensors out."""

import os

# gRPC's core writes a line for every handshake that fails: clients of another kind would fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

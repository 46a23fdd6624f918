"""The wire contract: `teacher.proto` and the stubs generated from it by `make protos`."""

"""`python -m teacher_server` is the command `teacher-server`."""

import sys

from teacher_server.cli import main

sys.exit(main())

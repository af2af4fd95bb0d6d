"""Python runs this file at each start of a process that `tests/lib/calls.py` records."""

from tests.lib.calls import begin_if_asked

begin_if_asked()
